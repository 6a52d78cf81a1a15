"""The metric of a search: by name, its direction, trained models, and comparisons."""

import keras
import numpy as np
import pytest

from lottery_ticket_pruner.compression.metrics import (
    Metric,
    Outcome,
    compare,
    metric_of,
)
from lottery_ticket_pruner.training import evaluate

RNG = np.random.default_rng(0)
X = RNG.normal(size=(150, 5)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def make_model(*metrics):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(1, "sigmoid")])
    model.compile("sgd", "binary_crossentropy", metrics=list(metrics), jit_compile=False)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model("mae", "accuracy", keras.metrics.AUC(name="auc"))


def test_the_first_accuracy_is_the_default_and_the_loss_without_one(model):
    results = evaluate(model, X, Y)
    assert metric_of(results, model, None, "auto") == Metric("accuracy", True)
    assert metric_of({"loss": 1.0}, model, None, "auto") == Metric("loss", False)


@pytest.mark.parametrize(
    ("name", "mode", "higher"),
    [("auc", "auto", True), ("mae", "auto", False), ("mae", "max", True), ("loss", "auto", False)],
)
def test_directions_are_those_of_keras(model, name, mode, higher):
    assert metric_of(evaluate(model, X, Y), model, name, mode) == Metric(name, higher)


def test_a_direction_that_is_not_known_must_be_given(model):
    with pytest.raises(ValueError, match='pass mode="max" or mode="min"'):
        metric_of({"loss": 1.0, "own": 1.0}, model, "own", "auto")
    with pytest.raises(ValueError, match="must be one number"):
        metric_of({"per_class": np.ones(3)}, model, "per_class", "max")


def test_accuracies_are_compared_example_by_example(model):
    metric = Metric("accuracy", True)
    outcome = Outcome.of(metric, model, (X, Y))
    predicted = model.predict(X, verbose=0)[:, 0] > 0.5
    np.testing.assert_array_equal(outcome.correct, predicted == (Y == 1))
    comparison = compare(metric, outcome, outcome, len(X))
    assert comparison.drop == 0
    low, high = comparison.interval
    assert low < 0 < high


def test_other_means_are_compared_by_groups_and_the_rest_has_no_interval(model):
    metric = Metric("mae", False)
    outcome = Outcome.of(metric, model, (X, Y))
    assert outcome.groups.mean() == pytest.approx(outcome.value, rel=1e-5)
    assert len(outcome.groups) == 150
    assert compare(metric, outcome, outcome, len(X)).interval == (0, 0)
    metric = Metric("auc", True)
    outcome = Outcome.of(metric, model, (X, Y))
    comparison = compare(metric, outcome, outcome, len(X))
    assert comparison.interval is None
    assert "auc is not a mean" in str(comparison)
