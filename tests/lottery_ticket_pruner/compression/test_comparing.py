"""Comparisons of models on the same examples, against metrics computed in NumPy."""

import keras
import numpy as np
import pytest

import lottery_ticket_pruner
import masked_layers as ml
from lottery_ticket_pruner.compression import comparing

RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, 4)).astype("float32")


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    """Leaves out the export, which a test of the command checks, and long measurements."""

    def export(*_):
        raise ImportError("left out")

    monkeypatch.setattr(ml, "export_sparse_saved_model", export)
    monkeypatch.setattr(comparing, "_ROUNDS", (2, 2))


def linear(kernel, activation=None):
    layer = keras.layers.Dense(kernel.shape[1], activation, use_bias=False)
    model = keras.Sequential([keras.Input((len(kernel),)), layer])
    model.set_weights([kernel.astype("float32")])
    return model


def rows_of(models, y, **options):
    found = lottery_ticket_pruner.compare(models, (X, y), **options)
    return found, {row["model"]: row for row in found.rows}


def test_classes_are_compared_example_by_example():
    exact, noisy = np.eye(4), np.eye(4) + RNG.normal(size=(4, 4)) / 2
    y = X.argmax(-1)
    masked = ml.convert_to_masked(linear(noisy))
    mask = np.abs(noisy) > np.median(np.abs(noisy))
    ml.set_masks(masked, dict.fromkeys(ml.get_masks(masked), mask))
    models = {"exact": linear(exact), "noisy": linear(noisy), "masked": masked}
    found, rows = rows_of(models, y)
    assert (found.metric, found.examples) == ("accuracy", 300)
    assert (rows["exact"]["value"], rows["exact"]["difference"]) == (1.0, 0.0)
    assert rows["exact"]["low"] is None
    for name, kernel in (("noisy", noisy), ("masked", noisy * mask)):
        row = rows[name]
        right = np.mean((X @ kernel.astype("float32")).argmax(-1) == y)
        assert row["value"] == pytest.approx(right)
        assert row["agreement"] == pytest.approx(right)  # The first one is always right.
        assert row["low"] < row["difference"] < row["high"] < 0
        assert row["fast"] <= row["milliseconds"] <= row["slow"]
    assert (rows["masked"]["sparsity"], rows["masked"]["weights"]) == (0.5, 8)
    assert rows["masked"]["nbytes"] is None
    assert "masked has no size for serving: ImportError: left out" in found.notes
    lines = str(found).splitlines()
    assert lines[0].split()[:3] == ["model", "accuracy", "difference"]
    assert "bytes" not in lines[0]
    assert lines[2].startswith("noisy")
    assert f"{rows['noisy']['value']:.2%}" in lines[2]


@pytest.mark.once
def test_targets_of_other_forms():
    kernel = RNG.normal(size=(4, 3))
    labels = (X @ kernel.astype("float32")).argmax(-1)
    labels[:30] = (labels[:30] + 1) % 3
    for y in (labels, labels[:, None], np.eye(3)[labels].astype("float32")):
        _, rows = rows_of({"only": linear(kernel)}, y)
        assert rows["only"]["value"] == pytest.approx(0.9)
    column = RNG.normal(size=(4, 1))
    flags = (X @ column.astype("float32") > 0).astype("int32")
    flags[:60] = 1 - flags[:60]
    for activation in (None, "sigmoid"):
        found, rows = rows_of({"only": linear(column, activation)}, flags)
        assert found.metric == "accuracy"
        assert rows["only"]["value"] == pytest.approx(0.8)
    tokens = keras.Sequential([keras.Input((4,)), keras.layers.Reshape((4, 1))])
    tokens.add(keras.layers.Dense(2, use_bias=False))
    tokens.set_weights([np.float32([[-1, 1]])])
    signs = (X > 0).astype("int32")
    signs[:, 0] = 0
    _, rows = rows_of({"tokens": tokens}, signs)
    assert rows["tokens"]["value"] == pytest.approx(np.mean(signs == (X > 0)))


