"""Channels that additions, products and concatenations join."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import channel_families
from shrunk import add_layer, checked, numpy, randomize, residual_net, row, widths, zero

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


@pytest.mark.parametrize("add", [add_layer, lambda a, b: a + b], ids=["layer", "operator"])
def test_residual_addition_removes_only_channels_removed_in_all_branches(add):
    model = residual_net(add)
    zero(model.get_layer("stem"), [0, 1], bias=True)
    zero(model.get_layer("b1"), [1, 2], bias=True)
    smaller, report = checked(model)
    assert widths(smaller) == {"stem": 3, "b0": 5, "b1": 3, "top": 3}
    assert row(report, "b1").kept == {"joined with a channel that varies": 1}


def test_residual_stream_that_only_feeds_itself_is_removed():
    model = residual_net(add_layer)
    zero(model.get_layer("top"), [3], axis=-2)  # channel 3 of the stream is read only by b0 ...
    kernel = numpy(model.get_layer("b0").kernel)
    kernel[:, :, 3, :4] = 0  # ... in its filter 4 ...
    model.get_layer("b0").kernel.assign(kernel)
    kernel = numpy(model.get_layer("b1").kernel)
    kernel[:, :, 4, :3] = 0  # ... which writes only to channel 3
    model.get_layer("b1").kernel.assign(kernel)
    smaller, _ = checked(model)
    assert widths(smaller) == {"stem": 3, "b0": 4, "b1": 3, "top": 3}


def test_filters_that_write_to_a_stream_after_its_last_reader_are_removed():
    x = keras.Input((6,))
    stream = layers.Dense(4, name="stem")(x)
    for block in "ab":
        branch = layers.Dense(5, "relu", name=f"{block}0")(stream)
        stream = stream + layers.Dense(4, name=f"{block}1")(branch)
    model = randomize(keras.Model(x, layers.Dense(3, name="top")(stream)))
    for name in ("b0", "top"):
        zero(model.get_layer(name), [3], axis=-2)  # only block a reads channel 3 ...
    kernel = numpy(model.get_layer("b1").kernel)
    kernel[2, :3] = 0  # ... and unit 2 of b0 writes only there
    model.get_layer("b1").kernel.assign(kernel)
    smaller, _ = checked(model)
    assert widths(smaller) == {"stem": 4, "a0": 5, "a1": 4, "b0": 4, "b1": 4, "top": 3}


def test_constants_of_all_branches_add_up():
    x = keras.Input((6,))
    a = layers.Dense(3, name="a")(x)
    b = layers.Dense(3, name="b")(x)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.Add()([a, b]))))
    for name in "ab":
        zero(model.get_layer(name), [0])
    smaller, _ = checked(model)
    assert widths(smaller) == {"a": 2, "b": 2, "out": 2}
    added = numpy(model.get_layer("a").bias)[0] + numpy(model.get_layer("b").bias)[0]
    np.testing.assert_allclose(
        numpy(smaller.get_layer("out").bias),
        numpy(model.get_layer("out").bias) + added * numpy(model.get_layer("out").kernel)[0],
        rtol=1e-6,
    )


@pytest.mark.parametrize(
    "merge",
    [layers.Subtract, layers.Multiply, layers.Average, layers.Maximum, layers.Minimum],
)
@pytest.mark.parametrize("as_operation", [False, True])
def test_other_merges(merge, as_operation):
    name = merge.__name__.lower()
    if as_operation and name == "average":
        pytest.skip("no such operation")
    function = getattr(keras.ops, name, None) if as_operation else None
    x = keras.Input((6,))
    a, b = (layers.Dense(4, name=n)(x) for n in "ab")
    merged = function(a, b) if as_operation else merge()([a, b])
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(merged)))
    zero(model.get_layer("a"), [0, 1])
    zero(model.get_layer("b"), [0])
    zero(model.get_layer("a"), [2], bias=True)  # Zero times anything is zero.
    smaller, report = checked(model)
    assert widths(smaller)["a"] == (2 if name == "multiply" else 3)
    assert report.not_followed == {}


def test_gate_per_channel():
    x = keras.Input((6, 6, 2))
    y = layers.Conv2D(4, 3, name="c0")(x)
    gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
    gate = layers.Conv2D(4, 1, activation="sigmoid", name="gate")(gate)
    model = randomize(keras.Model(x, layers.Conv2D(3, 3, padding="same")(y * gate)))
    zero(model.get_layer("c0"), [1, 2], bias=True)
    smaller, _ = checked(model)
    assert (smaller.get_layer("c0").filters, smaller.get_layer("gate").filters) == (2, 2)


@pytest.mark.parametrize("as_operation", [False, True])
def test_concatenation(as_operation):
    x = keras.Input((6, 6, 2))
    a = layers.Conv2D(3, 3, padding="same", name="a")(x)
    b = layers.Conv2D(4, 3, padding="same", name="b")(x)
    parts = [a, x, b]
    y = keras.ops.concatenate(parts, axis=-1) if as_operation else layers.Concatenate()(parts)
    model = randomize(keras.Model(x, layers.Conv2D(2, 3, name="c")(y)))
    zero(model.get_layer("a"), [1])
    zero(model.get_layer("c"), [3, 6], axis=-2)  # The first input channel, and the second one of b.
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 2, "b": 3, "c": 2}
    assert smaller.get_layer("c").kernel.shape == (3, 3, 2 + 2 + 3, 2)
    assert report.not_followed == {}


def test_concatenation_of_channels_along_different_axes_is_left_whole():
    x = keras.Input((3, 2))
    a = layers.Dense(3, name="a")(x)
    b = layers.Permute((2, 1))(layers.Dense(3, name="b")(x))
    y = layers.Concatenate(axis=1, name="joined")([a, b])
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [0])
    zero(model.get_layer("b"), [0])
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 3
    assert report.not_followed == {"joined": "its inputs have channels along different axes"}


def test_a_channel_that_is_broadcast_to_all_others_is_kept():
    x = keras.Input((6,))
    a, b = layers.Dense(4, name="a")(x), layers.Dense(1, name="b")(x)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.Add(name="sum")([a, b]))))
    zero(model.get_layer("a"), [0])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 4, "b": 1, "out": 2}
    assert report.not_followed == {}


def test_channels_that_are_broadcast_over_another_rank_are_left_whole():
    x, z = keras.Input((3, 6)), keras.Input((3,))
    y = layers.Add(name="sum")([layers.Dense(4, name="a")(x), layers.Dense(4, name="b")(z)])
    model = randomize(keras.Model([x, z], layers.Dense(2)(y)))
    zero(model.get_layer("a"), [0])
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 4
    assert report.not_followed == {"sum": "it broadcasts channels"}


@pytest.mark.parametrize(
    ("take", "followed"),
    [
        (lambda x: x[:, 0], True),
        (lambda x: x[:, 1:3, ...], True),
        (lambda x: x[:, None, -1, :], True),
        (lambda x: x[..., 1:2, :], True),
        (lambda x: x[..., 1:], False),
        (lambda x: x[:, :, 2], False),
    ],
)
def test_entries_of_a_tensor(take, followed):
    x = keras.Input((4, 5))
    y = take(layers.Dense(6, name="a")(x))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.Flatten()(y))))
    zero(model.get_layer("a"), [1], bias=True)
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == (5 if followed else 6)
    why = "it selects some of the channels"
    assert list(report.not_followed.values()) == ([] if followed else [why])


def test_channels_at_several_positions_are_joined():
    """As a class token in front of the patches of a picture."""
    x = keras.Input((4, 5))
    first = layers.Dense(6, name="first")(layers.GlobalAveragePooling1D(keepdims=True)(x))
    y = layers.concatenate([first, layers.Dense(6, name="rest")(x)], axis=1)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    zero(model.get_layer("first"), [1, 2], bias=True)
    zero(model.get_layer("rest"), [1, 3], bias=True)
    smaller, report = checked(model)
    assert report.not_followed == {}
    assert widths(smaller) == {"first": 5, "rest": 5, "out": 2}
    for name in ("first", "rest"):
        model.get_layer(name).bias.assign([0.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    smaller, _ = checked(model)  # The same constant at all positions moves into a bias.
    assert widths(smaller) == {"first": 5, "rest": 5, "out": 2}
    model.get_layer("first").bias.assign([0.0, 0.6, 0.0, 0.0, 0.0, 0.0])
    smaller, _ = checked(model)
    assert widths(smaller) == {"first": 6, "rest": 6, "out": 2}


def test_a_tensor_of_unknown_width_does_not_join():
    x, factor = keras.Input((4, 3)), keras.Input((4, None))
    y = layers.Multiply(name="product")([layers.Dense(5, name="a")(x), factor])
    model = keras.Model([x, factor], layers.Dense(2)(layers.Reshape((4, 5))(y)))
    assert channel_families(model).not_followed == {
        "product": "the number of its input channels is unknown"
    }


def test_an_array_is_not_a_number():
    x = keras.Input((4,))
    y = layers.Dense(3, name="a")(x) * keras.ops.convert_to_tensor([1.0, 2.0, 3.0])
    model = keras.Model(x, layers.Dense(2)(y))
    assert list(channel_families(model).not_followed.values()) == [
        "one of its operands is an array"
    ]
