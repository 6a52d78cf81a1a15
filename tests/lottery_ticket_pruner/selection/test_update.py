"""New masks against plain Python that sorts, against torch, and at many sparsities at once."""

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kernels import BY_RECORDS, RANKING_RECORDS, distinct, kernel
from lottery_ticket_pruner import criteria, selection
from lottery_ticket_pruner.selection import Weights, drop_count, lowest, update

pytestmark = pytest.mark.once


# --- Update against sorting in plain Python -------------------------------------------------------

# Multiples of 1/8: sums and differences are exact in every dtype, and ties are frequent.
NUMBERS = st.integers(-24, 24).map(lambda eighths: eighths / 8)


def rank(value, values):
    return sum(other < value for other in values)


def sign(number):
    return (number > 0) - (number < 0)


def oracle_key(name, i, initial, final, alive):
    """Returns the sort key of kept weight `i`; the lowest are pruned."""
    w0, wf = initial[i], final[i]
    flip, keep = sign(w0) * sign(wf) < 0, sign(w0) * sign(wf) > 0
    both = abs(wf) if w0 else 0
    w0s, wfs = [abs(initial[j]) for j in alive], [abs(final[j]) for j in alive]
    return {
        "large_final": lambda: abs(wf),
        "small_final": lambda: -abs(wf),
        "large_init": lambda: abs(w0),
        "small_init": lambda: -abs(w0),
        "large_init_large_final": lambda: min(rank(abs(w0), w0s), rank(abs(wf), wfs)),
        "small_init_small_final": lambda: min(
            rank(-abs(w0), [-w for w in w0s]), rank(-abs(wf), [-w for w in wfs])
        ),
        "magnitude_increase": lambda: abs(wf) - abs(w0),
        "movement": lambda: abs(wf - w0),
        "large_final_same_sign": lambda: (not flip, 0 if flip else both),
        "large_final_diff_sign": lambda: (not keep, 0 if keep else both),
        "magnitude_increase_same_sign": lambda: (not flip, 0 if flip else abs(wf) - abs(w0)),
        "magnitude_increase_diff_sign": lambda: (not keep, 0 if keep else abs(wf) - abs(w0)),
        "smallest_weights": lambda: abs(wf),
        "smallest_weights_global": lambda: abs(wf),
    }[name]()


def check_group(name, amount, initial, final, before, after):
    """Selects within one group of weights ranked together, as lists, by sorting."""
    alive = [i for i, m in enumerate(before) if m]
    (kind, share), size = next(iter(amount.items())), len(before)
    if kind == "rate":
        drop = math.floor(Fraction(round(share * 100), 100) * len(alive))
    else:
        drop = math.floor(Fraction(round(share * 100), 100) * size) - (size - len(alive))
    keys = {i: oracle_key(name, i, initial, final, alive) for i in alive}
    dropped = [i for i in alive if not after[i]]
    assert not any(a and not b for a, b in zip(after, before, strict=True))
    assert sorted(keys[i] for i in dropped) == sorted(keys.values())[:drop]


@st.composite
def networks(draw):
    shapes = draw(st.lists(hnp.array_shapes(max_dims=3, max_side=5), min_size=1, max_size=3))
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    arrays = {}
    for i, shape in enumerate(shapes):
        axes = draw(st.sets(st.integers(0, len(shape) - 1)))
        arrays[f"dense_{i}/kernel"] = Weights(
            initial=draw(hnp.arrays(dtype, shape, elements=NUMBERS)),
            final=(final := draw(hnp.arrays(dtype, shape, elements=NUMBERS))),
            current=final,
            mask=draw(hnp.arrays(bool, shape)),
            output_axes=tuple(draw(st.permutations(sorted(axes)))),
        )
    return arrays


def groups(weights, scope):
    """Returns the positions that are ranked together: lists of (path, index)."""
    cells = [(path, i) for path, w in weights.items() for i in np.ndindex(w.mask.shape)]
    if scope == "global":
        return [cells]
    found = {}
    for path, i in cells:
        axes = weights[path].output_axes if scope == "output" else ()
        found.setdefault((path, *(i[axis] for axis in axes)), []).append((path, i))
    return list(found.values())


