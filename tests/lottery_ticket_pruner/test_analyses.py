"""Analyses of weights, masks and solutions, against numbers computed by hand."""

import itertools

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import analyses, training
from lottery_ticket_pruner.divergence import DivergenceError

# What they use of the backend is tested on JAX, too.
pytestmark = pytest.mark.slow("jax")


@pytest.fixture
def line():
    """Returns a model with one weight and no bias: the loss of weight w is (w - 1)^2."""
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False)])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


ONE = np.ones((4, 1), "float32")


def test_the_barrier_of_a_parabola(line):
    result = analyses.interpolate(line, [[[-1.0]]], [[[5.0]]], ONE, ONE, points=7)
    weights = np.array([-1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0])
    np.testing.assert_allclose(result.shares * 6 - 1, weights)
    assert result.metric == "loss"
    np.testing.assert_allclose(result.errors, (weights - 1) ** 2, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.metrics["mae"], abs(weights - 1), rtol=1e-5, atol=1e-6)
    # The largest error is at an end: 16 - (4 + 16) / 2.
    assert result.barrier == pytest.approx(6, rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        analyses.interpolate(line, line, line, ONE, ONE, points=1)
    with pytest.raises(ValueError, match="`metric` must be one of"):
        analyses.interpolate(line, line, line, ONE, ONE, points=2, metric="accuracy")
    with pytest.raises(ValueError, match="does not fit"):
        analyses.interpolate(line, [np.ones((2, 1))], line, ONE, ONE)


X = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
Y = np.random.default_rng(1).integers(0, 3, 40)


def classifier():
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(5, "tanh", name="a"), layers.Dense(3, name="b")]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    return model


def test_masked_solutions_are_interpolated_as_they_are_read():
    model = ml.convert_to_masked(classifier())
    rng = np.random.default_rng(2)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.6 for p, m in ml.get_masks(model).items()})
    other = ml.convert_to_masked(classifier())
    ml.set_masks(other, {p: rng.random(m.shape) < 0.6 for p, m in ml.get_masks(other).items()})
    ml.masked_refs(other)[0].mask.freeze(rng.normal(size=(4, 5)))
    ml.masked_refs(other)[1].mask.rescale = True
    weights, masks = model.get_weights(), ml.get_masks(model)
    result = analyses.interpolate(model, weights, other, X, Y, points=3)

    assert result.metric == "accuracy"
    np.testing.assert_allclose(result.errors, 1 - result.metrics["accuracy"])
    assert training.evaluate(model, X, Y)["loss"] == pytest.approx(
        result.metrics["loss"][0], rel=1e-5
    )
    assert training.evaluate(other, X, Y)["loss"] == pytest.approx(
        result.metrics["loss"][2], rel=1e-5
    )
    # The middle by hand, from effective kernels.
    ends = [ml.strip_masks(m).get_weights() for m in (model, other)]
    a, b, c, d = (sum(pair) / 2 for pair in zip(*ends, strict=True))
    logits = np.tanh(X @ a + b) @ c + d
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    assert result.metrics["loss"][1] == pytest.approx(-logits[np.arange(40), Y].mean(), rel=1e-4)
    for was, now in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])

    # The predictions of the mask over other weights.
    ones = [np.ones_like(w) for w in weights]
    counts = analyses.confusion_matrix(model, X, Y, weights=ones)
    c = masks["b/kernel"].astype("float32")
    predicted = (np.tanh(X @ masks["a/kernel"] + 1) @ c + 1).argmax(1)
    by_hand = [[(predicted[i == Y] == j).sum() for j in range(3)] for i in range(3)]
    np.testing.assert_array_equal(counts, by_hand)
    assert analyses.plot_confusion(counts).axes[0].get_xlabel() == "predicted class"
    with pytest.raises(ValueError, match=r"one class for each example.*labels.argmax\(-1\)"):
        analyses.confusion_matrix(model, X, np.eye(3)[Y])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_solutions_are_interpolated(dtype):
    model = keras.Sequential([keras.Input((1,)), layers.Dense(1, use_bias=False, dtype=dtype)])
    model.compile("sgd", "mse")
    ends = []
    for weight in (-1.0, 3.0):
        model.set_weights([np.full((1, 1), weight)])
        ends.append(model.get_weights())
    result = analyses.interpolate(model, *ends, ONE, ONE, points=5)
    np.testing.assert_allclose(result.errors, [4, 1, 0, 1, 4])