@pytest.mark.once
def test_numbers_are_compared_by_squared_errors():
    kernel, other = RNG.normal(size=(4, 2)), RNG.normal(size=(4, 2))
    y = X @ kernel.astype("float32") + RNG.normal(size=(300, 2)).astype("float32")
    found, rows = rows_of({"one": linear(kernel), "same": linear(kernel), "two": linear(other)}, y)
    errors = [((X @ k.astype("float32") - y) ** 2).mean(-1) for k in (kernel, other)]
    assert found.metric == "mean squared error"
    assert rows["one"]["value"] == pytest.approx(errors[0].mean(), rel=1e-5)
    assert rows["two"]["difference"] == pytest.approx((errors[1] - errors[0]).mean(), rel=1e-5)
    # The interval of a mean of 300 differences is about that of the normal distribution.
    half = 1.96 * (errors[1] - errors[0]).std() / np.sqrt(300)
    assert rows["two"]["low"] == pytest.approx(rows["two"]["difference"] - half, rel=0.2)
    assert rows["two"]["high"] == pytest.approx(rows["two"]["difference"] + half, rel=0.2)
    assert (rows["same"]["difference"], rows["same"]["low"]) == (0.0, None)
    assert "No interval for same: the difference is the same everywhere." in found.notes
    assert rows["two"]["agreement"] is None


@pytest.mark.once
def test_scores_that_are_nan_predict_no_class():
    y, scores = np.zeros(300, "int32"), np.eye(4)
    scores[0, 0] = np.nan
    found, rows = rows_of({"one": linear(np.eye(4)), "nan": linear(scores)}, y)
    # NumPy takes the first class for all of them, which would be right here.
    assert (rows["nan"]["value"], rows["nan"]["agreement"]) == (0.0, 0.0)
    said = [note for note in found.notes if "NaN" in note]
    assert said == ["nan has outputs that are NaN for 300 examples."]
    inputs = X.copy()
    inputs[7, 1] = np.inf
    found = lottery_ticket_pruner.compare({"one": linear(np.eye(4))}, (inputs, y))
    assert found.notes[-1] == (
        "The inputs have 1 entry that is NaN or infinite, the first at [7, 1]."
    )


@pytest.mark.once
def test_a_few_squared_errors_have_no_interval():
    models = {"one": linear(np.ones((4, 1))), "two": linear(np.eye(4)[:, :1])}
    found = lottery_ticket_pruner.compare(models, (X[:19], X[:19, :1]))
    assert found.rows[1]["low"] is None
    assert "19 examples are too few for intervals." in found.notes


@pytest.mark.once
def test_the_last_part_of_the_data_is_used():
    model = linear(np.eye(4))
    y = X.argmax(-1)
    found = lottery_ticket_pruner.compare({"m": model}, ((X, y), (X[:40], y[:40])))
    assert found.examples == 40


@pytest.mark.once
def test_models_without_fixed_sizes_are_not_timed():
    inputs = keras.Input((None,))
    scores = keras.ops.stack([inputs[:, 0], inputs[:, 1]], -1)
    model = keras.Model(inputs, scores)
    found = lottery_ticket_pruner.compare({"open": model}, (X, X[:, :2].argmax(-1)))
    assert (found.rows[0]["value"], found.rows[0]["milliseconds"]) == (1.0, None)
    assert "open is not timed" in str(found)


@pytest.mark.once
def test_models_that_cannot_be_compared():
    model, y = linear(np.eye(4)), X.argmax(-1)
    narrow = linear(np.ones((4, 2)))
    wide = linear(np.ones((5, 4)))
    twice = keras.Model(inputs := keras.Input((4,)), [inputs + 1, inputs * 2])
    unbuilt = keras.Sequential([keras.layers.Dense(2)])
    for other, message in (
        (narrow, r"outputs of 'other' do not fit.*\(300, 2\)"),
        (wide, "'other' does not take the inputs"),
        (twice, "'other' has 2 outputs"),
        (unbuilt, "'other' is not built"),
    ):
        with pytest.raises(ValueError, match=message):
            lottery_ticket_pruner.compare({"model": model, "other": other}, (X, y))
    with pytest.raises(ValueError, match=r"classes as their indices. Received: .*type str"):
        lottery_ticket_pruner.compare({"model": model}, (X, y.astype("U1")))
    with pytest.raises(ValueError, match="at least one model"):
        lottery_ticket_pruner.compare({}, (X, y))
    for wrong, text in (
        (model, "dict of models by name"),
        ({"a": "b.keras"}, "`keras.Model` named"),
    ):
        with pytest.raises(TypeError, match=f"Expected a {text}"):
            lottery_ticket_pruner.compare(wrong, (X, y))
