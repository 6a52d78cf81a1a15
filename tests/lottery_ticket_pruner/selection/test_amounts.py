"""Exact counts of pruned weights, from rates, sparsities and mappings."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import kernel
from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection import drop_count, update

pytestmark = pytest.mark.once


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
    with pytest.raises(
        ValueError, match=r"Requested sparsity 0\.5.*'b/kernel' is already sparser: 3 of 4"
    ):
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
    with pytest.raises(ValueError, match=r"key '\(', which is not a valid regular"):
        update("large_final", weights, rate={"(": 0.5, "default": 0.1})
    with pytest.raises(ValueError, match=r"key 1, which is not a valid regular"):
        update("large_final", weights, rate={1: 0.5, "default": 0.1})
    with pytest.raises(ValueError, match='contradicts scope="global"'):
        update("large_final", weights, rate={"default": 0.5}, scope="global")
    with pytest.raises(ValueError, match=r"'ouput' of `rate` matches no path.*b/kernel"):
        update("large_final", weights, rate={"ouput": 0.1, "default": 0.5})


def test_a_path_as_a_key_holds_for_that_path_alone():
    weights = {path: kernel(np.arange(1.0, 11.0)) for path in ("a/kernel", "b/a/kernel")}
    masks = update("large_final", weights, sparsity={"a/kernel": 0.2, "b/a/kernel": 0.7})
    assert [int((~mask).sum()) for mask in masks.values()] == [2, 7]
