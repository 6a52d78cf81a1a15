"""Hessian products and gradients through layers with statistics, noise, time and attention."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.evidence import hessian_gradients, loss_gradients
from lottery_ticket_pruner.evidence.differentiation import draws_kept, twice_differentiable

RNG = np.random.default_rng(0)
X = RNG.normal(size=(6, 5, 4)) + 0.5
Y = RNG.normal(size=(6, 3))


class Moments(layers.Layer):
    """A custom layer that normalizes by `keras.ops`."""

    def call(self, x):
        mean, variance = ops.moments(x, axes=[0, 1], keepdims=True)
        return (x - mean) / ops.sqrt(variance + 1e-3) * ops.var(x, axis=1, keepdims=True)


# All in one model, which is as strict as a model for each and much faster.
GROUPS = {
    "batch normalization": lambda: [layers.BatchNormalization()],
    "normalizations": lambda: [
        layers.LayerNormalization(),
        layers.GroupNormalization(2),
        layers.RMSNormalization(),
        layers.UnitNormalization(),
        Moments(),
    ],
    "noise": lambda: [
        layers.BatchNormalization(axis=1),
        layers.Dropout(0.3),
        layers.SpatialDropout1D(0.3),
        layers.GaussianNoise(0.3),
    ],
    "recurrent": lambda: [layers.LSTM(4, return_sequences=True, dropout=0.2)],
    "backwards": lambda: [layers.GRU(4, return_sequences=True, go_backwards=True)],
    "attention": lambda: [
        layers.MultiHeadAttention(2, 3, dropout=0.2),
        layers.GroupQueryAttention(3, 4, 2),
    ],
    "convolutions": lambda: [
        layers.Conv1D(4, 3, padding="same", activation="gelu"),
        layers.BatchNormalization(),
        layers.SeparableConv1D(4, 2, padding="same", activation="silu"),
        layers.Conv1DTranspose(4, 2, activation="softplus"),
    ],
    "resizing": lambda: [
        layers.Reshape((5, 4, 1)),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.Activation("tanh"),
        layers.Resizing(5, 5, interpolation="bicubic"),
        layers.Activation("tanh"),
    ],
    "activations": lambda: [
        layers.Dense(4, activation=name)
        for name in ("selu", "mish", "elu", "log_softmax", "softsign", "hard_sigmoid", "squareplus")
    ],
}


# The groups that take longest, and the backends where they do: () are all. On JAX, derivatives need
# no code of each layer.
SLOW = {"backwards": ()} | dict.fromkeys(("convolutions", "normalizations"), ("jax",))
SLOW |= dict.fromkeys(("attention", "recurrent"), ("jax", "tensorflow"))
# Functions that these backends compute in float32 in any case.
IN_FLOAT32 = {("jax", "attention"), ("tensorflow", "resizing")}


def small_model(inner):
    inputs = keras.Input(X.shape[1:])
    x = layers.Dense(4)(inputs)
    for layer in inner:
        attends = isinstance(layer, layers.MultiHeadAttention | layers.GroupQueryAttention)
        x = layer(x, x) if attends else layer(x)
    model = keras.Model(inputs, layers.Dense(3)(layers.Flatten()(x)))
    model = ml.convert_to_masked(model)
    model.compile("sgd", "mse")
    return model


def kernels(model):
    return {ref.path: ref.variable for ref in ml.masked_refs(model)}


def effective(model):
    masks = ml.get_masks(model)
    return {
        path: np.where(masks[path], ops.convert_to_numpy(kernel), 0)
        for path, kernel in kernels(model).items()
    }


def assign(model, weights, step, direction):
    for path, kernel in kernels(model).items():
        kernel.assign(weights[path] + step * direction[path])


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow(*SLOW[n])] if n in SLOW else []) for n in GROUPS],
)
def test_first_and_second_derivatives_agree_with_differences(name):
    with _keras.double_precision():
        model = small_model(GROUPS[name]())
        found = loss_gradients(model, X, Y)
        products = hessian_gradients(model, X, Y)

        weights = effective(model)
        norm = np.sqrt(sum((gradient**2).sum() for gradient in found.values()))
        seeds = _keras.seed_variables(model)
        before = [np.array(ops.convert_to_numpy(seed)) for seed in seeds]
        # On torch, layers without a seed draw from its own generator, which must not change.
        coarse = (keras.backend.backend(), name) in IN_FLOAT32
        size, tolerance = (3e-3, 1e-3) if coarse else (1e-4, 1e-5)
        step, losses, gradients = size / norm, [], []
        for sign in (1, -1):
            assign(model, weights, sign * step, found)
            gradients.append(loss_gradients(model, X, Y))
            with draws_kept():
                outputs = ops.convert_to_numpy(ops.stop_gradient(model(X, training=True)))
            losses.append(np.mean((outputs - Y) ** 2))
            for seed, value in zip(seeds, before, strict=True):
                seed.assign(value)
        np.testing.assert_allclose((losses[0] - losses[1]) / (2 * step), norm**2, rtol=tolerance)
        differences = {
            path: (gradients[0][path] - gradients[1][path]) / (2 * step) for path in found
        }
        largest = max(np.abs(difference).max() for difference in differences.values())
        for path, difference in differences.items():
            np.testing.assert_allclose(products[path], difference, atol=tolerance * largest)


@pytest.mark.once("torch")
def test_noise_of_torch_is_the_same_in_every_pass_and_drawn_again_afterwards():
    import torch

    model = small_model([layers.Dropout(0.5)])
    before = torch.get_rng_state()
    one, other = (hessian_gradients(model, X, Y) for _ in range(2))
    for path in one:
        np.testing.assert_array_equal(one[path], other[path])
    assert torch.equal(torch.get_rng_state(), before)


@keras.saving.register_keras_serializable("tests")
class Once(layers.Layer):
    """Contains an operation whose second derivative its backend does not support."""

    def call(self, x):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            return tf.nn.local_response_normalization(x[..., None])[..., 0]
        import torch

        flat = x.reshape(-1, 4)
        classes = torch.zeros(len(flat), dtype=torch.int64, device=x.device)
        loss = torch.nn.functional.multi_margin_loss(flat, classes, reduction="none")
        return x * loss.reshape(-1, 5, 1)


@pytest.mark.once("tensorflow", "torch")
def test_an_operation_without_a_second_derivative_is_named():
    model = small_model([Once()])
    assert loss_gradients(model, X, Y)
    with pytest.raises(ValueError, match=r"(LRNGrad|multi_margin_loss_backward).*\"snip\""):
        hessian_gradients(model, X, Y)


@pytest.mark.once
def test_functions_that_tensorflow_differentiates_only_once():
    tf = pytest.importorskip("tensorflow")
    x = tf.constant([1.0, 2.0, 4.0])

    def hessian_of_the_variance():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                variance = ops.moments(x, axes=[0])[1]
            slope = inner.gradient(variance, x)
        return outer.jacobian(slope, x).numpy()

    exact = 2 / 3 * (np.eye(3) - 1 / 3)
    before = tf.nn.moments
    # If this fails, TensorFlow or Keras has fixed it, and the override can be removed.
    assert np.abs(hessian_of_the_variance() - exact).max() > 0.1
    with twice_differentiable(small_model([])):
        np.testing.assert_allclose(hessian_of_the_variance(), exact, atol=1e-6)
        for shape, keepdims in (((4,), False), ((1, 4), True)):
            for mine, theirs in zip(
                tf.nn.moments(tf.reshape(tf.range(12.0), (3, 4)), [0], keepdims=keepdims),
                before(tf.reshape(tf.range(12.0), (3, 4)), [0], keepdims=keepdims),
                strict=True,
            ):
                assert mine.shape == theirs.shape == shape
                np.testing.assert_allclose(mine, theirs)
        assert [each.dtype for each in tf.nn.moments(tf.cast(x, "float16"), [0])] == [tf.half] * 2
    assert tf.nn.moments is before
