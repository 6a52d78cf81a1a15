"""Selection against plain Python that sorts, against torch, and at its edges."""

import dataclasses
import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lottery_ticket_pruner import criteria, selection
from lottery_ticket_pruner.selection import (
    Weights,
    drop_count,
    drop_lowest,
    lowest,
    scores,
    update,
)

pytestmark = pytest.mark.once

RANKING_RECORDS = [name for name in criteria.names() if not criteria.get(name).evidence]


def kernel(values, mask=None, **kwargs):
    """A kernel whose three records hold the same values."""
    values = np.asarray(values)
    mask = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    records = {"initial": values, "final": values, "current": values} | kwargs
    return Weights(mask=mask, **records)


# --------------------------------------------------------------------------------- exact counts


@pytest.mark.parametrize(
    ("size", "alive", "amount", "expected"),
    [
        (100, 100, {"rate": 0.29}, 29),  # 0.29 * 100 is 28.999999999999996
        (100, 100, {"rate": 0.57}, 57),
        (10, 10, {"rate": 0.3}, 3),
        (1000, 1000, {"sparsity": 0.58}, 58 * 10),
        (100, 80, {"rate": 0.2}, 16),
        (100, 80, {"sparsity": 0.29}, 9),
        (100, 71, {"sparsity": 0.29}, 0),
        (7, 7, {"rate": 0.2}, 1),
        (4, 4, {"rate": 0.2}, 0),
        (5, 0, {"rate": 0.9}, 0),
        (0, 0, {"rate": 0.9}, 0),
        (0, 0, {"sparsity": 0.9}, 0),
        (100, 100, {"rate": 0}, 0),
        (100, 100, {"rate": np.float32(0.29)}, 29),
    ],
)
def test_drop_count_by_hand(size, alive, amount, expected):
    assert drop_count(size, alive, **amount) == expected


@given(percent=st.integers(0, 99), alive=st.integers(0, 10**7))
def test_drop_count_of_whole_percents_is_that_of_exact_fractions(percent, alive):
    exact = math.floor(Fraction(percent, 100) * alive)
    assert drop_count(alive, alive, rate=percent / 100) == exact
    assert drop_count(alive, alive, sparsity=percent / 100) == exact


def test_a_sparsity_already_exceeded_is_an_error_that_names_the_kernel():
    weights = {"a/kernel": kernel(np.ones(4)), "b/kernel": kernel(np.ones(4), [1, 0, 0, 0])}
    with pytest.raises(ValueError, match=r"0\.5 was asked.*'b/kernel' is already sparser: 3 of 4"):
        update("large_final", weights, sparsity=0.5)
    with pytest.raises(ValueError, match=r"model as a whole is already sparser: 3 of 8"):
        update("large_final", weights, sparsity=0.25, scope="global")
    with pytest.raises(ValueError, match=r"'k', output 1 is already sparser: 2 of 2"):
        update("large_final", {"k": kernel(np.ones((2, 2)), [[1, 0], [1, 0]])}, sparsity=0.5,
               scope="output")  # fmt: skip


@pytest.mark.parametrize("amount", [{}, {"rate": 0.1, "sparsity": 0.1}])
def test_exactly_one_of_rate_and_sparsity(amount):
    with pytest.raises(ValueError, match="exactly one of"):
        drop_count(4, 4, **amount)
    with pytest.raises(ValueError, match="exactly one of"):
        update("large_final", {"k": kernel(np.ones(4))}, **amount)


@pytest.mark.parametrize("scope", criteria.SCOPES)
@pytest.mark.parametrize("name", ["rate", "sparsity"])
@pytest.mark.parametrize("share", [1, 1.0, -0.1, math.nan, math.inf, "0.5", [0.5]])
def test_shares_outside_the_unit_interval_are_errors(name, share, scope):
    weights = {"k": kernel(np.ones(4))}
    with pytest.raises(ValueError, match=rf"`{name}` must be a number in \[0, 1\)"):
        update("large_final", weights, scope=scope, **{name: share})
    if scope != "global":
        with pytest.raises(ValueError, match=rf"`{name}` must be a number in \[0, 1\)"):
            update("large_final", weights, scope=scope, **{name: {"k": 0.1, "default": share}})


# ---------------------------------------------------------------------------------- drop_lowest


