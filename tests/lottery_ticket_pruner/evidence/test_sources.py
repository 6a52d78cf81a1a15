"""Measurements for criteria that rank by more than recorded weights."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from lottery_ticket_pruner.evidence import hessian_gradients, loss_gradients

RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 6)).astype("float32")
Y = RNG.integers(0, 3, size=12)
NAMES = [name for name in criteria.names() if criteria.get(name).evidence]


def moved():
    hidden = layers.Dense(8, activation="relu", name="hidden")
    net = [keras.Input((6,)), hidden, layers.BatchNormalization(), layers.Dense(3, name="head")]
    model = ml.convert_to_masked(keras.Sequential(net))
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    pruner = LotteryTicketPruner(model)
    model.set_weights([w + RNG.normal(size=w.shape, scale=0.3) for w in model.get_weights()])
    pruner.set_pretrained_weights()
    return model, pruner


def raw(model):
    return {
        ref.path: keras.ops.convert_to_numpy(ref.variable).copy() for ref in ml.masked_refs(model)
    }


def test_counts_are_exact_and_nothing_but_the_masks_changes():
    model, pruner = moved()
    model.fit(X, Y, verbose=0)
    pruner.set_pretrained_weights()
    variables = [*model.variables, *model.optimizer.variables, *model.metrics_variables]
    masks = {id(ref.mask.value) for ref in ml.masked_refs(model)}
    others = [variable for variable in variables if id(variable) not in masks]
    before = [keras.ops.convert_to_numpy(variable).copy() for variable in others]
    for name in NAMES:
        pruner.reset_masks()
        with warnings.catch_warnings(action="ignore"):
            report = pruner.update_masks(name, sparsity=0.5, data=(X, Y))
        assert report.alive == 36, name  # half of 48 and of 24, in every scope
        for variable, old in zip(others, before, strict=True):
            np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)


@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("snip", lambda weight, gradient, product: np.abs(weight * gradient)),
        ("grasp", lambda weight, gradient, product: weight * product),
        ("gradient", lambda weight, gradient, product: np.abs(gradient)),
    ],
)
def test_the_highest_scores_of_the_whole_model_stay(name, score):
    model, pruner = moved()
    weights, slopes = raw(model), loss_gradients(model, X, Y)
    products = hessian_gradients(model, X, Y)
    scores = {path: score(weights[path], slopes[path], products[path]) for path in weights}
    report = pruner.update_masks(name, sparsity=0.75, scope="global", data=(X, Y))
    assert report.alive == 18
    threshold = np.sort(np.concatenate([array.ravel() for array in scores.values()]))[-18]
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, scores[path] >= threshold)


def test_saliency_is_that_of_the_final_weights_wherever_the_model_is():
    model, pruner = moved()
    final, slopes = raw(model), loss_gradients(model, X, Y)
    pruner.rewind()
    initial = raw(model)
    pruner.update_masks("saliency", sparsity=0.5, data=(X, Y))
    for path, mask in ml.get_masks(model).items():
        scores = np.abs(final[path] * slopes[path])
        np.testing.assert_array_equal(mask, scores >= np.sort(scores.ravel())[scores.size // 2])
        np.testing.assert_array_equal(raw(model)[path], initial[path])


def test_weights_of_examples_count():
    model, pruner = moved()
    pruner.update_masks("snip", sparsity=0.5, data=(X, Y, np.eye(12)[3]))
    alone = ml.get_masks(model)
    pruner.reset_masks()
    pruner.update_masks("snip", sparsity=0.5, data=(X, Y))
    assert any((mask != alone[path]).any() for path, mask in ml.get_masks(model).items())


def test_evidence_is_measured_again_in_every_round(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
    seen = []

    @criteria.register("slow_snip", needs={"current", "gradient"}, scope="global", rounds=3)
    def slow_snip(group):
        seen.append(group.gradient.copy())
        return np.abs(group.gradient * group.current)

    _, pruner = moved()
    assert pruner.update_masks("slow_snip", sparsity=0.9, data=(X, Y)).alive == 72 - 64
    assert len(seen) == 3
    assert not np.array_equal(seen[0], seen[1])
    assert not np.array_equal(seen[1], seen[2])


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, number):
        rows = slice(number * 4, number * 4 + 4)
        return X[rows], Y[rows]


@pytest.mark.once
@pytest.mark.parametrize("name", ["snip", "wanda"])
def test_a_data_set_of_batches_stands_for_its_arrays(name):
    model, pruner = moved()
    pruner.update_masks(name, sparsity=0.5, data=(X, Y))
    expected = ml.get_masks(model)
    pruner.reset_masks()
    pruner.update_masks(name, sparsity=0.5, data=Batches())
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, expected[path])


@pytest.mark.once
def test_missing_data_are_asked_for():
    model, pruner = moved()
    before = ml.get_masks(model)
    for name in ("snip", "grasp", "gradient", "saliency"):
        for data in (None, X):
            with pytest.raises(ValueError, match=rf"{name!r}.*update_masks\(\.\.\., data=\(x, y\)"):
                pruner.update_masks(name, sparsity=0.5, data=data)
    with pytest.raises(ValueError, match=r"'wanda'.*data=x"):
        pruner.update_masks("wanda", sparsity=0.5)
    with pytest.raises(ValueError, match="tuple of 4 parts"):
        pruner.update_masks("wanda", sparsity=0.5, data=(X, Y, Y, Y))
    for old, new in zip(before.values(), ml.get_masks(model).values(), strict=True):
        np.testing.assert_array_equal(new, old)


def test_a_gradient_that_is_not_finite_is_an_error_that_names_the_weight():
    _, pruner = moved()
    with pytest.raises(ValueError, match=r"gradient values of '.*' contain NaN"):
        pruner.update_masks("snip", sparsity=0.5, data=(np.full_like(X, np.nan), Y))
