"""The search for the lowest density, against made-up results and brute force."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from lottery_ticket_pruner.compression.ladder import Attempt, Ladder, density_of_size

pytestmark = pytest.mark.once


def climb(ladder, is_good):
    tried = []
    while (density := ladder.following(tried)) is not None:
        assert ladder.lowest <= density < ladder.best(tried)
        tried.append(Attempt(density, is_good(density)))
        assert len(tried) < 100
    return tried


@given(
    st.floats(0.002, 1.0),
    st.floats(0.1, 0.9),
    st.floats(1.02, 1.5),
    st.floats(0.001, 0.2),
)
def test_the_lowest_good_density_is_found_to_the_precision(edge, rate, precision, lowest):
    ladder = Ladder(rate=rate, precision=precision, lowest=lowest)
    tried = climb(ladder, lambda density: density >= edge)
    best = ladder.best(tried)
    # By brute force over a fine grid, the lowest good density is the edge.
    grid = np.geomspace(lowest, 1, 2_000)
    truth = min([*grid[grid >= edge], 1.0])
    assert best >= min(edge, 1.0)
    assert best <= max(truth, lowest) * precision * (1 + 1e-9)
    steps = math.ceil(math.log(best) / math.log(1 - rate)) + 1
    halvings = math.ceil(math.log2(max(-math.log(1 - rate) / math.log(precision), 1))) + 1
    assert len(tried) <= steps + halvings + 1


@given(st.floats(0.01, 0.9), st.floats(0.1, 0.9))
def test_attempts_towards_a_target_are_foreseen(target, rate):
    ladder = Ladder(rate=rate, target=target)
    tried = climb(ladder, lambda density: True)
    for number in range(len(tried) + 1):
        assert ladder.expected(tried[:number]) == len(tried) - number


@given(st.floats(0.1, 0.9), st.floats(1.02, 1.5), st.integers(0, 3))
def test_attempts_after_the_first_bad_one_are_foreseen(rate, precision, good):
    ladder = Ladder(rate=rate, precision=precision, lowest=1e-6)
    tried = climb(ladder, lambda density: density > (1 - rate) ** (good + 0.5))
    for number in range(good, len(tried) + 1):
        assert abs(ladder.expected(tried[:number]) - (len(tried) - number)) <= 1


@given(st.lists(st.booleans(), min_size=60, max_size=60), st.floats(0.01, 0.5))
def test_any_results_end_the_search_and_only_good_ones_are_best(results, target):
    outcomes = iter(results)
    ladder = Ladder(target=target, lowest=0.001)
    tried = climb(ladder, lambda density: next(outcomes))
    good = [attempt.density for attempt in tried if attempt.accepted]
    assert ladder.best(tried) == min([1.0, *good])
    assert min([1.0, *(attempt.density for attempt in tried)]) >= target


@given(st.integers(1, 60), st.integers(1, 80), st.floats(0.05, 0.9), st.floats(1.001, 1.3))
def test_no_two_attempts_keep_the_same_number(edge, size, rate, precision):
    ladder = Ladder(rate=rate, precision=precision, lowest=1 / size, size=size)
    tried = climb(ladder, lambda density: density * size > edge - 0.5)
    counts = [round(attempt.density * size) for attempt in tried]
    np.testing.assert_allclose([attempt.density * size for attempt in tried], counts)
    assert len(set(counts)) == len(counts)
    best = round(ladder.best(tried) * size)
    # By brute force: the least good number, unless the precision allows to stop before.
    least = min([*(count for count in range(1, size + 1) if count >= edge), size])
    assert least <= best
    assert best <= least * precision + 1


def test_a_target_is_reached_exactly_in_geometric_steps():
    tried = climb(Ladder(target=0.1), lambda density: True)
    assert [attempt.density for attempt in tried] == [0.5, 0.25, 0.125, 0.1]


def test_the_search_goes_on_from_where_an_earlier_method_ended():
    tried = climb(Ladder(start=0.4), lambda density: density > 0.15)
    assert [round(attempt.density, 3) for attempt in tried[:3]] == [0.2, 0.1, 0.141]


@given(st.floats(0.2, 1.3), st.floats(0.0, 0.3), st.integers(10_000, 300_000))
def test_a_density_of_a_size_is_close_below_it(power, share_of_graph, goal):
    measured = []

    def size_at(density):
        measured.append(density)
        return round(200_000 * (share_of_graph + density**power))

    least = size_at(0.01)
    assume(least <= goal)
    found = density_of_size(size_at, goal, (0.01, least))
    size = size_at(found)
    assert size <= goal
    assert size >= 0.9 * goal or found == 1.0 or found == 0.01
    assert len(measured) <= 12
    # Without the time for more than the two ends, it is where the size is expected to be.
    measured.clear()
    rough = density_of_size(size_at, goal, (0.01, least), may_go_on=lambda: False)
    assert measured == [1.0]
    expected = np.interp(rough, [0.01, 1.0], [least, size_at(1.0)])
    assert 0.97 * goal <= expected <= goal or rough == 1.0 or rough < 0.03
