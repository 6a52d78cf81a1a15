"""Prunes an exact number of lowest scores. Ties are broken at random.

Among many scores, a sample finds two values between which the threshold lies, so that only the
scores between them have to be partitioned. One pass over the scores, in parts that fit into the
processor's cache, then compares all others. The result is that of a partition of all of them.
"""

import functools
import itertools
import math
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

import numpy as np

CHUNK = 2**17
"""Number of entries read or drawn at a time, so that they fit into the processor's cache."""

# Number of scores in a sample, and from how many scores on one is drawn.
_SAMPLE = 2**16
_MANY = 2**20
# Distance of the two values from the quantile of the sample, in standard deviations.
_DEVIATIONS = 5.0
_THREADS = min(4, os.cpu_count() or 1)

NAN = "NaN among the scores of kept weights; scores must be numbers."


class Computed(Protocol):
    """Scores of weights that are computed when they are read, like a 1-D array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""

    @property
    def in_threads(self) -> bool:
        """True if several threads may read it."""

    def __getitem__(self, key: Any) -> Any:
        """Returns the scores of a range, or of positions in ascending order."""


Scores: TypeAlias = np.ndarray | Computed


def read_all(scores: Scores) -> np.ndarray:
    """Returns all scores as an array."""
    if isinstance(scores, np.ndarray):
        return scores
    whole = np.empty(scores.shape, scores[:0].dtype)
    for start in range(0, whole.size, CHUNK):
        whole[start : start + CHUNK] = scores[start : start + CHUNK]
    return whole


def drop_lowest(
    scores: Scores, mask: np.ndarray, drop: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a new mask without the `drop` lowest scores of kept weights; pruned ones stay pruned.

    Args:
        scores: 1-D array of real numbers, which may include minus infinity.
        mask: Bool array of the same shape, True where a weight is kept. It is not changed.
        drop: Number of kept weights to prune.
        rng: Random generator for breaking ties at the threshold.

    Raises:
        ValueError: If the shapes differ, a kept weight has a score of NaN, or `drop` is negative or
            above the number of kept weights.
    """
    alive = check_drop(scores, mask, drop)
    if drop == 0:
        return mask.copy()
    bounds = _bounds(scores, mask, drop, alive) if mask.size >= _MANY else None
    kept = None if bounds is None else _drop_between(bounds, scores, mask, drop, alive, rng)
    if kept is not None:
        return kept
    scores = read_all(scores)
    threshold = _nth(scores.copy() if alive == mask.size else scores[mask], drop - 1)
    return drop_up_to(threshold, scores, mask, alive - drop, rng)


def _nth(ranked: np.ndarray, number: int) -> Any:
    """Returns the score of a rank, counted from 0. The array is partitioned in place.

    Raises:
        ValueError: If a score is NaN.
    """
    lowest = ranked.min()
    if np.isnan(lowest):
        raise ValueError(NAN)
    # Partitioning is ten times as slow with many equal scores (flipped weights, weights that never
    # moved), and in practice these are the lowest ones.
    if number < np.count_nonzero(ranked == lowest):
        return lowest
    ranked.partition(number)
    return ranked[number]


def _bounds(scores: Scores, mask: np.ndarray, drop: int, alive: int) -> tuple[Any, Any] | None:
    """Returns two scores between which the threshold very probably lies, or None."""
    # The same positions every time: they decide nothing but how much is left to partition.
    drawn = np.random.default_rng(0).integers(mask.size, size=_SAMPLE)
    drawn.sort()
    drawn = drawn[mask[drawn]]
    if not drawn.size:
        return None
    sample = np.sort(scores[drawn])
    share = drop / alive
    distance = _DEVIATIONS * math.sqrt(sample.size * share * (1 - share)) + 1
    first = math.floor(sample.size * share - distance)
    last = math.ceil(sample.size * share + distance)
    low = sample[first] if first >= 0 else -np.inf
    high = sample[last] if last < sample.size else np.inf
    return (low, high) if low < high else None


