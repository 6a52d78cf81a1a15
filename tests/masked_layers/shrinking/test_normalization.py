"""Channels that normalization layers leave out, and that shrinking removes."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers.shrinking import _keras_graph
from shrunk import checked, inputs_of, numpy, randomize, row, widths, zero

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]

NORMS = {
    "layer": layers.LayerNormalization,
    "rms": layers.RMSNormalization,
    "group": lambda **kwargs: layers.GroupNormalization(1, **kwargs),
    "instance": lambda **kwargs: layers.GroupNormalization(-1, **kwargs),
    "groups": lambda **kwargs: layers.GroupNormalization(4, **kwargs),
}


def pre_norm_net(make):
    x = keras.Input((6,))
    stream = layers.Dense(8, name="stem")(x)
    for block in "ab":
        y = make(name=f"{block}_norm")(stream)
        y = layers.Dense(12, "gelu", name=f"{block}0")(y)
        stream = layers.add([stream, layers.Dense(8, name=f"{block}1")(y)])
    return randomize(keras.Model(x, layers.Dense(3, name="out")(make(name="norm")(stream))))


def convolutional_net(make):
    """A block like those of ConvNeXt, before and after layers that change the width."""
    x = keras.Input((8, 8, 3))
    stream = make(name="stem_norm")(layers.Conv2D(8, 2, 2, name="stem")(x))
    y = layers.Conv2D(8, 3, padding="same", groups=8, name="depthwise")(stream)
    y = layers.Dense(16, "gelu", name="wide")(make(name="norm")(y))
    y = _keras_graph.LayerScale(1.0, 8, name="scale")(layers.Dense(8, name="narrow")(y))
    stream = layers.add([stream, _keras_graph.StochasticDepth(0.1)(y)])
    stream = layers.Conv2D(12, 2, 2, name="down")(make(name="down_norm")(stream))
    y = make(name="top_norm")(layers.GlobalAveragePooling2D()(stream))
    return randomize(keras.Model(x, layers.Dense(3, name="out")(y)))


def halved(model):
    masked = ml.convert_to_masked(model, mask_normalization=True)
    LotteryTicketPruner(masked).update_masks("smallest_weights", rate=0.5, structure="channels")
    return masked


@pytest.mark.parametrize("make", NORMS.values(), ids=NORMS)
def test_residual_stream_of_a_pre_norm_net(make):
    masked = halved(pre_norm_net(make))
    smaller, report = checked_masked(masked)
    assert report.not_followed == {}
    assert widths(smaller) == {"stem": 4, "a0": 6, "a1": 4, "b0": 6, "b1": 4, "out": 3}
    assert smaller.get_layer("norm").gamma.shape == (4,) if make is not NORMS["rms"] else True
    assert all(not isinstance(layer, ml.MaskedLayer) for layer in smaller.layers)


@pytest.mark.parametrize(
    "make",
    [NORMS["layer"], NORMS["instance"], NORMS["groups"], NORMS["rms"]],
    ids=["layer", "instance", "groups", "rms"],
)
def test_block_with_depthwise_convolution_scale_and_dropped_paths(make):
    model = convolutional_net(make)
    masked = halved(model)
    smaller, report = checked_masked(masked)
    assert report.not_followed == {}
    units = {"stem": 4, "depthwise": 4, "wide": 8, "narrow": 4, "down": 6, "out": 3}
    assert widths(smaller) == units
    assert smaller.get_layer("scale").gamma.shape == (4,)


def checked_masked(masked):
    """Shrinks a masked model, and compares the outputs and the report."""
    data = inputs_of(masked)
    expected = numpy(masked(data))
    smaller, report = ml.shrink(masked, return_report=True)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(numpy(smaller(data)), expected, atol=1e-5 * np.abs(expected).max())
    assert report.weights_after == smaller.count_params()
    return smaller, report


@pytest.mark.once
def test_normalization_of_each_step():
    x = keras.Input((5, 6))
    norm = layers.TimeDistributed(layers.LayerNormalization(), name="norm")
    y = norm(layers.Dense(8, name="a")(x))
    masked = halved(randomize(keras.Model(x, layers.Dense(3, name="out")(y))))
    smaller, report = checked_masked(masked)
    assert report.not_followed == {}
    assert widths(smaller) == {"a": 4, "out": 3}
    assert type(smaller.get_layer("norm").layer) is layers.LayerNormalization


@pytest.mark.once
def test_families_name_the_scales_of_normalizations():
    masked = ml.convert_to_masked(pre_norm_net(layers.LayerNormalization), mask_normalization=True)
    found = ml.channel_families(masked)
    stream = found.families[0]
    assert stream.layers == ("stem", "a1", "b1")
    assert {path: members.tolist() for path, members in stream.normalized.items()} == {
        f"{name}/gamma": list(range(8)) for name in ("a_norm", "b_norm", "norm")
    }
    assert "norm/gamma" not in stream.weights
    assert [family.normalized for family in found.families[1:]] == [{}, {}]
    assert (found.whole, found.not_followed) == ({}, {})


@pytest.mark.once
@pytest.mark.parametrize("convert", [lambda x: x, ml.convert_to_masked], ids=["plain", "masked"])
def test_without_a_mask_all_channels_stay(convert):
    model = convert(pre_norm_net(layers.LayerNormalization))
    found = ml.channel_families(model)
    assert [family.layers for family in found.families] == [("a0",), ("b0",)]
    assert set(found.whole) == {"stem", "a1", "b1"}
    for name in ("a_norm", "b_norm", "norm"):
        assert "convert_to_masked(model, mask_normalization=True)" in found.not_followed[name]


@pytest.mark.once
@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (layers.LayerNormalization(axis=(1, 2), name="odd"), "several axes"),
        (layers.LayerNormalization(scale=False, name="odd"), "no scale"),
    ],
    ids=["axes", "scale"],
)
def test_normalization_that_cannot_be_followed(norm, reason):
    x = keras.Input((5, 4))
    y = norm(layers.Dense(8, name="a")(x))
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(y)))
    masked = ml.convert_to_masked(model, mask_normalization=True)
    found = ml.channel_families(masked)
    assert reason in found.not_followed["odd"]
    assert list(found.whole) == ["a"]


@pytest.mark.once
def test_unpruned_units_of_a_masked_normalization_stay():
    masked = ml.convert_to_masked(pre_norm_net(layers.LayerNormalization), mask_normalization=True)
    kernel = numpy(masked.get_layer("stem").kernel)
    kernel[:, 0] = 0
    masked.get_layer("stem").kernel.assign(kernel)  # Its mean and variance still need it.
    smaller, _ = checked_masked(masked)
    assert widths(smaller)["stem"] == 8


@pytest.mark.once
def test_channels_that_other_layers_still_use_are_refused():
    masked = halved(pre_norm_net(layers.LayerNormalization))
    masks = {path: np.ones_like(mask) for path, mask in ml.get_masks(masked).items()}
    masks["a_norm/gamma"][:2] = False
    ml.set_masks(masked, masks)
    with pytest.raises(ValueError, match=r"'a_norm' leaves out channels that other layers use"):
        ml.shrink(masked)


@pytest.mark.once
def test_channels_of_a_normalization_that_cannot_be_followed_are_refused():
    x = keras.Input((5, 6))
    shared = layers.LayerNormalization(name="shared")
    y = layers.Dense(8)(shared(layers.Dense(8, name="a")(x)))
    model = randomize(keras.Model(x, layers.Dense(3)(layers.TimeDistributed(shared)(y))))
    masked = ml.convert_to_masked(model, mask_normalization=True)
    with pytest.warns(UserWarning, match="shared: it shares a weight with another layer"):
        plain = ml.shrink(masked)  # All channels are kept.
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in plain.layers)
    ml.set_masks(masked, {"shared/gamma": np.arange(8) > 2})
    with pytest.raises(ValueError, match=r"'shared' leaves .* cannot be followed.* shares"):
        ml.shrink(masked)


@pytest.mark.once
def test_a_layer_that_loses_all_channels_keeps_one_that_is_zero():
    x = keras.Input((6,))
    y = layers.LayerNormalization(name="norm")(layers.Dense(4, name="a")(x))
    y = layers.add([layers.Dense(5, name="b")(y), layers.Dense(5, name="c")(x)])
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(y)))
    masked = ml.convert_to_masked(model, mask_normalization=True)
    masks = ml.get_masks(masked)
    for path in ("a/kernel", "b/kernel", "norm/gamma"):
        masks[path][:] = False
    ml.set_masks(masked, masks)
    smaller, _ = checked_masked(masked)
    assert widths(smaller)["a"] == 1


@pytest.mark.once
def test_scale_of_zero_makes_a_constant_of_a_kept_channel():
    masked = halved(pre_norm_net(layers.LayerNormalization))
    norm = masked.get_layer("norm")
    gamma = numpy(norm.gamma)
    gamma[np.flatnonzero(ml.get_masks(masked)["norm/gamma"])[:2]] = 0
    norm.gamma.assign(gamma)
    smaller, _ = checked_masked(masked)
    assert widths(smaller)["stem"] == 4  # The others still take it into their mean.


@pytest.mark.once
def test_instance_normalization_makes_a_constant_of_a_constant():
    x = keras.Input((8, 8, 3))
    y = layers.GroupNormalization(-1, name="norm")(layers.Conv2D(6, 3, name="a")(x))
    y = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, name="b")(layers.ReLU()(y)))
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(y)))
    zero(model.get_layer("a"), [1, 4])
    smaller, _ = checked(model)
    assert widths(smaller) == {"a": 4, "b": 4, "out": 3}
    assert smaller.get_layer("norm").groups == 4


def grouped_net(groups=3, **kwargs):
    x = keras.Input((8, 8, 2))
    y = layers.Conv2D(6, 3, name="a")(x)
    y = layers.GroupNormalization(groups, name="norm", **kwargs)(y)
    y = layers.GlobalMaxPooling2D()(layers.Conv2D(4, 3, name="b")(layers.ReLU()(y)))
    return randomize(keras.Model(x, layers.Dense(3, name="out")(y)))


@pytest.mark.once
@pytest.mark.parametrize("groups", [2, 3])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("center", [True, False])
def test_a_channel_of_a_group_goes_only_with_all_of_the_group(groups, scale, center):
    model = grouped_net(groups, scale=scale, center=center)
    size = 6 // groups
    unread = [0, *range(size, 2 * size)]  # One channel of the first group, all of the second.
    zero(model.get_layer("b"), unread, axis=-2)
    (first, second) = ml.channel_families(model).families
    assert (first.layers, first.size) == (("a",), groups)
    np.testing.assert_array_equal(first.weights["a/kernel"][3], np.arange(6) // size)
    np.testing.assert_array_equal(first.weights["b/kernel"][2], np.arange(6) // size)
    assert (second.layers, second.size) == (("b",), 4)
    smaller, report = checked(model)
    assert report.not_followed == {}
    assert widths(smaller) == {"a": 6 - size, "b": 4, "out": 3}
    assert smaller.get_layer("norm").groups == groups - 1
    np.testing.assert_array_equal(
        numpy(smaller.get_layer("a").bias), np.delete(numpy(model.get_layer("a").bias), unread[1:])
    )


@pytest.mark.once
def test_a_group_of_constants_is_a_group_of_constants():
    model = grouped_net()
    zero(model.get_layer("a"), [2, 3, 4])  # Their biases differ: the second group is constant.
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 4, "b": 4, "out": 3}
    assert row(report, "a").constant == 2
    assert smaller.get_layer("norm").groups == 2
    model = grouped_net()
    gamma = model.get_layer("norm").gamma
    gamma.assign([1, 2, 0, 0, 0, 1])  # The scale of the second group is zero.
    smaller, _ = checked(model)
    assert widths(smaller)["a"] == 4


@pytest.mark.once
def test_groups_in_the_first_axis_and_of_an_input_that_is_left_whole():
    x = keras.Input((6, 5))
    y = layers.GroupNormalization(3, axis=1, name="first")(x)
    y = layers.Permute((2, 1))(layers.Dense(8, name="a")(layers.Permute((2, 1))(y)))
    y = layers.GroupNormalization(4, axis=1, name="second")(y)
    y = layers.Dense(4, name="out")(layers.Permute((2, 1))(y))
    masked = halved(randomize(keras.Model(x, y)))
    smaller, report = checked_masked(masked)
    assert report.not_followed == {}
    assert widths(smaller) == {"a": 4, "out": 4}
    groups = {name: smaller.get_layer(name).groups for name in ("first", "second")}
    assert groups == {"first": 3, "second": 2}


@pytest.mark.slow  # `test_compilation.py` checks most of it.
def test_optimizer_and_training_go_on():
    model = pre_norm_net(layers.LayerNormalization)
    model.compile("adam", "mse")
    masked = halved(model)
    x = inputs_of(masked, batch=32)
    y = np.random.default_rng(0).normal(size=(32, 3))
    masked.fit(x, y, epochs=2, verbose=0)
    smaller = ml.shrink(masked)
    before = {v.path: numpy(v) for v in masked.optimizer.variables}
    found = [numpy(v) for v in smaller.optimizer.variables]
    assert len(found) == len(before)
    kept = ml.get_masks(masked)["norm/gamma"]
    momentum = next(v for path, v in before.items() if "norm_gamma_momentum" in path)
    assert momentum.shape == (8,)
    assert any(np.array_equal(momentum[kept], v) for v in found)
    for each in (masked, smaller):
        each.fit(x, y, epochs=1, shuffle=False, verbose=0)
    np.testing.assert_allclose(numpy(smaller(x)), numpy(masked(x)), atol=1e-3)


@pytest.mark.once
def test_effective_masks_leave_normalization_as_it_is():
    masked = halved(pre_norm_net(layers.LayerNormalization))
    data = inputs_of(masked)
    expected = numpy(masked(data))
    ml.set_masks(masked, ml.effective_masks(masked))
    np.testing.assert_allclose(numpy(masked(data)), expected, rtol=1e-5, atol=1e-6)


def test_private_layers_of_convnext():
    """The two layers have weights, arguments and outputs as their rules say."""
    scale = _keras_graph.LayerScale(0.5, 3)
    x = np.arange(6, dtype="float32").reshape(2, 3)
    np.testing.assert_allclose(numpy(scale(x)), 0.5 * x)
    assert scale.gamma.shape == (3,)
    assert scale.get_config()["projection_dim"] == 3
    np.testing.assert_array_equal(numpy(_keras_graph.StochasticDepth(0.5)(x)), x)
    model = keras.applications.ConvNeXtTiny(weights=None, input_shape=(32, 32, 3), classes=2)
    assert any(type(layer) is _keras_graph.LayerScale for layer in model.layers)
