"""Families of channels: pruning all weights of a channel must make the channel unread."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import channel_families, convert_to_masked, get_masks, set_masks, shrink

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


def squeeze_and_excite():
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(8, 3, padding="same", name="wide")(x)
    y = layers.Activation("swish")(layers.BatchNormalization()(y))
    y = layers.DepthwiseConv2D(3, padding="same")(y)
    gate = layers.Reshape((1, 1, 8))(layers.GlobalAveragePooling2D()(y))
    gate = layers.Conv2D(2, 1, activation="swish", name="reduce")(gate)
    gate = layers.Conv2D(8, 1, activation="sigmoid", name="expand")(gate)
    y = layers.Conv2D(5, 1, name="narrow")(layers.multiply([y, gate]))
    return keras.Model(x, layers.Dense(2, name="out")(layers.GlobalMaxPooling2D()(y)))


def residual():
    x = keras.Input((6, 6, 3))
    stream = layers.Conv2D(6, 3, padding="same", name="stem")(x)
    for i in range(2):
        y = layers.ReLU()(layers.BatchNormalization()(stream))
        y = layers.Conv2D(4, 3, padding="same", use_bias=False, name=f"in_{i}")(y)
        y = layers.Conv2D(6, 3, padding="same", name=f"out_{i}")(y)
        stream = layers.add([stream, y / 2.0])
    return keras.Model(x, layers.Dense(2, name="last")(layers.Flatten()(stream)))


def concatenated():
    x = keras.Input((5, 3))
    a = layers.Conv1D(4, 3, name="a")(x)
    b = layers.SeparableConv1D(6, 3, name="b")(x)
    y = layers.Conv1DTranspose(5, 2, name="mix")(layers.PReLU()(layers.concatenate([a, b])))
    y = layers.UpSampling1D(2)(y)
    return keras.Model(x, layers.Dense(2, name="last")(layers.Permute((2, 1))(y)[:, 0]))


def recurrent():
    x = keras.Input((7,), dtype="int32")
    y = layers.Embedding(11, 6, name="table")(x)
    y = layers.LSTM(5, return_sequences=True, name="first")(y)
    y = layers.GRU(4, name="second")(layers.Dense(3, "relu", name="between")(y))
    y = layers.RepeatVector(2)(y)
    y = layers.SimpleRNN(3, name="third")(y)
    return keras.Model(x, layers.Dense(2, name="last")(y))


def text():
    """Returns a classifier of token sequences, with recurrent layers of both directions."""
    x = keras.Input((7,), dtype="int32")
    y = layers.Embedding(11, 6, mask_zero=True, name="words")(x)
    y = layers.Bidirectional(layers.LSTM(4, return_sequences=True), name="both")(y)
    y = layers.Dropout(0.5)(layers.Dense(5, "tanh", name="between")(y))
    backward = layers.GRU(3, go_backwards=True, reset_after=False)
    y = layers.Bidirectional(
        layers.SimpleRNN(3), merge_mode="sum", backward_layer=backward, name="sum"
    )(y)
    return keras.Model(x, layers.Dense(2, name="last")(y))


def nested():
    base = keras.Sequential(
        [
            keras.Input((6, 6, 4)),
            layers.Conv2D(5, 3, name="one"),
            layers.BatchNormalization(),
            layers.Conv2D(6, 3, name="two"),
        ],
        name="base",
    )
    x = keras.Input((6, 6, 3))
    y = base(layers.Conv2D(4, 1, activation="relu", name="before")(x))
    y = layers.Reshape((-1, 6))(y)
    return keras.Model(x, layers.Dense(2, name="last")(layers.GlobalAveragePooling1D()(y)))


MODELS = [squeeze_and_excite, residual, recurrent, text, nested]
FAMILIES = {
    "squeeze_and_excite": {("wide", "expand"): 8, ("reduce",): 2, ("narrow",): 5},
    "residual": {("stem", "out_0", "out_1"): 6, ("in_0",): 4, ("in_1",): 4},
    "recurrent": {("table",): 6, ("first",): 5, ("between",): 3, ("second",): 4, ("third",): 3},
    "text": {("words",): 6, ("both",): 4, ("between",): 5, ("sum",): 3},
    "nested": {("before",): 4, ("base/one",): 5, ("base/two",): 6},
}


def randomized(make):
    keras.utils.set_random_seed(0)
    model = make()
    rng = np.random.default_rng(0)
    for variable in model.weights:
        value = rng.normal(size=variable.shape) / np.sqrt(max(1, np.prod(variable.shape[:-1])))
        variable.assign(np.abs(value) + 0.5 if "variance" in variable.path else value + 0.1)
    return convert_to_masked(model)


def inputs(model, batch=4):
    (tensor,) = model.inputs
    shape, rng = (batch, *tensor.shape[1:]), np.random.default_rng(1)
    if tensor.dtype == "int32":
        return rng.integers(11, size=shape)
    return rng.normal(size=shape).astype("float32")


def outputs(model):
    return keras.ops.convert_to_numpy(model(inputs(model)))


def without(model, family, channel):
    masks = get_masks(model)
    for path, axes in family.weights.items():
        for axis, channels in axes.items():
            np.moveaxis(masks[path], axis, 0)[channels == channel] = False
    return masks


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_families_are_the_layers_whose_channels_are_joined(make):
    found = channel_families(randomized(make))
    assert {family.layers: family.size for family in found.families} == FAMILIES[make.__name__]
    assert found.outputs in (("out",), ("last",))
    assert found.whole == found.not_followed == {}


# These two take most of the time. That their channels are removed whole is tested below.
@pytest.mark.parametrize(
    "make",
    [pytest.param(m, marks=[pytest.mark.slow] * (m in (recurrent, text))) for m in MODELS],
    ids=lambda make: make.__name__,
)
def test_no_layer_reads_a_channel_whose_weights_are_pruned(make):
    """Changes the weights that make the channel: the outputs must stay bitwise equal."""
    model = randomized(make)
    dense = outputs(model)
    for family in channel_families(model).families:
        channel = family.size - 1
        masks = get_masks(model)
        set_masks(model, without(model, family, channel))
        before = outputs(model)
        assert np.abs(before - dense).max() > 1e-6  # Pruning the channel changed the outputs.
        old = [keras.ops.convert_to_numpy(v) for v in model.weights]
        for name in family.layers:
            layer = model
            for part in name.split("/"):
                layer = layer.get_layer(part)
            for variable in layer.weights:
                value = keras.ops.convert_to_numpy(variable).copy()
                if len(value.shape) == 1 and len(value) == family.size:
                    value[channel] += 100.0
                    variable.assign(value)
        np.testing.assert_array_equal(outputs(model), before)
        for variable, value in zip(model.weights, old, strict=True):
            variable.assign(value)
        set_masks(model, masks)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_shrink_removes_all_of_a_pruned_channel(make):
    model = randomized(make)
    found = channel_families(model)
    for family in found.families:
        set_masks(model, without(model, family, 0))
    smaller, report = shrink(model, return_report=True)
    assert {row.layer: row.before - row.after for row in report} == {
        **{name: 1 for family in found.families for name in family.layers},
        **dict.fromkeys(found.outputs, 0),
    }
    expected = outputs(model)
    np.testing.assert_allclose(
        outputs(smaller), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
    for layer in smaller.layers:
        assert type(layer).__module__.startswith("keras.")


def test_each_part_of_a_concatenation_is_a_separate_family():
    found = channel_families(randomized(concatenated))
    assert [family.layers for family in found.families] == [("a",), ("b",)]
    rows = [family.weights["mix/kernel"][2] for family in found.families]
    np.testing.assert_array_equal(rows[0], [0, 1, 2, 3, -1, -1, -1, -1, -1, -1])
    np.testing.assert_array_equal(rows[1], [-1, -1, -1, -1, 0, 1, 2, 3, 4, 5])


def test_a_layer_without_a_mask_keeps_what_it_reads_and_makes():
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    y = layers.Dense(5, name="b")(layers.Dense(3, name="a")(x))
    y = layers.add([y, layers.Dense(5, name="joined")(x)])
    y = layers.Dense(2, name="c", activation="softmax")(layers.Dense(3, name="last")(y))
    model = keras.Model(x, y)
    found = channel_families(convert_to_masked(model, exclude="^b$"))
    assert [family.layers for family in found.families] == [("last",)]
    assert found.outputs == ("c",)
    assert found.whole["a"] == "'b', whose weights have no mask, reads it"
    assert found.whole["joined"] == "'b', whose weights have no mask, makes it"
    assert {family.layers for family in channel_families(model).families} == {
        ("a",),
        ("b", "joined"),
        ("last",),
    }


def test_a_nested_model_of_several_inputs_and_outputs_is_followed():
    def make():
        a, b = keras.Input((4,)), keras.Input((6,))
        sums = layers.add([layers.Dense(5, name="p")(a), layers.Dense(5, name="q")(b)])
        inner = keras.Model([a, b], [sums, layers.Dense(3, name="r")(b)], name="inner")
        x = keras.Input((7,))
        ends = inner([layers.Dense(4, name="left")(x), layers.Dense(6, name="right")(x)])
        return keras.Model(x, layers.Dense(2, name="last")(layers.concatenate(ends)))

    model = randomized(make)
    found = channel_families(model)
    assert {frozenset(family.layers): family.size for family in found.families} == {
        frozenset({"left"}): 4,
        frozenset({"right"}): 6,
        frozenset({"inner/p", "inner/q"}): 5,
        frozenset({"inner/r"}): 3,
    }
    for family in found.families:
        set_masks(model, without(model, family, 1))
    smaller, report = shrink(model, return_report=True)
    assert sum(row.before - row.after for row in report) == 5
    expected = outputs(model)
    np.testing.assert_allclose(
        outputs(smaller), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )
