"""Missing or damaged records, dtypes, memory: what selection refuses and accepts."""

import dataclasses
import threading
import tracemalloc

import numpy as np
import pytest

from kernels import BY_RECORDS, RANKING_RECORDS, kernel
from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection import Weights, lowest, update

pytestmark = pytest.mark.once


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
    with pytest.raises(
        TypeError, match="NoneType"
    ):  # No record is missing: the function itself fails.
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
def test_groups_without_kept_weights_and_without_weights_are_not_changed(name, scope):
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


def test_kernels_of_different_dtypes_are_ranked_by_value():
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


def test_an_elementwise_criterion_cannot_change_the_records():
    criterion = dataclasses.replace(
        criteria.get("large_final"), function=lambda group: np.abs(group.final, out=group.final)
    )
    with pytest.raises(ValueError, match="read-only"):
        update(criterion, {"k": kernel([1, 2])}, rate=0.5)


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


def parts_of(function, sizes=((7, 5), (30, 40))):
    """Prunes a model of two kernels by a function that is declared elementwise."""
    rng = np.random.default_rng(0)
    weights = {str(i): kernel(rng.standard_normal(size)) for i, size in enumerate(sizes)}
    criterion = dataclasses.replace(criteria.get("large_final"), function=function)
    return weights, update(criterion, weights, rate=0.5, scope="global")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda group: group.rng.random(group.mask.shape),
            r"cannot use `group.rng` \(`rng.random`",
        ),
        (lambda group: np.abs(group.final) / np.abs(group.final).mean(), "change with the other"),
        (lambda group: group.final.argsort().argsort().astype(float), "change with the other"),
        (lambda group: np.linalg.norm(group.final), r"shape \(\) for weights of shape"),
    ],
    ids=["generator", "mean", "ranks", "single"],
)
def test_functions_that_only_claim_to_be_elementwise_are_refused(function, message):
    with pytest.raises(ValueError, match=message):
        parts_of(function)


def test_an_elementwise_function_of_users_may_reuse_an_array_and_is_called_in_one_thread(
    monkeypatch,
):
    monkeypatch.setattr(lowest, "_MANY", 1)
    monkeypatch.setattr(lowest, "CHUNK", 64)
    monkeypatch.setattr(lowest, "_SAMPLE", 256)
    threads, buffer = set(), np.empty(2000)

    def reusing(group):
        threads.add(threading.get_ident())
        return np.abs(group.final, out=buffer[: group.final.size])

    weights, masks = parts_of(reusing)
    assert len(threads) == 1
    whole = np.concatenate([np.abs(each.final).ravel() for each in weights.values()])
    median = np.sort(whole)[whole.size // 2 - 1]
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, np.abs(weights[path].final) > median)
