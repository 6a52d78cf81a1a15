"""Weights of masked layers are set like those of plain layers: `layer.kernel.assign(...)`."""

import copy
import io

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)


def masked(*inner, shape=(5, 4)):
    model = ml.convert_to_masked(keras.Sequential([keras.Input(shape), *inner]))
    masks = ml.get_masks(model)
    ml.set_masks(model, {path: RNG.random(mask.shape) < 0.5 for path, mask in masks.items()})
    return model


@pytest.mark.parametrize(
    ("layer", "owner", "name"),
    [
        (layers.Dense(3), "", "kernel"),
        (layers.Conv1D(3, 2), "", "kernel"),
        (layers.SeparableConv1D(3, 2), "", "depthwise_kernel"),
        (layers.EinsumDense("abc,cd->abd", (None, 3)), "", "kernel"),
        (layers.LSTM(2), "cell", "recurrent_kernel"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_assigning_writes_the_raw_weight(layer, owner, name):
    model = masked(layer)
    ref = next(ref for ref in ml.masked_refs(model) if ref.name == name)
    holder = getattr(model.layers[0], owner) if owner else model.layers[0]
    assert holder is ref.layer
    x = RNG.normal(size=(2, 5, 4)).astype("float32")
    model.predict_on_batch(x)  # Compiled before.
    weight, mask = getattr(holder, name), ref.mask.to_numpy()
    raw = np.array(ops.convert_to_numpy(ref.variable))
    value = RNG.normal(size=raw.shape).astype("float32")

    def check(expected):
        np.testing.assert_allclose(ops.convert_to_numpy(ref.variable), expected, rtol=1e-6)
        effective = ops.convert_to_numpy(getattr(holder, name))
        np.testing.assert_allclose(effective, np.where(mask, expected, 0), rtol=1e-6)
        oracle = ml.strip_masks(model)
        np.testing.assert_allclose(
            model.predict_on_batch(x), ops.convert_to_numpy(oracle(x)), rtol=1e-4, atol=1e-5
        )

    weight.assign(value)
    check(value)
    weight.assign_add(np.ones_like(value))
    check(value + 1)
    getattr(holder, name).assign_sub(value)
    check(np.ones_like(value))
    weight.assign(getattr(holder, name) * 2)  # From effective weights.
    check(np.where(mask, 2, 0) * np.ones_like(value))
    assert weight.path == ref.variable.path
    assert weight.trainable


def test_a_wrong_shape_is_refused_as_by_a_variable():
    layer = masked(layers.Dense(3)).layers[0]
    with pytest.raises(ValueError, match="shape"):
        layer.kernel.assign(np.ones((2, 2), "float32"))


def test_the_effective_weight_is_an_untracked_tensor():
    model = masked(layers.Dense(3))
    layer = model.layers[0]
    assert ops.is_tensor(layer.kernel)
    assert not isinstance(layer.kernel, keras.Variable)
    other = layers.Dense(3)
    other.borrowed = layer.kernel
    assert other.weights == []
    for copied in (copy.deepcopy(ops.stop_gradient(layer.kernel)), layer.kernel + 0):
        np.testing.assert_array_equal(
            ops.convert_to_numpy(copied), ops.convert_to_numpy(layer.kernel)
        )


def test_inside_a_call_the_effective_weight_is_a_plain_tensor():
    seen = []

    @keras.saving.register_keras_serializable("test_masked_assign")
    class Reading(layers.Dense):
        def call(self, x):
            seen.append(hasattr(self.kernel, "assign"))
            return super().call(x)

    model = masked(Reading(3))
    seen.clear()
    model(np.ones((1, 5, 4), "float32"))
    assert seen == [False]
    assert hasattr(model.layers[0].kernel, "assign")


@pytest.mark.once
def test_in_a_function_of_tensorflow():
    import tensorflow as tf

    layer = masked(layers.Dense(3)).layers[0]

    @tf.function
    def double():
        layer.kernel.assign(layer.kernel * 2)

    before = layer.kernel.numpy()
    double()
    double()
    np.testing.assert_allclose(layer.kernel.numpy(), 4 * before, rtol=1e-6)


@pytest.mark.once("jax")
def test_traced_by_jax():
    import jax

    layer = masked(layers.Dense(3)).layers[0]
    read = jax.jit(lambda: layer.kernel * 2)
    np.testing.assert_allclose(read(), 2 * layer.kernel, rtol=1e-6)

    @jax.jit
    def assigned(value):
        with keras.StatelessScope() as scope:
            layer.bias.assign(value)
        return scope.get_current_value(layer.bias)

    np.testing.assert_array_equal(assigned(np.ones(3, "float32")), np.ones(3))


@pytest.mark.once("torch")
def test_saved_by_torch():
    import torch

    layer = masked(layers.Dense(3)).layers[0]
    file = io.BytesIO()
    torch.save(layer.kernel, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded), ops.convert_to_numpy(layer.kernel))
    ops.sum(layer.kernel * 2).backward()
    mask = layer.kernel_mask.to_numpy()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer._kernel.value.grad), 2.0 * mask)
