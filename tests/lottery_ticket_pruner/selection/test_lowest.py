"""The lowest scores of an array against a sort, random ties, and random flags."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from lottery_ticket_pruner.selection import drop_lowest, lowest

pytestmark = pytest.mark.once


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


def partitioned(scores, mask, drop, monkeypatch):
    """Returns what `drop_lowest` does without a sample."""
    with monkeypatch.context() as patch:
        patch.setattr(lowest, "_MANY", math.inf)
        return drop_lowest(scores, mask, drop, np.random.default_rng(2))


@pytest.fixture
def sampled(monkeypatch):
    """Lets a sample decide about few scores, too."""
    monkeypatch.setattr(lowest, "_MANY", 1)
    monkeypatch.setattr(lowest, "_SAMPLE", 256)
    monkeypatch.setattr(lowest, "CHUNK", 512)
    monkeypatch.setattr(lowest, "_THREADS", 3)


def draws(rng):
    normal = rng.standard_normal(9001).astype(np.float32)
    yield normal
    yield np.round(normal, 2)
    yield np.where(normal < 0, -np.inf, normal)
    yield np.sign(normal).astype(np.int8)
    yield rng.permutation(9001)


@pytest.mark.parametrize("density", [1.0, 0.5, 0.01])
def test_a_sample_changes_no_result(density, sampled, monkeypatch):
    rng = np.random.default_rng(0)
    taken = []
    for scores in draws(rng):
        mask = rng.random(scores.size) < density
        alive = int(np.count_nonzero(mask))
        for drop in (1, alive // 5, alive // 2, alive - 1, alive):
            bounds = lowest._bounds(scores, mask, drop, alive)
            taken.append(
                bounds is not None
                and lowest._drop_between(bounds, scores, mask, drop, alive, rng) is not None
            )
            kept = drop_lowest(scores, mask, drop, np.random.default_rng(2))
            np.testing.assert_array_equal(kept, partitioned(scores, mask, drop, monkeypatch))
    assert sum(taken) > len(taken) / 3


@pytest.mark.parametrize("bounds", [(-9.0, -8.0), (8.0, 9.0), (-np.inf, np.inf)])
def test_a_misleading_sample_changes_no_result(bounds, sampled, monkeypatch):
    scores = np.random.default_rng(0).standard_normal(3000)
    mask = np.ones(3000, bool)
    monkeypatch.setattr(lowest, "_bounds", lambda *args: bounds)
    kept = drop_lowest(scores, mask, 1500, np.random.default_rng(2))
    np.testing.assert_array_equal(kept, scores > np.sort(scores)[1499])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bits_are_counted_where_a_sample_decides_nothing(dtype, sampled, monkeypatch):
    """With masks in parts, as those of several kernels."""
    monkeypatch.setattr(lowest, "_bounds", lambda *args: None)
    rng = np.random.default_rng(0)
    for scores in (rng.standard_normal(3001), rng.integers(-3, 4, 3001) / 3, -np.zeros(3001)):
        scores = scores.astype(dtype)
        scores[::7], scores[1::7], scores[2::7] = -np.inf, np.inf, 0.0
        mask = rng.random(scores.size) < 0.7
        chain = lowest.Chain(np.split(mask, [5, 5, 1400]))
        for drop in (1, 400, 1000, int(mask.sum())):
            kept = drop_lowest(scores, chain, drop, np.random.default_rng(2))
            np.testing.assert_array_equal(kept, partitioned(scores, mask, drop, monkeypatch))
    with pytest.raises(ValueError, match="NaN"):
        drop_lowest(np.append(scores, np.nan).astype(dtype), np.ones(3002, bool), 9, rng)


def test_nan_is_found_among_many_scores(sampled):
    scores = np.random.default_rng(0).standard_normal(3000)
    scores[2345] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        drop_lowest(scores, np.ones(3000, bool), 600, np.random.default_rng(0))


def test_drop_lowest_refuses_invalid_arguments():
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


@pytest.mark.parametrize("count", [0, 1, 2, 100, 499, 500, 501, 900, 999, 1000])
def test_so_many_flags_are_set_wherever_they_are(count, monkeypatch):
    monkeypatch.setattr(lowest, "CHUNK", 64)
    draws = [lowest._random_flags(1000, count, np.random.default_rng(s)) for s in range(200)]
    assert {int(np.count_nonzero(flags)) for flags in draws} == {count}
    by_tenth = np.sum(draws, axis=0).reshape(10, 100).sum(axis=1)
    # Counts within a tenth are hypergeometric in each draw.
    share = count / 1000
    deviation = math.sqrt(200 * count * 0.1 * 0.9 * (1 - share) * 1000 / 999)
    np.testing.assert_allclose(by_tenth, 20 * count, atol=5 * deviation)


def test_every_choice_of_flags_is_equally_likely():
    rng = np.random.default_rng(0)
    choices = [tuple(np.flatnonzero(lowest._random_flags(6, 3, rng))) for _ in range(4000)]
    counts = [choices.count(choice) for choice in set(choices)]
    assert len(counts) == 20
    np.testing.assert_allclose(counts, 200, atol=5 * math.sqrt(200))
