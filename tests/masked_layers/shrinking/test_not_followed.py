"""Layers that are not followed: their inputs and outputs are left whole and reported."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers.shrinking import channel_families, shrink
from shrunk import (
    assert_same_outputs,
    checked,
    conv_net,
    dense_net,
    inputs_of,
    numpy,
    randomize,
    row,
    swap_halves,
    widths,
    zero,
)

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


@keras.saving.register_keras_serializable("test_not_followed")
class Doubled(layers.Layer):
    def call(self, inputs):
        return inputs * 2.0


@pytest.mark.parametrize(
    "layer",
    [
        layers.UnitNormalization(name="odd"),
        layers.Lambda(swap_halves, output_shape=lambda shape: shape, name="odd"),
        Doubled(name="odd"),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_unknown_layer_keeps_its_inputs_and_outputs_whole(layer):
    x = keras.Input((5,))
    y = layers.Dense(3, "relu", name="far")(x)
    y = layers.Dense(4, "relu", name="near")(y)
    y = layers.Flatten()(layer(y))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    zero(model.get_layer("far"), [0])
    zero(model.get_layer("near"), [0, 1])
    smaller, report = checked(model)
    assert widths(smaller) == {"far": 2, "near": 4, "out": 2}
    assert report.not_followed == {"odd": f"unknown class {type(layer).__name__}"}
    assert row(report, "near").kept == {"'odd', which is left whole, reads it": 2}
    assert "left whole: odd:" in str(report)
    with pytest.warns(UserWarning, match="odd: unknown class"):
        shrink(model)


def test_no_warning_if_all_layers_are_followed():
    model = conv_net(layers.BatchNormalization(), layers.ReLU())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        shrink(model)


def test_attention_without_weights_is_left_whole_and_gates_read_constants():
    x = keras.Input((7, 3))
    y = layers.Conv1D(4, 3, name="c0")(x)
    y = layers.Bidirectional(layers.LSTM(3, return_sequences=True), name="rnn")(y)
    y = layers.Dense(6, "relu", name="d0")(y)
    y = layers.Attention(name="attention")([y, y])
    y = layers.Dense(5, "relu", name="d1")(y)
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    for name in ("c0", "d0", "d1"):
        zero(model.get_layer(name), [0])
    smaller, report = checked(model)
    assert {name: widths(smaller)[name] for name in ("c0", "d0", "d1")} == {
        "c0": 4,
        "d0": 6,
        "d1": 4,
    }
    assert set(report.not_followed) == {"attention"}


def test_layer_without_weights_may_be_called_twice():
    x = keras.Input((5,))
    relu = layers.ReLU()
    y = layers.Dense(3, name="b")(relu(layers.Dense(4, name="a")(x)))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(relu(y))))
    zero(model.get_layer("a"), [1])
    zero(model.get_layer("b"), [1])
    smaller, _ = checked(model)
    assert widths(smaller) == {"a": 3, "b": 2, "out": 2}


def test_call_in_training_mode_is_left_whole():
    x = keras.Input((5,))
    y = layers.BatchNormalization(name="norm")(layers.Dense(4, name="a")(x), training=True)
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [1])
    smaller, report = shrink(model, return_report=True)
    assert smaller.get_layer("a").units == 4
    assert report.not_followed == {"norm": "called with arguments other than tensors"}
    assert_same_outputs(model, smaller)


def test_masked_positions_have_the_same_channels():
    x = keras.Input((5, 3))
    y = layers.Masking()(x)
    y = layers.Dense(4, name="a")(y)
    y = layers.GlobalAveragePooling1D(name="mean")(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 3, "out": 2}
    assert report.not_followed == {}
    data = inputs_of(model)
    data[:, 2:] = 0
    np.testing.assert_allclose(numpy(smaller(data)), numpy(model(data)), rtol=1e-4, atol=1e-5)


def test_a_mask_that_depends_on_channels_keeps_them():
    x = keras.Input((5, 3))
    y = layers.Masking(0.0, name="masking")(layers.Dense(4, "relu", name="a")(x))
    y = layers.Conv1D(3, 1, name="b")(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.Flatten()(y))))
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 4, "b": 3, "out": 2}
    assert report.not_followed["masking"] == "unknown class Masking"
    assert report.not_followed["b"] == "its input carries a Keras mask"


@pytest.mark.parametrize("function", ["softmax", swap_halves])
def test_a_recurrent_layer_whose_activation_mixes_units_is_left_whole(function):
    x = keras.Input((5, 3))
    y = layers.SimpleRNN(4, activation=function, name="rnn")(layers.Dense(4, name="a")(x))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    zero(model.get_layer("a"), [1], bias=True)
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 4
    assert "may mix channels" in report.not_followed["rnn"]


@pytest.mark.parametrize("as_layer", [False, True])
@pytest.mark.parametrize("function", ["softmax", swap_halves])
def test_activation_that_mixes_channels(function, as_layer):
    x = keras.Input((5,))
    if as_layer:
        y = layers.Dense(4, name="a")(x)
        y = layers.Activation(function, name="mix")(y)
    else:
        y = layers.Dense(4, function, name="a")(x)
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 4
    assert row(report, "a").kept
    custom = {"mix" if as_layer else "a": "its activation may mix channels"}
    assert report.not_followed == ({} if function == "softmax" else custom)


def test_dense_over_another_axis_than_the_channels_is_left_whole():
    x = keras.Input((6, 6))
    y = layers.Dense(4, name="a")(x)
    y = layers.BatchNormalization(axis=1, name="norm")(y)
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 4
    assert report.not_followed == {"norm": "works along axis 1, the channels lie along 2"}


def test_unknown_number_of_positions():
    x = keras.Input((None, 3))
    y = layers.Conv1D(4, 3, name="a")(x)
    model = randomize(keras.Model(x, layers.Conv1D(2, 3, name="b")(y)))
    zero(model.get_layer("a"), [1])
    smaller, _ = shrink(model, return_report=True)
    assert smaller.get_layer("a").filters == 3
    data = np.random.default_rng(0).normal(size=(2, 9, 3)).astype("float32")
    np.testing.assert_allclose(numpy(smaller(data)), numpy(model(data)), atol=1e-5)


def test_low_rank_adapted_layer_is_left_whole():
    model = dense_net(4, 3, 2)
    model.layers[1].enable_lora(2)
    randomize(model)
    zero(model.layers[0], [0])
    smaller, report = checked(model)
    assert widths(smaller)["d0"] == 4
    assert report.not_followed == {"d1": "LoRA is enabled"}


def test_preprocessing_layers_keep_their_adapted_state():
    normalization = layers.Normalization(mean=None)
    normalization.adapt(np.random.default_rng(0).normal(3, 5, size=(50, 5)))
    model = keras.Sequential(
        [keras.Input((5,)), normalization, layers.Dense(4, "relu", name="d0"), layers.Dense(2)]
    )
    for layer in model.layers[1:]:
        layer.kernel.assign(np.random.default_rng(0).normal(size=layer.kernel.shape))
    zero(model.layers[1], [2])
    smaller, _ = checked(model)
    assert widths(smaller)["d0"] == 3


@pytest.mark.parametrize(("shape", "followed"), [((None, 1, None), True), ((1, 1, 4), False)])
def test_dropout_that_names_the_number_of_channels(shape, followed):
    x = keras.Input((6, 3))
    y = layers.Dropout(0.5, noise_shape=shape, name="drop")(layers.Dense(4, name="a")(x))
    model = randomize(keras.Model(x, layers.Dense(2)(y)))
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    why = "its `noise_shape` names the number of channels"
    assert report.not_followed == ({} if followed else {"drop": why})
    smaller(np.ones((1, 6, 3)), training=True)


def test_layers_that_share_a_weight_are_left_whole():
    class Transposed(layers.Layer):
        def __init__(self, dense, **kwargs):
            super().__init__(**kwargs)
            self.dense = dense

        def call(self, x):
            return keras.ops.matmul(x, keras.ops.transpose(self.dense.kernel))

    x = keras.Input((5,))
    dense = layers.Dense(4, use_bias=False, name="a")
    y = Transposed(dense, name="back")(layers.ReLU()(dense(x)))
    found = channel_families(keras.Model(x, layers.Dense(2, name="out")(y)))
    why = "it shares a weight with another layer, which a smaller copy would not"
    assert found.not_followed["a"] == why
    assert "back" in found.not_followed
    assert found.families == ()


def test_a_training_step_of_the_model_is_not_carried_over_and_a_warning_says_so():
    class Own(keras.Model):
        def train_step(self, data):
            return {}

    x = keras.Input((4,))
    model = randomize(Own(x, layers.Dense(2)(layers.Dense(3, name="a")(x))))
    with pytest.warns(UserWarning, match=r"train_step of Own .* are not in it"):
        shrink(model)


def test_initializers_that_hold_arrays_do_not_hinder():
    x = keras.Input((5, 3))
    start = keras.initializers.Constant(np.ones((3, 8)))
    y = layers.Bidirectional(layers.SimpleRNN(8, kernel_initializer=start), name="rnn")(x)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    kernel = numpy(model.get_layer("out").kernel)
    kernel[[1, 9]] = 0
    model.get_layer("out").kernel.assign(kernel)
    for direction in ("forward_layer", "backward_layer"):
        zero(getattr(model.get_layer("rnn"), direction).cell, [1], bias=True)
        recurrent = numpy(getattr(model.get_layer("rnn"), direction).cell.recurrent_kernel)
        recurrent[1] = 0
        getattr(model.get_layer("rnn"), direction).cell.recurrent_kernel.assign(recurrent)
    smaller, _ = checked(model)
    assert smaller.get_layer("rnn").forward_layer.units == 7