@given(
    scores=hnp.arrays(
        np.float32, st.integers(0, 40), elements=st.sampled_from([-np.inf, -1, -0.0, 0, 1, 2, 3])
    ),
    data=st.data(),
)
def test_drop_lowest_is_a_sort_up_to_ties(scores, data):
    mask = data.draw(hnp.arrays(bool, scores.shape))
    alive = [i for i in range(len(scores)) if mask[i]]
    drop = data.draw(st.integers(0, len(alive)))
    before = scores.copy(), mask.copy()
    kept = drop_lowest(scores, mask, drop, np.random.default_rng(0))

    in_order = sorted(alive, key=lambda i: float(scores[i]))
    dropped = {i for i in alive if not kept[i]}
    assert len(dropped) == drop
    assert not kept[~mask].any()
    assert sorted(float(scores[i]) for i in dropped) == [float(scores[i]) for i in in_order[:drop]]
    np.testing.assert_array_equal(scores, before[0])
    np.testing.assert_array_equal(mask, before[1])
    assert not np.shares_memory(kept, mask)


def test_ties_at_the_threshold_are_drawn_evenly():
    scores = np.array([0, 1, 1, 1, 1, 2], dtype=np.float32)
    mask = np.array([1, 1, 1, 1, 0, 1], dtype=bool)
    draws = [drop_lowest(scores, mask, 2, np.random.default_rng(s)) for s in range(3000)]
    np.testing.assert_allclose(np.mean(draws, axis=0), [0, 2 / 3, 2 / 3, 2 / 3, 0, 1], atol=0.05)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("drop", [1, 50, 99, 500, 901, 999, 1000])
def test_many_ties_at_the_bottom(share, drop):
    scores = np.arange(1000, dtype=np.float32)
    scores[: int(1000 * share)] = -np.inf
    kept = drop_lowest(scores, np.ones(1000, dtype=bool), drop, np.random.default_rng(1))
    assert np.count_nonzero(kept) == 1000 - drop
    if drop >= 1000 * share:
        assert kept[drop:].all()
    else:
        assert kept[int(1000 * share) :].all()


def test_drop_lowest_refuses_what_it_cannot_rank():
    rng, mask = np.random.default_rng(0), np.array([True, True, False])
    with pytest.raises(ValueError, match="NaN"):
        drop_lowest(np.array([1.0, np.nan, 0.0]), mask, 1, rng)
    with pytest.raises(ValueError, match=r"in \[0, 2\].*Received: 3"):
        drop_lowest(np.zeros(3), mask, 3, rng)
    with pytest.raises(ValueError, match="Received: -1"):
        drop_lowest(np.zeros(3), mask, -1, rng)
    with pytest.raises(ValueError, match=r"shape \(4,\).*shape \(3,\)"):
        drop_lowest(np.zeros(4), mask, 1, rng)
    assert drop_lowest(np.array([1.0, 2.0, np.nan]), mask, 1, rng).tolist() == [False, True, False]


# --------------------------------------------------------- update against sorting in plain Python

# Multiples of 1/8: sums and differences are exact in every dtype, and ties are frequent.
NUMBERS = st.integers(-24, 24).map(lambda eighths: eighths / 8)


def rank(value, values):
    return sum(other < value for other in values)


def sign(number):
    return (number > 0) - (number < 0)


def oracle_key(name, i, initial, final, alive):
    """What Python's sort orders alive weight `i` by; the lowest go."""
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
    """One competition group, as lists, against a sort."""
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
    """The competing positions: lists of (path, index)."""
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


# ------------------------------------------------------------------------ update against torch


def distinct(rng, *shape):
    """Random weights without two of one magnitude."""
    size = math.prod(shape)
    magnitudes = rng.permutation(size).astype(np.float32) + 1
    return (magnitudes * rng.choice([-1, 1], size)).reshape(shape) / size


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


# ------------------------------------------------------------------------------ scope and shares


def test_layers_compete_alone_together_or_by_output():
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


def test_output_axes_say_what_an_output_is():
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
    with pytest.raises(ValueError, match=r"scope='global' alone\. Received: scope='layer'"):
        update("smallest_weights_global", weights, rate=0.5, scope="layer")
    with pytest.raises(ValueError, match="contradicts"):
        update("smallest_weights_global", weights, rate={"default": 0.5})