def test_instability_is_the_barrier_between_two_orders(line):
    """Trains one step on one of two examples that pull the weight to 1 and to -1."""
    y = np.array([[1.0], [-1.0]], "float32")
    line.compile(keras.optimizers.SGD(0.5), "mse")
    line.set_weights([np.zeros((1, 1))])
    expected = set()
    for seed in range(4):
        ends = [float(y[training.batch_order(2, 1, 1, [seed, n])[0, 0], 0]) for n in (0, 1)]
        found = analyses.instability(
            line, ONE[:2], y, steps=1, batch_size=1, test_data=(ONE, ONE), points=5, seed=seed
        )
        assert found.metrics["loss"][[0, -1]] == pytest.approx([(end - 1) ** 2 for end in ends])
        # From 1 to -1 the loss rises from 0 to 4 monotonically: 4 - 2.
        assert found.barrier == pytest.approx(0 if ends[0] == ends[1] else 2)
        expected.add(ends[0] == ends[1])
        assert line.get_weights()[0].item() == 0
    assert expected == {True, False}
    axes = analyses.plot_instability({0: [found], 3: [found, found]}).axes
    assert [len(ax.collections) for ax in axes] == [2, 0]
    accuracies = {"accuracy": np.array([0.9, 0.8, 0.9])}
    found = analyses.Interpolation(np.linspace(0, 1, 3), accuracies, "accuracy")
    for ax in analyses.plot_instability({0: [found]}).axes:  # Errors, in percent.
        assert ax.yaxis.get_major_formatter()(0.02).endswith("%")


def test_instability_continues_with_the_schedule_and_masks():
    model = ml.convert_to_masked(classifier())
    mask = np.arange(20).reshape(4, 5) % 2 == 0
    ml.set_masks(model, {"a/kernel": mask})
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([5], [0.5, 0.0])
    model.compile(keras.optimizers.SGD(schedule, momentum=0.9), model.loss, metrics=["accuracy"])
    options = {"steps": 3, "batch_size": 8, "test_data": (X, Y), "points": 2, "metric": "loss"}
    moved = analyses.instability(model, X, Y, **options)
    assert len(set(moved.errors)) == 2
    model.optimizer.iterations.assign(6)
    before = [np.array(v.numpy()) for v in (*model.variables, *model.optimizer.variables)]
    stood = analyses.instability(model, X, Y, **options)
    start = training.evaluate(model, X, Y)["loss"]
    assert stood.errors == pytest.approx([start, start], rel=1e-5)
    for was, now in zip(before, (*model.variables, *model.optimizer.variables), strict=True):
        np.testing.assert_array_equal(was, now.numpy())
    with pytest.raises(ValueError, match="not compiled"):
        analyses.instability(keras.Sequential(), X, Y, **options)
    trained = []
    options |= {"points": 1, "on_progress": trained.append}
    with pytest.raises(ValueError, match="`points` must be at least 2"):
        analyses.instability(model, X, Y, **options)
    assert not trained


def test_an_instability_without_a_loss_is_not_taken_for_one_that_diverged(monkeypatch):
    monkeypatch.setattr(training, "evaluate", lambda *args: {"accuracy": 0.5})
    options = {"steps": 1, "batch_size": 8, "test_data": (X, Y), "points": 2}
    found = analyses.instability(classifier(), X, Y, **options)
    assert found.metric == "accuracy"


def test_an_instability_of_trainings_that_diverge_is_an_error():
    model = classifier()
    model.compile(keras.optimizers.SGD(1e38), "mse")
    before = model.get_weights()
    options = {"steps": 3, "batch_size": 8, "test_data": (X, np.eye(3)[Y]), "points": 2}
    where = r"with the first order of the data \(seed 4\), 3 steps after the common start"
    with pytest.raises(DivergenceError, match=rf"{where}: weights are NaN or infinite"):
        analyses.instability(model, X, np.eye(3)[Y], seed=4, **options)
    for value, restored in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(value, restored)