@pytest.mark.parametrize("name", [n for n in RANKING_RECORDS if n != "random"])
@settings(max_examples=30)
@given(
    weights=networks(),
    percent=st.integers(0, 99),
    scope=st.sampled_from(criteria.SCOPES),
    seed=st.integers(0, 3),
)
def test_update_is_a_sort_in_plain_python(name, weights, percent, scope, seed):
    scope = criteria.get(name).scope or scope
    copies = {
        path: (w.initial.copy(), w.final.copy(), w.mask.copy()) for path, w in weights.items()
    }
    masks = update(name, weights, rate=percent / 100, scope=scope, seed=seed)

    assert list(masks) == list(weights)
    for group in groups(weights, scope):
        check_group(
            name,
            {"rate": percent / 100},
            *(
                [float(getattr(weights[path], record)[i]) for path, i in group]
                for record in ("initial", "final")
            ),
            [bool(weights[path].mask[i]) for path, i in group],
            [bool(masks[path][i]) for path, i in group],
        )
    for path, w in weights.items():
        assert masks[path].dtype == bool
        assert masks[path].shape == w.mask.shape
        assert masks[path].flags.writeable
        assert not np.shares_memory(masks[path], w.mask)
        for now, before in zip((w.initial, w.final, w.mask), copies[path], strict=True):
            np.testing.assert_array_equal(now, before)
            assert now.flags.writeable


@settings(max_examples=30)
@given(
    weights=networks(),
    percents=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    scope=st.sampled_from(criteria.SCOPES),
    name=st.sampled_from(["large_final", "random", "magnitude_increase_same_sign"]),
)
def test_growing_sparsities_reach_their_counts_with_nested_masks(weights, percents, scope, name):
    masks = {path: np.ones(w.mask.shape, dtype=bool) for path, w in weights.items()}
    for percent in sorted(percents):
        before = masks
        weights = {
            path: Weights(initial=w.initial, final=w.final, mask=masks[path],
                          output_axes=w.output_axes)
            for path, w in weights.items()
        }  # fmt: skip
        masks = update(name, weights, sparsity=percent / 100, scope=scope)
        assert all((masks[path] <= before[path]).all() for path in masks)
        for group in groups(weights, scope):
            dead = sum(not masks[path][i] for path, i in group)
            assert dead == math.floor(Fraction(percent, 100) * len(group))


# --- Update against torch -------------------------------------------------------------------------


@pytest.mark.once("tensorflow", "torch")  # Where torch is installed.
@pytest.mark.parametrize("seed", range(10))
def test_layerwise_large_final_is_torchs_l1_unstructured(seed):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(seed)
    values = distinct(rng, *rng.integers(1, 9, size=rng.integers(1, 5)))
    rate = rng.uniform(0, 0.99)
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(torch.tensor(values))
    prune.l1_unstructured(layer, "weight", amount=drop_count(values.size, values.size, rate=rate))
    mask = update("large_final", {"k": kernel(values)}, rate=rate)["k"]
    np.testing.assert_array_equal(mask, layer.weight_mask.numpy().astype(bool))


@pytest.mark.once("tensorflow", "torch")  # Where torch is installed.
@pytest.mark.parametrize("seed", range(10))
def test_two_global_rounds_are_torchs_global_unstructured(seed):
    torch = pytest.importorskip("torch")
    from torch.nn.utils import prune

    rng = np.random.default_rng(seed)
    shapes = [rng.integers(1, 9, size=rng.integers(1, 4)) for _ in range(4)]
    split = np.cumsum([math.prod(shape) for shape in shapes])
    flat = distinct(rng, int(split[-1]))
    values = {
        f"layer_{i}/kernel": part.reshape(shape)
        for i, (part, shape) in enumerate(zip(np.split(flat, split[:-1]), shapes, strict=True))
    }
    layers = []
    for array in values.values():
        layers.append(torch.nn.Module())
        layers[-1].weight = torch.nn.Parameter(torch.tensor(array))
    masks, alive = dict.fromkeys(values), flat.size
    for rate in (rng.uniform(0, 0.9), rng.uniform(0, 0.9)):
        drop = drop_count(flat.size, alive, rate=rate)
        alive -= drop
        prune.global_unstructured(
            [(layer, "weight") for layer in layers], prune.L1Unstructured, amount=drop
        )
        weights = {path: kernel(values[path], masks[path]) for path in values}
        masks = update("large_final", weights, rate=rate, scope="global")
        for mask, layer in zip(masks.values(), layers, strict=True):
            np.testing.assert_array_equal(mask, layer.weight_mask.numpy().astype(bool))


