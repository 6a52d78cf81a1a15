"""Sparsities of layers by layer-adaptive magnitude, against the paper's formula in loops."""

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.compression.allocation import count_of, kept_counts, sparsities

pytestmark = pytest.mark.once


def by_the_formula(values, count):
    """Lee et al., arXiv 2010.07611, equation 4, one entry at a time."""
    scores = []
    for path, array in values.items():
        flat = sorted(np.abs(array.reshape(-1)).tolist())
        for index, value in enumerate(flat):
            scores.append((value**2 / sum(other**2 for other in flat[index:]), path))
    kept = [path for _, path in sorted(scores, reverse=True)[:count]]
    return {path: kept.count(path) for path in values}


@given(st.integers(0, 1_000), st.integers(1, 5), st.floats(0, 1))
def test_counts_are_those_of_the_formula(seed, layers, share):
    rng = np.random.default_rng(seed)
    values = {
        str(i): rng.normal(size=(rng.integers(1, 9), 4)) * 10.0 ** rng.integers(-6, 3)
        for i in range(layers)
    }
    size = sum(array.size for array in values.values())
    count = layers + round(share * (size - layers))
    assert kept_counts(values, count) == by_the_formula(values, count)


def test_every_weight_keeps_something_and_zeros_go_first():
    values = {"a": np.zeros(5), "b": np.array([1e-9, 0, 0]), "c": np.full(4, 1e6)}
    assert kept_counts(values, 3) == {"a": 1, "b": 1, "c": 1}
    assert kept_counts(values, 6) == {"a": 1, "b": 1, "c": 4}
    with pytest.raises(ValueError, match="from 3 to 12 weights"):
        kept_counts(values, 2)


def test_what_is_pruned_stays_pruned():
    rng = np.random.default_rng(0)
    weights = {"a": rng.normal(size=(10, 10)), "b": rng.normal(size=(5, 4))}
    masks = {"a": rng.random((10, 10)) < 0.3, "b": np.ones((5, 4), bool)}
    alive = sum(mask.sum() for mask in masks.values())
    for density in (0.9, 0.3, 0.1, 0.001):
        found = sparsities(weights, masks, density)
        kept = {path: round((1 - found[f"^{path}$"]) * mask.size) for path, mask in masks.items()}
        assert all(1 <= kept[path] <= mask.sum() for path, mask in masks.items())
        assert sum(kept.values()) == max(2, min(alive, count_of(120, density)))


def test_a_layer_of_small_weights_survives_where_global_magnitude_empties_it():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), keras.layers.Embedding(50, 8), keras.layers.Flatten()]
    )
    model.add(keras.layers.Dense(20))
    masked = ml.convert_to_masked(model)
    for ref, scale in zip(ml.masked_refs(masked), (1e-3, 1.0), strict=True):
        ref.variable.assign(np.random.default_rng(0).normal(size=ref.variable.shape) * scale)
    pruner = LotteryTicketPruner(masked)
    with pytest.warns(UserWarning, match="Nothing is left of 'embedding"):
        pruner.update_masks("smallest_weights", sparsity=0.8, scope="global")
    pruner.reset_masks()
    refs = ml.masked_refs(masked)
    weights = {ref.path: ref.variable.numpy() for ref in refs}
    share = sparsities(weights, ml.get_masks(masked), 0.2)
    pruner.update_masks("smallest_weights", sparsity=share, scope="layer")
    alive = [int(mask.sum()) for mask in ml.get_masks(masked).values()]
    assert sum(alive) == count_of(50 * 8 + 48 * 20, 0.2)
    assert min(alive) > 30