def test_an_unknown_scope_is_an_error_that_lists_the_known():
    with pytest.raises(ValueError, match=r"'layer', 'global', 'output'.*Received: scope='filter'"):
        update("large_final", {"k": kernel([1, 2])}, rate=0.5, scope="filter")


@pytest.mark.parametrize("scope", ["layer", "output"])
def test_shares_by_pattern_take_the_first_that_matches(scope):
    weights = {
        path: kernel(np.arange(1.0, 101.0).reshape(100, 1))
        for path in ("conv/kernel", "block/dense_1/kernel", "block/output/kernel", "head/kernel")
    }
    rates = {"^conv": 0.1, "output": 0.07, "default": 0.2, "block": 0.29}
    masks = update("large_final", weights, rate=rates, scope=scope)
    assert [100 - mask.sum() for mask in masks.values()] == [10, 29, 7, 20]
    masks = update("large_final", weights, sparsity=rates, scope=scope)
    assert [100 - mask.sum() for mask in masks.values()] == [10, 29, 7, 20]


def test_mappings_that_make_no_sense_are_errors():
    weights = {"a/kernel": kernel([1, 2]), "b/kernel": kernel([1, 2])}
    with pytest.raises(ValueError, match="matches 'b/kernel' nor a \"default\""):
        update("large_final", weights, rate={"a": 0.5})
    with pytest.raises(ValueError, match=r"key '\(', no pattern"):
        update("large_final", weights, rate={"(": 0.5, "default": 0.1})
    with pytest.raises(ValueError, match=r"key 1, no pattern"):
        update("large_final", weights, rate={1: 0.5, "default": 0.1})
    with pytest.raises(ValueError, match='contradicts scope="global"'):
        update("large_final", weights, rate={"default": 0.5}, scope="global")
    with pytest.raises(ValueError, match=r"'ouput' of `rate` is found in no path.*b/kernel"):
        update("large_final", weights, rate={"ouput": 0.1, "default": 0.5})


# ----------------------------------------------------------------------------------------- seeds


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


def test_a_kernels_generator_is_the_same_in_every_process():
    # Raw bits: NumPy promises them for ever, unlike the order of a shuffle.
    raw = lowest.generator(7, "dense/kernel").bit_generator.random_raw()
    assert raw == 1827416788799031895


@pytest.mark.parametrize("seed", [-1, 0.5, None, True])
def test_a_seed_is_a_non_negative_integer(seed):
    with pytest.raises(ValueError, match="non-negative integer"):
        update("large_final", tied("k"), rate=0.5, seed=seed)


# ------------------------------------------------------------------------------ records and edges


@pytest.mark.parametrize(
    ("record", "criterion", "call"),
    [
        ("initial", "large_init", r"set_initial_weights\("),
        ("final", "large_final", r"set_pretrained_weights\("),
        ("final", "movement", r"set_pretrained_weights\("),
        ("current", "smallest_weights", "`current`"),
    ],
)
def test_a_missing_record_is_named_with_the_call_that_makes_it(record, criterion, call):
    weights = {"a/kernel": kernel([1, 2]), "b/kernel": kernel([1, 2], **{record: None})}
    message = rf"'{criterion}' needs the {record} weights of 'b/kernel'.*{call}"
    with pytest.raises(ValueError, match=message):
        update(criterion, weights, rate=0)


def test_a_record_that_is_not_needed_may_be_missing_or_not_finite():
    weights = {"k": Weights(mask=np.ones(4, dtype=bool), initial=np.full(4, np.nan))}
    assert update("random", weights, rate=0.5)["k"].sum() == 2
    weights = {"k": kernel([1, 2, 3, 4], initial=None, current=np.full(4, np.nan))}
    assert update("large_final", weights, rate=0.5)["k"].tolist() == [False, False, True, True]


def test_a_function_that_meets_a_missing_record_says_which():
    weights = {"k": kernel([1, 2], final=None)}
    assert update(lambda group: np.abs(group.initial), weights, rate=0.5)["k"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"None: final\. .*set_pretrained_weights\("):
        update(lambda group: np.abs(group.final), weights, rate=0.5)
    with pytest.raises(TypeError, match="NoneType"):  # nothing is missing: the function's own fault
        update(lambda group: group.final + None, {"k": kernel([1, 2])}, rate=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("scope", criteria.SCOPES)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "bfloat16"])