# --- Scope and shares -----------------------------------------------------------------------------


def test_weights_are_ranked_by_layer_globally_or_by_output():
    weights = {
        "small/kernel": kernel([[1, 2], [3, 4]]),
        "large/kernel": kernel([[10, 40], [20, 30]]),
    }
    assert_masks(update("large_final", weights, rate=0.5), [[0, 0], [1, 1]], [[0, 1], [0, 1]])
    assert_masks(
        update("large_final", weights, rate=0.5, scope="global"), [[0, 0], [0, 0]], [[1, 1], [1, 1]]
    )
    assert_masks(
        update("large_final", weights, rate=0.5, scope="output"), [[0, 0], [1, 1]], [[0, 1], [1, 0]]
    )


def assert_masks(masks, small, large):
    np.testing.assert_array_equal(masks["small/kernel"], small)
    np.testing.assert_array_equal(masks["large/kernel"], large)


def test_output_axes_define_the_outputs():
    values = np.array([[1, 4, 5], [6, 3, 2]])
    rows = update("large_final", {"k": kernel(values, output_axes=(0,))}, rate=0.4, scope="output")
    np.testing.assert_array_equal(rows["k"], [[0, 1, 1], [1, 1, 0]])
    both = update("large_final", {"k": kernel(values, output_axes=(1, -2))}, rate=0.9,
                  scope="output")  # fmt: skip
    assert both["k"].all()  # groups of one weight: floor(0.9) is 0
    none = update("large_final", {"k": kernel(values, output_axes=())}, rate=0.5, scope="output")
    np.testing.assert_array_equal(none["k"], [[0, 1, 1], [1, 0, 0]])


def test_smallest_weights_global_has_one_scope():
    weights = {"a": kernel([1, 2, 3, 4]), "b": kernel([5, 6, 7, 8])}
    by_default = update("smallest_weights_global", weights, rate=0.5)
    assert [mask.sum() for mask in by_default.values()] == [0, 4]
    plain = update("smallest_weights", weights, rate=0.5, scope="global")
    assert all((by_default[path] == plain[path]).all() for path in weights)
    assert [mask.sum() for mask in update("smallest_weights", weights, rate=0.5).values()] == [2, 2]
    update("smallest_weights_global", weights, rate=0.5, scope="global")
    with pytest.raises(ValueError, match=r"supports only scope='global'\. Received: scope='layer'"):
        update("smallest_weights_global", weights, rate=0.5, scope="layer")
    with pytest.raises(ValueError, match="contradicts"):
        update("smallest_weights_global", weights, rate={"default": 0.5})


def test_an_unknown_scope_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'layer', 'global', 'output'.*Received: scope='filter'"):
        update("large_final", {"k": kernel([1, 2])}, rate=0.5, scope="filter")


# --- Seeds ----------------------------------------------------------------------------------------


def tied(*paths, size=40):
    return {path: kernel(np.ones(size)) for path in paths}


@pytest.mark.parametrize("scope", criteria.SCOPES)
@pytest.mark.parametrize("name", ["large_final", "random"])
def test_the_seed_alone_decides(name, scope):
    weights = tied("a/kernel", "b/kernel")
    options = {"rate": 0.5, "scope": scope}
    if scope == "output":
        weights = {path: kernel(np.ones((20, 2))) for path in weights}
    first = update(name, weights, seed=1, **options)
    again = update(name, dict(reversed(weights.items())), seed=1, **options)
    other = update(name, weights, seed=2, **options)
    assert list(again) == ["b/kernel", "a/kernel"]
    for path in weights:
        np.testing.assert_array_equal(first[path], again[path])
        assert (first[path] != other[path]).any()
    assert (first["a/kernel"] != first["b/kernel"]).any()


