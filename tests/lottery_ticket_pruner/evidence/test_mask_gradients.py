"""RigL's growth and the scores of learned masks in a network, against NumPy in float64."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import DynamicSparseTraining, LotteryTicketPruner, _keras

RNG = np.random.default_rng(11)
X = RNG.normal(size=(7, 5))
Y = RNG.normal(size=(7, 2))
STEP = 1e-5


@pytest.fixture
def float64():
    with _keras.double_precision():
        yield


def make(activation="tanh", **kwargs):
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(6, activation=activation, name="a"),
            layers.Dense(2, name="b"),
        ]
    )
    model = ml.convert_to_masked(model, **kwargs)
    model.compile("sgd", "mse")
    return model


def numpy(tensor):
    return np.array(ops.convert_to_numpy(tensor), "float64")


def mean_squared_error(kernels, biases):
    hidden = np.tanh(X @ kernels[0] + biases[0])
    return np.mean((hidden @ kernels[1] + biases[1] - Y) ** 2)


@pytest.mark.usefixtures("float64")
def test_rigl_grows_the_pruned_weights_of_largest_finite_differences():
    model = make()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.6)
    before = ml.get_masks(model)
    effective = [numpy(layer.kernel) for layer in model.layers]
    biases = [numpy(layer.bias) for layer in model.layers]
    differences = []
    for number, kernel in enumerate(effective):
        slopes = np.zeros_like(kernel)
        for index in np.ndindex(kernel.shape):
            around = []
            for sign in (1, -1):
                kernels = [array.copy() for array in effective]
                kernels[number][index] += sign * STEP
                around.append(mean_squared_error(kernels, biases))
            slopes[index] = (around[0] - around[1]) / (2 * STEP)
        differences.append(slopes)
    rewiring = DynamicSparseTraining(
        pruner, 100, data=(X, Y), batch_size=len(X), fraction=0.5, frequency=10
    )
    assert rewiring.advance(10)
    moving = rewiring.moving_share(10)
    for (path, after), weights, slopes in zip(
        ml.get_masks(model).items(), effective, differences, strict=True
    ):
        alive = before[path]
        count = int(moving * alive.sum() + 1e-9)
        order = np.argsort(np.where(alive, np.abs(weights), np.inf), axis=None)
        dropped = np.zeros(alive.size, bool)
        dropped[order[:count]] = True
        dropped = dropped.reshape(alive.shape)
        # Pruned weights may grow again at once.
        free = ~alive | dropped
        grown = after & free
        assert grown.sum() == count > 0
        np.testing.assert_array_equal(after & ~free, alive & ~dropped)
        least = np.abs(slopes[grown]).min()
        assert least >= np.abs(slopes[free & ~grown]).max()


@pytest.mark.parametrize("kind", ["edge_popup", "bernoulli"])
def test_scores_in_a_network_have_the_gradients_of_the_papers(kind):
    """Edge-popup: dL/dI_v w_uv Z_u, times the sign of the score, as abs(score) is ranked.

    Bernoulli: the same times p (1 - p), the derivative of the probability. I_v is the input of a
    unit before its activation, Z_u the output of the previous unit (arXiv 1911.13299, section 3;
    1905.01067, section 5.1).
    """
    mask = ml.EdgePopupMask(sparsity=0.5) if kind == "edge_popup" else ml.BernoulliMask()
    model = make("relu", mask=mask)
    scores = []
    for ref in ml.masked_refs(model):
        scores.append(RNG.normal(size=ref.variable.shape))
        ref.mask.scores.assign(scores[-1])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    for layer in model.layers:
        layer.bias.assign(RNG.normal(size=layer.bias.shape))
    raw = [numpy(ref.variable) for ref in ml.masked_refs(model)]
    biases = [numpy(layer.bias) for layer in model.layers]
    rank = [np.abs(s) if kind == "edge_popup" else s for s in scores]
    keep = [r >= (np.median(r) if kind == "edge_popup" else 0) for r in rank]
    effective = [k * w for k, w in zip(keep, raw, strict=True)]
    inner = X @ effective[0] + biases[0]
    hidden = np.maximum(inner, 0)
    outer = 2 * (hidden @ effective[1] + biases[1] - Y) / Y.size  # dL/dI of the outputs
    entering = [(outer @ effective[1].T) * (inner > 0), outer]
    expected = []
    for leaving, slope, w, s in zip([X, hidden], entering, raw, scores, strict=True):
        p = 1 / (1 + np.exp(-s))
        through = np.sign(s) if kind == "edge_popup" else p * (1 - p)
        expected.append((leaving.T @ slope) * w * through)
    if kind == "bernoulli":  # Training samples the mask, but the mask used here is not sampled.
        for ref in ml.masked_refs(model):
            vars(ref.mask)["draws_now"] = lambda: False
    model.fit(X, Y, batch_size=len(X), epochs=1, verbose=0)
    for ref, before, gradient in zip(ml.masked_refs(model), scores, expected, strict=True):
        moved = before - numpy(ref.mask.scores)
        np.testing.assert_allclose(moved, gradient, rtol=1e-3, atol=2e-6)
        assert np.abs(gradient).max() > 1e-3
