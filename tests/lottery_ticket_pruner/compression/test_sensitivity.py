"""Scans of layers: what is measured, and the allocation that follows, against brute force."""

import itertools

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import masked_layers as ml
from lottery_ticket_pruner.compression import sensitivity
from lottery_ticket_pruner.tolerances import Metric

pytestmark = pytest.mark.once


@given(
    losses=st.lists(st.lists(st.integers(-3, 20), min_size=3, max_size=3), min_size=2, max_size=3),
    share=st.floats(0.3, 0.95),
)
@settings(deadline=None, max_examples=60)
def test_the_sum_of_all_rises_is_the_least_of_all_allocations(losses, share):
    counts = (4, 2, 1)
    curves = {
        str(number): sensitivity.curve(
            [
                {"kept": kept, "density": kept / 8, "loss": float(loss)}
                for kept, loss in zip(counts, of_layer, strict=True)
            ]
        )
        for number, of_layer in enumerate(losses)
    }
    alive = dict.fromkeys(curves, 8)
    count = max(round(share * 8 * len(curves)), len(curves))
    kept = sensitivity.kept_counts(curves, alive, count)
    assert sum(kept.values()) == count
    assert min(kept.values()) >= 1

    def rise(path, kept):
        x, y = zip(*reversed(curves[path]), strict=True)
        return np.interp(kept, x, y)

    every = itertools.product(range(1, 9), repeat=len(curves))
    least = min(
        sum(rise(path, number) for path, number in zip(curves, numbers, strict=True))
        for numbers in every
        if sum(numbers) == count
    )
    assert sum(rise(path, number) for path, number in kept.items()) == pytest.approx(least)


def test_curves_are_below_what_was_measured_convex_and_never_fall():
    rng = np.random.default_rng(0)
    for _ in range(50):
        losses = rng.normal(size=5).tolist()
        rows = [
            {"kept": kept, "density": kept / 100, "loss": loss}
            for kept, loss in zip((50, 25, 12, 6, 1), losses, strict=True)
        ]
        kept, rises = zip(*sensitivity.curve(rows), strict=True)
        slopes = -np.diff(rises) / np.diff(kept)
        assert (np.diff(slopes) > 0).all()
        assert min(slopes, default=0) >= 0
        measured = np.maximum.accumulate([0, *losses])
        assert (
            np.interp([100, 50, 25, 12, 6, 1], kept[::-1], rises[::-1]) <= measured + 1e-9
        ).all()


def test_what_is_pruned_already_stays_pruned():
    curves = {"a": [(8, 0.0), (1, 7.0)], "b": [(8, 0.0), (1, 70.0)]}
    assert sensitivity.kept_counts(curves, {"a": 3, "b": 8}, 9) == {"a": 1, "b": 8}
    assert sensitivity.kept_counts(curves, {"a": 3, "b": 8}, 5) == {"a": 1, "b": 4}
    masks = {"a": np.arange(10) < 3, "b": np.ones(10, bool)}
    rows = [
        {"path": path, "kept": 1, "density": 1 / 8, "loss": loss}
        for path, loss in (("a", 7.0), ("b", 70.0))
    ]
    shares = sensitivity.sparsities(rows, masks, 0.5)
    assert shares == {"^a$": pytest.approx(0.9), "^b$": pytest.approx(0.1)}


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(0)
    plain = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(6, "relu"), keras.layers.Dense(1)]
    )
    masked = ml.convert_to_masked(plain)
    masked.compile("sgd", "mse", jit_compile=False)
    return masked


def test_each_weight_is_pruned_alone(model):
    x = np.random.default_rng(0).normal(size=(40, 4)).astype("float32")
    y = x[:, :1]
    before = ml.get_masks(model)
    found = sensitivity.scan(model, (x, y), Metric("loss", higher_is_better=False), 1e9)
    assert found.complete
    assert found.examples == 40
    first, head = (weight.copy() for weight in (model.get_weights()[0], model.get_weights()[2]))

    def loss(first, head):
        return np.mean((np.maximum(x @ first, 0) @ head - y) ** 2)

    rows = [row for row in found.rows if row["path"] == "dense/kernel"]
    assert [row["kept"] for row in rows] == [12, 6, 3, 2, 1]
    for row in rows:
        least = np.sort(np.abs(first).ravel())[-row["kept"]]
        alone = loss(np.where(np.abs(first) >= least, first, 0), head)
        assert row["value"] == pytest.approx(alone, rel=1e-4)
        assert row["drop"] == row["loss"] == pytest.approx(alone - loss(first, head), abs=1e-5)
    assert {row["path"] for row in found.rows} == set(before)
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, before[path])
    assert not sensitivity.scan(model, (x, y), Metric("loss", higher_is_better=False), -1).complete
