"""Idioms of plain Keras on converted models, and the way back to plain models."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import data, half_masks, numpy
from conversions import assert_equal_outputs, three_layers


def test_weights_are_those_of_the_plain_model(tmp_path):
    plain = three_layers()
    masked = ml.convert_to_masked(plain)
    half_masks(masked)
    masks = ml.get_masks(masked)
    initial = masked.get_weights()
    assert masked.count_params() == plain.count_params()
    masked.set_weights([w + 1 for w in plain.get_weights()])
    masked.set_weights(initial)
    plain.set_weights([w * 2 for w in plain.get_weights()])
    plain.save_weights(tmp_path / "plain.weights.h5")
    masked.load_weights(tmp_path / "plain.weights.h5")
    for a, b in zip(masked.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for path, mask in ml.get_masks(masked).items():
        np.testing.assert_array_equal(mask, masks[path])


def test_weights_of_a_masked_model_load_with_their_masks(tmp_path):
    masked = ml.convert_to_masked(three_layers())
    half_masks(masked)
    masked.save_weights(tmp_path / "m.weights.h5")
    again = ml.convert_to_masked(three_layers())
    again.load_weights(tmp_path / "m.weights.h5")
    assert_equal_outputs(masked, again, data(3, 4))


def test_clone_model_of_a_masked_model():
    masked = ml.convert_to_masked(three_layers())
    clone = keras.models.clone_model(masked)
    assert list(ml.get_masks(clone)) == list(ml.get_masks(masked))


def test_stripped_model_is_plain_keras_with_positive_zeros():
    masked = ml.convert_to_masked(three_layers())
    masked.set_weights([-abs(w) for w in masked.get_weights()])
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    for layer in stripped.layers:
        assert type(layer) is layers.Dense
    for path, mask in ml.get_masks(masked).items():
        kernel = stripped.get_layer(path.split("/")[0]).get_weights()[0]
        assert not kernel[~mask].any()
        assert not np.signbit(kernel[~mask]).any()
    # The masked model keeps its raw values and continues as before.
    assert all((w[w != 0] < 0).all() for w in masked.get_weights())


def test_stripping_folds_the_rescaling_in_once():
    masked = ml.convert_to_masked(three_layers())
    half_masks(masked)
    for ref in ml.masked_refs(masked):
        ref.mask.rescale = True
    assert_equal_outputs(masked, ml.strip_masks(masked), data(3, 4))


def test_stripped_model_quantizes_and_keeps_its_zeros():
    masked = ml.convert_to_masked(
        keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(4)])
    )
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    stripped.quantize("int8")
    assert stripped.layers[0].dtype_policy.quantization_mode == "int8"
    keep = ml.get_masks(masked)["dense/kernel"]
    assert not numpy(stripped.layers[0]._kernel)[~keep].any()


def test_stripped_layers_made_by_hand_quantize_too():
    model = keras.Sequential([keras.Input((8,)), ml.MaskedDense(16), ml.MaskedDense(4)])
    half_masks(model)
    stripped = ml.strip_masks(model)
    stripped.quantize("int8")
    assert stripped.layers[1].dtype_policy.quantization_mode == "int8"


def test_regularizers_and_constraints_come_back_plain():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_regularizer="l2", kernel_constraint="non_neg"),
        ]
    )
    stripped = ml.strip_masks(ml.convert_to_masked(model))
    kernel = stripped.layers[0].kernel
    assert type(kernel.regularizer) is keras.regularizers.L2
    assert type(kernel.constraint) is keras.constraints.NonNeg


def test_stripping_folds_lora_in():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(7, 4), layers.Conv1D(3, 2)]
    )
    for layer in model.layers:
        layer.enable_lora(2)
        for variable in layer.trainable_variables:
            variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    masked = ml.convert_to_masked(model)
    tokens = np.arange(6)[None]
    assert_equal_outputs(model, masked, tokens)
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    assert_equal_outputs(masked, stripped, tokens)
    for name, layer in (("embeddings", stripped.layers[0]), ("kernel", stripped.layers[1])):
        keep = ml.get_masks(masked)[f"{layer.name.rsplit('_', 1)[0]}/{name}"]
        assert not numpy(getattr(layer, name))[~keep].any()


def test_weights_that_cannot_be_stripped_are_refused():
    class Centered(layers.Dense):
        @property
        def kernel(self):
            return self._kernel - ops.mean(self._kernel, axis=0)

    class Twice(ml.MaskedDense):
        def call(self, x):
            return 2 * super().call(x)

    derived = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), Centered(3)]))
    by_hand = keras.Sequential([keras.Input((4,)), Twice(3)])
    for model, reason in ((derived, "Centered computes 'kernel'"), (by_hand, "Twice derives")):
        half_masks(model)
        before = numpy(model(data(2, 4)))
        for inplace in (False, True):
            with pytest.raises(ValueError, match=reason):
                ml.strip_masks(model, inplace=inplace)
        np.testing.assert_array_equal(numpy(model(data(2, 4))), before)