def test_a_kernels_ties_do_not_depend_on_the_other_kernels():
    alone = update("large_final", tied("b/kernel"), rate=0.5)
    among = update("large_final", tied("a/kernel", "b/kernel", "c/kernel"), rate=0.5)
    np.testing.assert_array_equal(alone["b/kernel"], among["b/kernel"])


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_a_seed_is_a_non_negative_integer(seed):
    with pytest.raises(ValueError, match="non-negative integer"):
        update("large_final", tied("k"), rate=0.5, seed=seed)


@pytest.mark.parametrize("name", BY_RECORDS)
@settings(max_examples=20)
@given(
    weights=networks(),
    percents=st.lists(st.integers(0, 99), max_size=4),
    scope=st.sampled_from(criteria.SCOPES),
    seed=st.integers(0, 3),
)
def test_masks_at_many_sparsities_are_those_of_update(name, weights, percents, scope, seed):
    scope = criteria.get(name).scope or scope
    weights = {path: dataclasses.replace(w, mask=w.mask | True) for path, w in weights.items()}
    sparsities = [percent / 100 for percent in percents]
    many = list(selection.update_many(name, weights, sparsities=sparsities, scope=scope, seed=seed))
    assert len(many) == len(sparsities)
    for sparsity, masks in zip(sparsities, many, strict=True):
        expected = update(name, weights, sparsity=sparsity, scope=scope, seed=seed)
        assert list(masks) == list(expected)
        for path in expected:
            np.testing.assert_array_equal(masks[path], expected[path])
            assert masks[path].dtype == bool
            assert masks[path].flags.writeable


def test_many_sparsities_start_from_the_given_masks_and_take_mappings():
    rng = np.random.default_rng(0)
    weights = {
        path: kernel(rng.integers(0, 9, size=40), rng.random(40) < 0.8) for path in ("a", "b")
    }
    sparsities = [0.6, {"a": 0.9, "default": 0.7}, 0.5]
    many = selection.update_many("large_final", weights, sparsities=sparsities, seed=5)
    for sparsity, masks in zip(sparsities, many, strict=True):
        expected = update("large_final", weights, sparsity=sparsity, seed=5)
        assert all((masks[path] == expected[path]).all() for path in weights)


def test_many_sparsities_are_checked_before_any_mask_is_made():
    weights = {"k": kernel([1, 2, 3, 4])}
    with pytest.raises(ValueError, match=r"`sparsity` must be a number in \[0, 1\)"):
        selection.update_many("large_final", weights, sparsities=[0.5, 1.0])
    with pytest.raises(ValueError, match="NaN among the scores"):
        list(selection.update_many(lambda g: g.final * np.nan, weights, sparsities=[0.5]))
    with pytest.raises(ValueError, match=r"scores of shape \(1,\)"):
        list(selection.update_many(lambda g: g.final[:1], weights, sparsities=[0.5]))


@pytest.mark.parametrize("name", BY_RECORDS)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_scores_in_chunks_are_scores_of_the_whole(name, scope, monkeypatch):
    rng = np.random.default_rng(0)
    weights = {
        f"{i}": kernel(rng.integers(-9, 9, shape).astype(np.float32),
                       rng.random(shape) < 0.8, initial=rng.integers(-9, 9, shape))
        for i, shape in enumerate([(7, 11), (1,), (13, 3)])
    }  # fmt: skip
    scope = criteria.get(name).scope or scope
    monkeypatch.setattr(lowest, "CHUNK", 10)
    monkeypatch.setattr(lowest, "_MANY", 1)
    in_chunks = update(name, weights, rate=0.5, scope=scope)
    whole = dataclasses.replace(criteria.get(name), elementwise=False)
    at_once = update(whole, weights, rate=0.5, scope=scope)
    assert all((in_chunks[path] == at_once[path]).all() for path in weights)
