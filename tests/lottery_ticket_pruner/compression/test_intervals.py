"""Confidence intervals: a published example, and how often they contain the truth."""

import numpy as np
import pytest
import scipy.stats

from lottery_ticket_pruner.compression.intervals import of_mean, of_paired_shares

pytestmark = pytest.mark.once


def pairs(both, only_first, only_second, neither):
    counts = [both, only_first, only_second, neither]
    return np.repeat([True, True, False, False], counts), np.repeat([True, False] * 2, counts)


def test_a_published_interval_of_paired_shares():
    # Newcombe, Statistics in Medicine 17 (1998), table II (a), method 10.
    low, high = of_paired_shares(*pairs(36, 12, 2, 0))
    assert (low, high) == pytest.approx((0.0569, 0.3404), abs=5e-5)


def test_models_that_agree_everywhere_are_not_surely_equal():
    low, high = of_paired_shares(*pairs(90, 0, 0, 10))
    assert -0.05 < low < 0 < high < 0.05
    low, high = of_paired_shares(*pairs(100, 0, 0, 0))
    assert -0.06 < low < 0 < high < 0.06


@pytest.mark.parametrize("chances", [(0.9, 0.04, 0.02, 0.04), (0.97, 0.015, 0.005, 0.01)])
def test_nineteen_of_twenty_intervals_contain_the_true_difference(chances):
    rng = np.random.default_rng(0)
    truth = chances[1] - chances[2]
    found = [of_paired_shares(*pairs(*rng.multinomial(400, chances))) for _ in range(1_000)]
    assert 0.93 < np.mean([low <= truth <= high for low, high in found]) < 0.99


def test_exchanged_models_have_the_opposite_interval():
    first, second = pairs(80, 9, 3, 8)
    low, high = of_paired_shares(first, second)
    assert of_paired_shares(second, first) == pytest.approx((-high, -low))


def test_the_bootstrap_agrees_with_students_t_for_normal_differences():
    differences = np.random.default_rng(0).normal(0.3, 1.0, 200)
    sem = scipy.stats.sem(differences)
    expected = scipy.stats.t.interval(0.95, 199, differences.mean(), sem)
    assert of_mean(differences) == pytest.approx(expected, abs=0.15 * sem)