def test_a_weight_that_is_not_finite_is_an_error_that_names_it(value, scope, dtype):
    pytest.importorskip("ml_dtypes")
    values = np.array([1, value, 2]).astype(dtype)
    weights = {"a/kernel": kernel([1, 2]), "b/kernel": kernel(values)}
    with pytest.raises(ValueError, match="final weights of 'b/kernel' contain NaN or infinity"):
        update("large_final", weights, rate=0.5, scope=scope)


def test_shapes_that_differ_are_an_error_that_names_both():
    weights = {"a/kernel": kernel(np.ones((2, 3)), final=np.ones((3, 2)))}
    with pytest.raises(ValueError, match=r"'a/kernel' have shape \(3, 2\), its mask \(2, 3\)"):
        update("large_final", weights, rate=0.5)


def test_scores_of_nan_or_of_another_shape_are_errors_that_name_the_criterion():
    def broken(group):
        return group.final * np.nan

    with pytest.raises(ValueError, match="'broken' on 'k': NaN among the scores"):
        update(broken, {"k": kernel([1, 2])}, rate=0.5)
    with pytest.raises(ValueError, match=r"on 'k': scores of shape \(1,\)"):
        update(lambda group: group.final[:1], {"k": kernel([1, 2])}, rate=0.5)


def test_a_criterion_cannot_change_the_records():
    def in_place(group):
        return np.negative(group.final, out=group.final)

    weights = {"a": kernel(np.array([[1.0], [2.0]])), "b": kernel(np.array([[3.0], [4.0]]))}
    for scope in criteria.SCOPES:
        with pytest.raises(ValueError, match="read-only"):
            update(in_place, weights, rate=0.5, scope=scope)
    assert weights["a"].final.ravel().tolist() == [1, 2]
    assert weights["b"].final.ravel().tolist() == [3, 4]


def test_nothing_to_prune_is_an_error():
    with pytest.raises(ValueError, match="no weights to prune"):
        update("large_final", {}, rate=0.5)


@pytest.mark.parametrize("scope", criteria.SCOPES)
@pytest.mark.parametrize("name", [n for n in RANKING_RECORDS if n != "smallest_weights_global"])
def test_groups_without_alive_weights_and_without_weights_stay(name, scope):
    weights = {
        "dead": kernel(np.ones((2, 3)), np.zeros((2, 3))),
        "empty": kernel(np.ones((0, 3))),
        "no_outputs": kernel(np.ones((3, 0))),
    }
    masks = update(name, weights, rate=0.5, scope=scope)
    assert not masks["dead"].any()
    assert masks["empty"].shape == (0, 3)
    assert masks["no_outputs"].shape == (3, 0)


@pytest.mark.parametrize("scope", criteria.SCOPES)
def test_a_rate_of_zero_changes_nothing(scope):
    mask = np.array([[1, 0], [0, 1]], dtype=bool)
    new = update("large_final", {"k": kernel(np.ones((2, 2)), mask)}, rate=0, scope=scope)["k"]
    np.testing.assert_array_equal(new, mask)
    assert not np.shares_memory(new, mask)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_dtypes_rank_alike(dtype):
    pytest.importorskip("ml_dtypes")
    values = np.array([3, -1, 0, -8, 5, 2]).astype(dtype)
    seen = []

    def magnitude(group):
        seen.append(group.final.dtype)
        return np.abs(group.final)

    mask = update(magnitude, {"k": kernel(values)}, rate=0.5)["k"]
    assert mask.tolist() == [True, False, False, True, True, False]
    assert seen == [np.float32 if dtype in ("float16", "bfloat16", "float32") else np.float64]


def test_half_precision_neither_rounds_nor_overflows():
    initial = np.array([-60000, -60000, 0, 2048], dtype=np.float16)
    final = np.array([60000, 59968, 0, 0.5], dtype=np.float16)
    weights = {"k": kernel(final, initial=initial)}
    # 120000, 119968, 0, 2047.5: the first two would both be infinite in float16
    for drop, kept in [(1, [1, 1, 0, 1]), (2, [1, 1, 0, 0]), (3, [1, 0, 0, 0])]:
        assert update("movement", weights, rate=drop / 4)["k"].tolist() == kept