def _drop_between(
    bounds: tuple[Any, Any],
    scores: Scores,
    mask: np.ndarray,
    drop: int,
    alive: int,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Does what `drop_lowest` does if the threshold lies between two scores, else returns None."""
    kept = np.empty(mask.size, bool)
    # Each thread compares neighbouring parts; NumPy does not hold other threads up meanwhile.
    threads = _THREADS if isinstance(scores, np.ndarray) or scores.in_threads else 1
    ends = np.linspace(0, -(-mask.size // CHUNK), threads + 1, dtype=int) * CHUNK
    ranges = [range(*pair, CHUNK) for pair in itertools.pairwise(ends.tolist())]
    compare = functools.partial(_compare, bounds, scores, mask, kept)
    if threads == 1:
        parts = [*map(compare, ranges)]
    else:
        with ThreadPoolExecutor(threads) as pool:
            parts = [*pool.map(compare, ranges)]
    if any(part is None for part in parts):
        return None
    places, ranked = (np.concatenate(arrays) for arrays in zip(*filter(None, parts), strict=True))
    above = int(np.count_nonzero(kept))
    number = drop - 1 - (alive - above - ranked.size)
    if not 0 <= number < ranked.size:  # The sample was misleading.
        return None
    threshold = _nth(ranked.copy(), number)
    everyone = np.ones(ranked.size, bool)
    kept[places] = drop_up_to(threshold, ranked, everyone, alive - drop - above, rng)
    return kept


def _compare(
    bounds: tuple[Any, Any], scores: Scores, mask: np.ndarray, kept: np.ndarray, starts: range
) -> tuple[np.ndarray, np.ndarray] | None:
    """Flags kept weights whose scores are above two bounds, and finds those in between.

    Args:
        bounds: The lower and the upper bound.
        scores: Scores of all weights.
        mask: Which of them are kept so far.
        kept: Bool array that receives the flags.
        starts: Starts of the chunks to look at.

    Returns:
        The positions and scores of weights that are neither below nor above, including NaN; or
        None if these are too many for positions to be worth it.
    """
    low, high = bounds
    places, values, found = [np.empty(0, int)], [scores[:0]], 0
    for start in starts:
        chunk = slice(start, start + CHUNK)
        part, flags, above = scores[chunk], mask[chunk], kept[chunk]
        np.greater(part, high, out=above)
        above &= flags
        between = part < low
        between |= above
        np.less(between, flags, out=between)
        place = np.flatnonzero(between)
        values.append(part[place])
        place += start
        places.append(place)
        found += place.size
        if found > mask.size // 8:
            return None
    return np.concatenate(places), np.concatenate(values)


def check_drop(scores: Scores, mask: np.ndarray, drop: int) -> int:
    """Validates the arguments of `drop_lowest` and returns the number of kept weights."""
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {scores.shape} for a mask of shape {mask.shape}.")
    alive = int(np.count_nonzero(mask))
    if not 0 <= drop <= alive:
        raise ValueError(f"`drop` must be in [0, {alive}], the kept weights. Received: {drop}")
    return alive


def drop_up_to(
    threshold: float, scores: np.ndarray, mask: np.ndarray, keep: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a mask of `keep` weights: all above the threshold, and a random choice of ties."""
    kept = scores > threshold
    kept &= mask
    spared = keep - int(np.count_nonzero(kept))
    if spared:
        tied = scores == threshold
        tied &= mask
        kept[tied] = _random_flags(int(np.count_nonzero(tied)), spared, rng)
    return kept


def _random_flags(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `size` flags with exactly `count` of them set, uniformly at random.

    With most sign criteria, nearly all weights are tied, and shuffling them costs ten times as much
    as finding the threshold. Instead, each flag is set independently with a probability that leaves
    a few flags missing (four standard deviations). These are then drawn from the unset ones.
    """
    if count > size // 2:
        return ~_random_flags(size, size - count, rng)
    share = max(count - 4 * math.sqrt(count), 0) / size
    flags = np.zeros(size, dtype=bool)
    missing = -1
    while missing < 0:
        for start in range(0, size if share else 0, CHUNK):
            part = flags[start : start + CHUNK]
            np.less(rng.random(part.size, dtype=np.float32), share, out=part)
        missing = count - int(np.count_nonzero(flags))
    while missing:
        drawn = np.unique(rng.integers(size, size=missing))
        drawn = drawn[~flags[drawn]]
        flags[drawn] = True
        missing -= drawn.size
    return flags
