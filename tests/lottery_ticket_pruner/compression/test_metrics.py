"""The metric of a search: by name, its direction, trained models, and comparisons."""

import re

import keras
import numpy as np
import pytest

from lottery_ticket_pruner import prune
from lottery_ticket_pruner.compression import metrics
from lottery_ticket_pruner.compression.metrics import (
    Outcome,
    compare,
    warning_of_constant,
    warning_of_few,
)
from lottery_ticket_pruner.tolerances import Metric, accuracies_of, check_dense, metric_of
from lottery_ticket_pruner.training import evaluate
from small_classifier import DATA, SHORT

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


@pytest.mark.slow("jax")
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


def test_directions_of_several_outputs_are_known():
    inputs = keras.Input((5,))
    outputs = [keras.layers.Dense(1, "sigmoid", name=name)(inputs) for name in ("a", "b_c")]
    model = keras.Model(inputs, outputs)
    metrics = [["accuracy"], ["accuracy", "mae"]]
    model.compile("sgd", ["binary_crossentropy"] * 2, metrics=metrics, jit_compile=False)
    results = evaluate(model, X, [Y, Y])
    assert metric_of(results, model, None, "auto") == Metric("a_accuracy", True)
    assert accuracies_of(results) == ["a_accuracy", "b_c_accuracy"]
    for name, higher in (("b_c_accuracy", True), ("b_c_mae", False), ("b_c_loss", False)):
        assert metric_of(results, model, name, "auto") == Metric(name, higher)


@pytest.mark.parametrize(("tolerance", "least"), [(0.05, 76), (0.02, 196), (0.5, 4)])
def test_too_few_examples_for_a_tolerance_get_a_warning(model, tolerance, least):
    # The smallest standard error of a drop: only the dense model is right where they differ.
    error = [np.sqrt(tolerance * (1 - tolerance) / size) for size in (least - 1, least)]
    assert 2 * error[1] <= tolerance < 2 * error[0]
    x, y = np.resize(X, (least, 5)), np.resize(Y, least)
    metric = Metric("accuracy", True)
    assert warning_of_few(metric, model, (x, y), tolerance) is None
    text = warning_of_few(metric, model, (x[1:], y[1:]), tolerance)
    assert f"One of the {least - 1} validation examples is worth" in text
    assert f"at least {least} examples" in text
    alone = warning_of_few(metric, model, (x[:1], y[:1]), tolerance)
    assert alone.startswith("The validation example is worth 100 points of accuracy.")
    for other, drop in ((Metric("mae", False), tolerance), (metric, None), (metric, -1.0)):
        assert warning_of_few(other, model, (x[1:], y[1:]), drop) is None


@pytest.mark.once
def test_a_dense_accuracy_within_the_tolerance_of_nothing_is_refused():
    accuracy, loss = Metric("accuracy", True), Metric("loss", False)
    with pytest.raises(ValueError, match=r"The test accuracy .* is 0\.1.*so any model would be"):
        check_dense(accuracy, 0.1, "test", 0.1)
    for metric, value in ((accuracy, 0.11), (loss, 0.1), (Metric("auc", True), 0.1)):
        check_dense(metric, value, "test", 0.1)


@pytest.mark.once
def test_a_tolerance_that_accepts_a_constant_prediction_gets_a_warning():
    y = np.array([2, 0, 2, 1, 2])
    forms = y, y[:, None], keras.utils.to_categorical(y)
    for targets in forms:
        text = warning_of_constant(Metric("accuracy", True), 0.7, targets, 0.1)
        assert "has a validation accuracy of 0.6. The dense model has 0.7" in text
        assert warning_of_constant(Metric("accuracy", True), 0.7, targets, 0.09) is None
    assert warning_of_constant(Metric("loss", False), 0.7, y, 0.1) is None
    several = np.ones((5, 3))  # Not one class for each example.
    assert warning_of_constant(Metric("accuracy", True), 0.7, several, 0.1) is None


def test_accuracies_are_compared_example_by_example(model):
    metric = Metric("accuracy", True)
    outcome = Outcome.of(metric, model, (X, Y))
    predicted = model.predict_on_batch(X)[:, 0] > 0.5
    np.testing.assert_array_equal(outcome.correct, predicted == (Y == 1))
    comparison = compare(metric, outcome, outcome, len(X))
    assert comparison.drop == 0
    low, high = comparison.interval
    assert low < 0 < high


@pytest.mark.parametrize(
    ("examples", "why"), [(150, "the same in all 150 groups"), (19, "19 groups .* too few")]
)
def test_an_interval_is_not_claimed_without_grounds(examples, why):
    groups = np.linspace(0, 1, examples)
    outcome = Outcome(0.5, None, groups)
    comparison = compare(Metric("mae", False), outcome, outcome, examples)
    assert comparison.interval is None
    assert re.search(why, str(comparison))


@pytest.mark.slow("jax")
def test_other_means_are_compared_by_groups_and_the_rest_has_no_interval(model):
    metric = Metric("mae", False)
    outcome = Outcome.of(metric, model, (X, Y))
    assert outcome.groups.mean() == pytest.approx(outcome.value, rel=1e-5)
    assert len(outcome.groups) == 150
    other = Outcome(outcome.value + X[:, 0].mean(), None, outcome.groups + X[:, 0])
    low, high = compare(metric, outcome, other, len(X)).interval
    assert low < X[:, 0].mean() < high
    metric = Metric("auc", True)
    outcome = Outcome.of(metric, model, (X, Y))
    comparison = compare(metric, outcome, outcome, len(X))
    assert comparison.interval is None
    assert "auc is not a mean" in str(comparison)


@pytest.mark.once
def test_a_search_that_goes_on_warns_again(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(metrics, "warning_of_constant", lambda *_: "Constant.")
    for _ in range(2):
        with pytest.warns(UserWarning, match="Constant"):
            found = prune(trained, DATA, 0.02, method="one_shot", folder=tmp_path, **SHORT)
        assert found.cautions[-1] == "Constant."
