"""Layers and nested models that are called several times: all calls have the same channels."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers.shrinking import channel_families, shrink
from shrunk import assert_same_outputs, checked, randomize, widths, zero

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = pytest.mark.slow("jax")


def two_branches(shared, *, a=None, b=None):
    """Returns a model that calls a layer on two branches of 4 channels."""
    x = keras.Input((5,))
    a, b = a or layers.Dense(4, name="a"), b or layers.Dense(4, name="b")
    y = layers.Concatenate()([shared(a(x)), shared(b(x))])
    return randomize(keras.Model(x, layers.Dense(2, name="out")(y)))


def test_a_channel_is_removed_if_no_call_needs_it():
    model = two_branches(layers.Dense(4, "relu", name="shared"))
    zero(model.get_layer("a"), [1, 2], bias=True)
    zero(model.get_layer("b"), [2, 3], bias=True)
    zero(model.get_layer("shared"), [0])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 3, "b": 3, "shared": 3, "out": 2}
    assert report.not_followed == {}


@pytest.mark.parametrize(("other", "left"), [(3.0, 3), (2.0, 4)])
def test_constants_move_into_the_bias_if_they_are_equal_in_all_calls(other, left):
    model = two_branches(layers.Dense(4, "relu", name="shared"))
    for name, value in (("a", 3.0), ("b", other)):
        layer = model.get_layer(name)
        zero(layer, [1])
        layer.bias.assign([0.5, value, 0.5, 0.5])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": left, "b": left, "shared": 4, "out": 2}
    if left == 4:
        kept = dict(next(row for row in report if row.layer == "a").kept)
        assert kept == {"'shared' is called again with other channels": 1}


def test_constants_of_one_call_are_kept_if_the_other_call_varies():
    """One bias cannot contain them, even if nothing reads the outputs of the other call."""
    model = two_branches(layers.Dense(4, name="shared"))
    model.get_layer("a").kernel.assign(np.zeros((5, 4)))
    zero(model.get_layer("out"), [4, 5, 6, 7], axis=0)
    smaller, _ = checked(model)
    assert widths(smaller)["a"] == 4


def test_a_layer_that_reads_its_own_outputs():
    x = keras.Input((5,))
    shared = layers.Dense(6, "tanh", name="shared")
    y = shared(shared(shared(layers.Dense(6, name="a")(x))))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    kernel = np.array(model.get_layer("shared").kernel)
    kernel[[0, 4]] = kernel[:, [0, 4]] = 0
    model.get_layer("shared").kernel.assign(kernel)
    zero(model.get_layer("out"), [0, 4], axis=0)
    assert widths(checked(model)[0]) == {"a": 4, "shared": 4, "out": 2}


SHARED = {
    "conv": lambda: layers.Conv2D(4, 3, padding="same", activation="relu"),
    "depthwise": lambda: layers.DepthwiseConv2D(3, padding="same"),
    "groups": lambda: layers.Conv2D(4, 1, groups=2),
    "separable": lambda: layers.SeparableConv2D(4, 3, padding="same"),
    "transposed": lambda: layers.Conv2DTranspose(4, 3, padding="same"),
    "batch": layers.BatchNormalization,
    "prelu": layers.PReLU,
    "layer norm": layers.LayerNormalization,
    "groups of a norm": lambda: layers.GroupNormalization(2),
    "reshape": lambda: layers.Reshape((36, 4)),
    "nested": lambda: keras.Sequential(
        [keras.Input((6, 6, 4)), layers.Conv2D(5, 3, padding="same"), layers.Conv2D(4, 1)],
        name="nested",
    ),
}


@pytest.mark.parametrize("kind", SHARED)
def test_channels_of_shared_layers_are_pruned_and_removed(kind):
    x = keras.Input((6, 6, 3))
    shared = SHARED[kind]()
    a = layers.Conv2D(4, 3, padding="same", name="a")(x)
    b = layers.Conv2D(4, 1, name="b")(x)
    y = layers.GlobalAveragePooling1D()(
        layers.Reshape((36, -1))(layers.add([shared(a), shared(b)]))
    )
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    masked = ml.convert_to_masked(model, mask_normalization=True)
    found = channel_families(masked)
    assert found.not_followed == {}
    assert any({"a", "b"} <= set(family.layers) for family in found.families)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels", seed=3)
    smaller, _ = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert smaller.get_layer("a").filters == smaller.get_layer("b").filters == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.LSTM(4, return_sequences=True),
        lambda: layers.Bidirectional(layers.GRU(2, return_sequences=True)),
        lambda: layers.TimeDistributed(layers.Dense(4, "relu")),
        lambda: layers.EinsumDense("abc,cd->abd", (None, 4), bias_axes="d"),
    ],
    ids=["lstm", "both", "steps", "einsum"],
)
def test_shared_layers_of_sequences(make):
    x = keras.Input((5, 3))
    shared = make()
    first = layers.Dense(4, name="a")(x)
    y = layers.GlobalAveragePooling1D()(shared(shared(first)))
    masked = ml.convert_to_masked(randomize(keras.Model(x, layers.Dense(2)(y))))
    assert channel_families(masked).not_followed == {}
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, _ = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert smaller.get_layer("a").units == 2


def test_shared_attention():
    x = keras.Input((5, 8))
    shared = layers.MultiHeadAttention(2, 4, name="attention")
    y = layers.Dense(8, name="a")(x)
    y = y + shared(y, y)
    y = y + shared(y, y, use_causal_mask=True)
    masked = ml.convert_to_masked(randomize(keras.Model(x, layers.Dense(2)(y))))
    assert channel_families(masked).not_followed == {}
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert smaller.get_layer("a").units == 4
    # Both calls count: queries, keys, values, outputs, scores and mixture.
    (row,) = (row for row in report if row.layer == "attention")
    assert row.macs_before == 2 * (4 * 5 * 8 * 8 + 2 * 5 * 5 * 8)
    assert row.macs_after == 2 * (4 * 5 * 4 * 4 + 2 * 5 * 5 * 4)


def test_a_nested_model_that_is_called_twice_has_the_channels_of_both_calls():
    inside = keras.Input((4,), name="inside")
    hidden = layers.Dense(6, "relu", name="hidden")(inside)
    nested = keras.Model(inside, layers.Dense(4, name="last")(hidden), name="nested")
    model = two_branches(nested)
    zero(model.get_layer("a"), [1, 2], bias=True)
    zero(model.get_layer("b"), [2, 3], bias=True)
    zero(nested.get_layer("hidden"), [5], bias=True)
    zero(nested.get_layer("last"), [0], bias=True)
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 3, "b": 3, "out": 2}
    assert widths(smaller.get_layer("nested")) == {"hidden": 5, "last": 3}
    assert report.not_followed == {}


@pytest.mark.parametrize("nested", [False, True])
def test_calls_along_different_axes_are_left_whole(nested):
    x = keras.Input((4,))
    y = layers.Dense(4, name="a")(x)
    rows = layers.RepeatVector(4)(y)
    columns = layers.Permute((2, 1))(layers.RepeatVector(4)(layers.Dense(4, name="b")(x)))
    shared = layers.Dense(4, name="shared")
    if nested:
        shared = keras.Sequential([keras.Input((4, 4)), layers.Dense(5), shared], name="nested")
    y = layers.Flatten()(layers.add([shared(rows), shared(columns)]))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    for name in ("a", "b"):
        zero(model.get_layer(name), [1])
    if nested:  # Inside, a unit is constant in the first call only.
        kernel = np.zeros((4, 5))
        kernel[1, 3] = 1
        shared.layers[0].kernel.assign(kernel)
    smaller, report = checked(model)
    assert widths(smaller)["a"] == widths(smaller)["b"] == 4
    assert len(report.not_followed) == 1


@pytest.mark.parametrize("first", [False, True])
def test_a_call_on_what_is_left_whole_keeps_the_other_call_whole(first):
    x = keras.Input((4,))
    shared = layers.PReLU("normal", name="shared")
    hidden = layers.Dense(4, name="a")(x)
    calls = [shared(x), shared(hidden)] if first else [shared(hidden), shared(x)]
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.concatenate(calls))))
    zero(model.get_layer("a"), [1], bias=True)
    smaller, _ = checked(model)
    assert widths(smaller) == {"a": 4, "out": 2}


def test_multiply_adds_of_all_calls_are_counted():
    model = two_branches(layers.Dense(4, "relu", name="shared"))
    _, report = shrink(model, return_report=True)
    assert report.macs_before == 2 * 5 * 4 + 2 * 4 * 4 + 8 * 2
    assert channel_families(model).positions["shared/kernel"] == 2


def test_effective_weights_of_a_shared_layer():
    """A weight is effective if it is on a path in any of the calls."""
    model = ml.convert_to_masked(two_branches(layers.Dense(4, name="shared")))
    masks = {path: np.ones_like(mask) for path, mask in ml.get_masks(model).items()}
    masks["a/kernel"][:, [0, 1]] = False
    masks["b/kernel"][:, [1, 2]] = False
    masks["shared/kernel"][:, 3] = False
    ml.set_masks(model, masks)
    found = ml.effective_masks(model)
    expected = masks["shared/kernel"].copy()
    expected[1] = False  # Zero or the same bias in both calls.
    np.testing.assert_array_equal(found["shared/kernel"], expected)
