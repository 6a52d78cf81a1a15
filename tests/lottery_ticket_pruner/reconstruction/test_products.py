"""Layers as matrix products, against what Keras computes; solutions against numpy's lstsq."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner.reconstruction import least_squares, product_of
from lottery_ticket_pruner.reconstruction.least_squares import solve

RNG = np.random.default_rng(0)

LAYERS = [
    (layers.Dense(3), (4,)),
    (layers.Dense(3, use_bias=False), (5, 2, 4)),
    (layers.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de"), (5, 4)),
    (layers.EinsumDense("abcd,cde->abe", (None, 3), bias_axes="e"), (5, 2, 4)),
    (layers.EinsumDense("abc,bcd->abd", (2, 3), bias_axes="bd"), (2, 4)),
    (layers.EinsumDense("abc,bcd->adb", (3, 2), bias_axes="db"), (2, 4)),
    (layers.EinsumDense("abc,cd->ad", (3,), bias_axes="d"), (2, 4)),
    (layers.EinsumDense("...x,yx->...y", (5, 3), bias_axes="y"), (5, 4)),
    (layers.EinsumDense("ab...,bc->ac...", (3, 5), bias_axes="c"), (4, 5)),
    (layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (9, 4)),
    (layers.Conv1D(3, 2, strides=2, padding="same"), (9, 4)),
    (layers.Conv2D(4, (3, 2), strides=2, padding="same", groups=2), (6, 7, 4)),
    (layers.Conv2D(3, 3, dilation_rate=(2, 1), use_bias=False), (7, 6, 2)),
    (layers.Conv2D(3, 2, padding="same"), (5, 4, 2)),
    (layers.Conv3D(3, 2, strides=(1, 2, 1)), (4, 5, 3, 2)),
    (layers.DepthwiseConv2D((2, 3), depth_multiplier=2, padding="same"), (5, 6, 3)),
    (layers.DepthwiseConv1D(3, strides=2, padding="same"), (7, 3)),
]


def names(layer):
    return f"{type(layer).__name__} {getattr(layer, 'equation', '')}"


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=[names(layer) for layer, _ in LAYERS])
def test_the_product_is_what_the_layer_computes(layer, shape):
    x = RNG.normal(size=(3, *shape)).astype("float32")
    y = keras.ops.convert_to_numpy(layer(x))
    layer.set_weights([RNG.normal(size=w.shape) for w in layer.get_weights()])
    y = keras.ops.convert_to_numpy(layer(x))
    product = product_of(layer)
    kernel = layer.get_weights()[0]
    matrix = product.matrix(kernel)
    np.testing.assert_array_equal(product.kernel(matrix), kernel)
    outputs = np.concatenate([rows @ matrix for rows in product.rows(x)], axis=1)
    if product.biased:
        bias = layer.get_weights()[1]
        outputs = outputs + product.bias_matrix(bias)
        restored = product.bias(product.bias_matrix(bias))
        np.testing.assert_array_equal(restored.reshape(bias.shape), bias)
    # The rows are in an order of their own, but each output is one of the numbers.
    np.testing.assert_allclose(np.sort(outputs.ravel()), np.sort(y.ravel()), atol=1e-4)


def test_a_bias_that_is_not_one_per_column_is_left():
    layer = layers.EinsumDense("abc,cd->abd", (2, 3), bias_axes="bd")
    layer(np.zeros((1, 2, 4)))
    assert not product_of(layer).biased


@pytest.mark.once
def test_other_layers_are_not_products():
    class Own(layers.Dense):
        def call(self, inputs):
            return keras.ops.matmul(keras.ops.square(inputs), self.kernel)

    for layer, shape in [
        (Own(2), (3, 4)),
        (layers.Conv1DTranspose(2, 3), (3, 4)),
        (layers.SeparableConv1D(2, 3), (3, 4)),
        (layers.LSTM(2).cell, (4,)),
        (layers.EinsumDense("aab,bc->aac", (4, 2)), (4, 3)),
    ]:
        layer.build((4, *shape))
        assert product_of(layer) is None, layer


def test_each_column_is_the_least_squares_solution_over_its_kept_inputs(monkeypatch):
    x, r = RNG.normal(size=(50, 12)), RNG.normal(size=(50, 7))
    mask = RNG.random((12, 7)) < 0.5
    mask[:, 2] = False
    mask[:, 3] = mask[:, 4]
    gram, moments = x.T @ x, x.T @ r
    exact = solve(gram, moments, mask)
    monkeypatch.setattr(least_squares, "_EXACT", 0)
    monkeypatch.setattr(least_squares, "_COLUMNS", 3)
    for found in (exact, solve(gram, moments, mask)):
        assert not found[~mask].any()
        for column in range(7):
            rows = mask[:, column]
            best = np.linalg.lstsq(x[:, rows], r[:, column], rcond=None)[0]
            np.testing.assert_allclose(found[rows, column], best, atol=2e-4)


def test_conjugate_gradients_stop_in_between_without_harm(monkeypatch):
    x, r = RNG.normal(size=(60, 40)) @ np.diag(np.logspace(0, 3, 40)), RNG.normal(size=(60, 5))
    mask = RNG.random((40, 5)) < 0.5
    errors = []
    monkeypatch.setattr(least_squares, "_EXACT", 0)
    for steps in (0, 1, 3, 10, 50):
        monkeypatch.setattr(least_squares, "_ITERATIONS", steps)
        found = solve(x.T @ x, x.T @ r, mask)
        errors.append(np.square(x @ found - r).sum())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_masked_kernels_have_the_product_of_their_layer():
    model = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    (ref,) = ml.masked_refs(model)
    assert product_of(ref.layer).matrix(np.ones((4, 3))).shape == (1, 4, 3)