def test_sign_agreement_by_hand():
    initial = {"a": np.array([[1.0, -2.0], [0.0, 3.0]]), "b": np.array([-1.0]), "bias": np.ones(2)}
    final = {"a": np.array([[2.0, 1.0], [-4.0, -3.0]]), "b": np.array([-0.5]), "bias": np.ones(2)}
    masks = {"a": np.array([[True, True], [True, False]]), "b": np.array([True])}
    rows = analyses.sign_agreement(initial, final, masks)
    assert rows["a"] == analyses.SignAgreement(pytest.approx(2 / 3), 0.0, 0.5)
    assert rows["total"] == analyses.SignAgreement(0.75, 0.0, pytest.approx(0.6))
    assert rows["b"].kept == 1
    assert np.isnan(rows["b"].pruned)
    figure = analyses.plot_sign_agreement(rows)
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()] == ["a", "b", "total"]
    with pytest.raises(ValueError, match=r"`final` has no weights of shape \(1,\) for .*'b'"):
        analyses.sign_agreement(initial, {"a": final["a"]}, masks)
    model = ml.convert_to_masked(classifier())
    weights = {path: np.ones(mask.shape) for path, mask in ml.get_masks(model).items()}
    assert analyses.sign_agreement(weights, weights, model)["total"].kept == 1
    with pytest.raises(TypeError, match=r"`final` must be .* `pruner.final_weights`.* Sequential"):
        analyses.sign_agreement(weights, model, model)


def test_overlap_by_hand_and_against_all_random_masks():
    masks = {
        "one": {"a": np.array([1, 1, 0, 0, 0], bool), "b": np.array([1, 0], bool)},
        "two": {"a": np.array([0, 1, 1, 1, 0], bool), "b": np.array([1, 0], bool)},
        "none": {"a": np.zeros(5, bool), "b": np.zeros(2, bool)},
    }
    overlap = analyses.mask_overlap(masks)
    assert overlap.names == ("one", "two", "none")
    np.testing.assert_allclose(overlap.jaccard[:2, :2], [[1, 2 / 5], [2 / 5, 1]])
    np.testing.assert_array_equal(overlap.jaccard[2], [0, 0, np.nan])
    # By brute force over all masks with the second's counts: the overlap with the first.
    shared = [
        len({0, 1} & set(kept)) + (out == 0)
        for kept in itertools.combinations(range(5), 3)
        for out in range(2)
    ]
    both = np.mean(shared)
    assert overlap.expected[0, 1] == pytest.approx(both / (3 + 4 - both))
    (axes,) = analyses.plot_overlap(overlap).axes
    texts = [text.get_text() for text in axes.texts]
    # Below the diagonal, the masks; above it, random ones.
    assert [texts[3], texts[1], texts[0]] == ["0.40", f"{overlap.expected[0, 1]:.2f}", ""]
    assert texts[6:8] == ["0.00", "0.00"]
    with pytest.raises(ValueError, match="'one' and 'other' do not belong to the same weights"):
        analyses.mask_overlap({"one": masks["one"], "other": {"a": masks["one"]["a"]}})


def test_overlap_takes_models():
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="out")])
    )
    half = {"out/kernel": np.arange(8).reshape(4, 2) < 4}
    overlap = analyses.mask_overlap({"model": model, "half": half})
    np.testing.assert_array_equal(overlap.jaccard, [[1, 0.5], [0.5, 1]])


def test_sparsity_per_layer_and_pictures_that_can_be_written(tmp_path, line):
    model = ml.convert_to_masked(classifier())
    half = np.ones((4, 5), bool)
    half[:2] = False
    ml.set_masks(model, {"a/kernel": half})
    rows = analyses.layer_sparsity(model)
    assert rows == {"a/kernel": 0.5, "b/kernel": 0.0}
    assert analyses.layer_sparsity({"a/kernel": half}) == {"a/kernel": 0.5}
    figures = [
        analyses.plot_layer_sparsity({"model": rows, "part": {"a/kernel": 0.1}}),
        analyses.plot_layer_sparsity(rows),
        analyses.plot_interpolation(
            {"seeds": analyses.interpolate(line, [[[0.0]]], [[[3.0]]], ONE, ONE, points=4)}
        ),
    ]
    assert figures[1].axes[0].get_lines()[0].get_xdata().tolist() == [0.5, 0.0]
    assert [len(figure.legends) for figure in figures[:2]] == [1, 0]
    legend = figures[-1].axes[0].get_legend().get_texts()[0].get_text()
    assert legend == "seeds, barrier 1.500"
    for number, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 5000