def test_kernels_of_different_dtypes_compete_by_value():
    weights = {
        "half": kernel(np.array([1, 4], dtype=np.float16)),
        "double": kernel(np.array([4 + 1e-12, 3])),
    }
    masks = update("large_final", weights, rate=0.75, scope="global")
    assert [mask.tolist() for mask in masks.values()] == [[False, False], [True, False]]


def test_read_only_and_non_contiguous_arrays_are_fine():
    values = np.arange(24, dtype=np.float32).reshape(4, 6).T[::2]
    mask = np.ones((4, 3), dtype=bool).T
    values.flags.writeable = mask.flags.writeable = False
    new = update("large_final", {"k": kernel(values, mask)}, rate=0.5)["k"]
    np.testing.assert_array_equal(new, values > np.median(values))


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_ranking_by_magnitude_takes_less_than_three_times_the_weights_in_memory(scope):
    rng = np.random.default_rng(0)
    weights = {f"{i}": kernel(rng.standard_normal(500_000, dtype=np.float32)) for i in range(4)}
    for drop_first in (False, True):
        if drop_first:
            masks = update("large_final", weights, rate=0.2, scope=scope)
            weights = {path: kernel(weights[path].final, masks[path]) for path in weights}
        tracemalloc.start()
        update("large_final", weights, rate=0.2, scope=scope)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 3 * sum(w.final.nbytes for w in weights.values())


# ------------------------------------------------------------------- many sparsities, and chunks


BY_RECORDS = [n for n in criteria.names() if criteria.get(n).needs <= set(criteria.RECORDS)]


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
    monkeypatch.setattr(scores, "_CHUNK", 10)
    in_chunks = update(name, weights, rate=0.5, scope=scope)
    whole = dataclasses.replace(criteria.get(name), elementwise=False)
    at_once = update(whole, weights, rate=0.5, scope=scope)
    assert all((in_chunks[path] == at_once[path]).all() for path in weights)


def test_an_elementwise_criterion_cannot_change_the_records():
    criterion = dataclasses.replace(
        criteria.get("large_final"), function=lambda group: np.abs(group.final, out=group.final)
    )
    with pytest.raises(ValueError, match="read-only"):
        update(criterion, {"k": kernel([1, 2])}, rate=0.5)


def test_a_path_as_a_key_holds_for_that_path_alone():
    weights = {path: kernel(np.arange(1.0, 11.0)) for path in ("a/kernel", "b/a/kernel")}
    masks = update("large_final", weights, sparsity={"a/kernel": 0.2, "b/a/kernel": 0.7})
    assert [int((~mask).sum()) for mask in masks.values()] == [2, 7]


@pytest.mark.parametrize("name", [n for n in BY_RECORDS if criteria.get(n).elementwise])
def test_elementwise_criteria_take_less_than_three_times_the_weights_in_memory(name):
    rng = np.random.default_rng(0)
    size = 500_000
    weights = {
        f"{i}": kernel(
            rng.standard_normal(size, dtype=np.float32),
            initial=rng.standard_normal(size, dtype=np.float32),
        )
        for i in range(4)
    }
    tracemalloc.start()
    update(name, weights, rate=0.2, scope="global")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * sum(w.final.nbytes for w in weights.values())


@pytest.mark.parametrize("count", [0, 1, 2, 100, 499, 500, 501, 900, 999, 1000])
def test_so_many_flags_are_set_wherever_they_are(count, monkeypatch):
    monkeypatch.setattr(lowest, "_CHUNK", 64)
    draws = [lowest._random_flags(1000, count, np.random.default_rng(s)) for s in range(200)]
    assert {int(np.count_nonzero(flags)) for flags in draws} == {count}
    by_tenth = np.sum(draws, axis=0).reshape(10, 100).sum(axis=1)
    # The counts of a tenth are hypergeometric in each draw.
    share = count / 1000
    deviation = math.sqrt(200 * count * 0.1 * 0.9 * (1 - share) * 1000 / 999)
    np.testing.assert_allclose(by_tenth, 20 * count, atol=5 * deviation)


def test_every_choice_of_flags_is_equally_likely():
    rng = np.random.default_rng(0)
    choices = [tuple(np.flatnonzero(lowest._random_flags(6, 3, rng))) for _ in range(4000)]
    counts = [choices.count(choice) for choice in set(choices)]
    assert len(counts) == 20
    np.testing.assert_allclose(counts, 200, atol=5 * math.sqrt(200))
