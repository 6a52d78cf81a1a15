"""Prunes an exact number of lowest scores. Ties are broken at random.

Among many scores, a sample finds two values between which the threshold lies, so that only the
scores between them have to be partitioned. One pass over the scores, in parts that fit into the
processor's cache, then compares all others. Where that fails, as with many equal scores, their
bits are counted in a few passes until the threshold is known. Either way no array of all scores is
made, and the result is that of a partition of all of them.
"""

import functools
import itertools
import math
import os
from collections.abc import Iterator, Sequence
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
# Share of the scores up to which the scores between the two values are worth their positions, which
# take 8 bytes each.
_BETWEEN = 32
# Number of bits that are counted in a pass.
_DIGIT = 16

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


class Chain:
    """Flat arrays one after the other, read like one 1-D array without making it.

    Args:
        arrays: 1-D arrays, at least one, of one dtype.

    Attributes:
        shape: Shape of the whole.
        size: Number of its elements.
    """

    def __init__(self, arrays: Sequence[np.ndarray]) -> None:
        self._arrays = arrays
        self._ends = np.cumsum([array.size for array in arrays]).tolist()
        self.size = int(self._ends[-1])
        self.shape = (self.size,)

    def keys(self, key: slice | np.ndarray) -> list[slice | np.ndarray]:
        """Returns the part of a range, or of positions in ascending order, in each array."""
        starts = [0, *self._ends[:-1]]
        if not isinstance(key, slice):
            numbers = np.searchsorted(key, [0, *self._ends])
            parts = [key[first:last] for first, last in itertools.pairwise(numbers)]
            return [part - start for part, start in zip(parts, starts, strict=True)]
        first, last, _ = key.indices(self.size)
        return [
            slice(max(0, first - start), max(0, min(last, end) - start))
            for start, end in zip(starts, self._ends, strict=True)
        ]

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Returns the elements of a range without a step, or of positions in ascending order."""
        found = [array[part] for array, part in zip(self._arrays, self.keys(key), strict=True)]
        found = [part for part in found if part.size] or found[:1]
        return found[0] if len(found) == 1 else np.concatenate(found)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns all elements as a new array."""
        return np.concatenate(self._arrays).astype(dtype or self._arrays[0].dtype, copy=False)

    def count(self) -> int:
        """Returns the number of elements that are not zero."""
        return sum(int(np.count_nonzero(array)) for array in self._arrays)


Scores: TypeAlias = np.ndarray | Computed
Flags: TypeAlias = np.ndarray | Chain


def count(flags: Flags) -> int:
    """Returns how many flags are set."""
    return flags.count() if isinstance(flags, Chain) else int(np.count_nonzero(flags))


def read_all(scores: Scores) -> np.ndarray:
    """Returns all scores as an array."""
    if isinstance(scores, np.ndarray):
        return scores
    whole = np.empty(scores.shape, scores[:0].dtype)
    for start in range(0, whole.size, CHUNK):
        whole[start : start + CHUNK] = scores[start : start + CHUNK]
    return whole


def drop_lowest(scores: Scores, mask: Flags, drop: int, rng: np.random.Generator) -> np.ndarray:
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
        return np.array(mask)
    if mask.size >= _MANY:
        bounds = _bounds(scores, mask, drop, alive)
        kept = None if bounds is None else _drop_between(bounds, scores, mask, drop, alive, rng)
        if kept is not None:
            return kept
        if scores[:0].dtype in (np.float32, np.float64):
            return _drop_in_parts(scores, mask, drop, alive, rng)
    scores, mask = read_all(scores), np.asarray(mask)
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


def _drop_in_parts(
    scores: Scores, mask: Flags, drop: int, alive: int, rng: np.random.Generator
) -> np.ndarray:
    """Does what `drop_lowest` does in passes over parts of floating-point scores."""
    threshold = _nth_in_parts(scores, mask, drop - 1)
    kept, tied = np.empty(mask.size, bool), 0
    for chunk in _chunks(mask.size):
        part, flags = scores[chunk], mask[chunk]
        np.greater(part, threshold, out=kept[chunk])
        kept[chunk] &= flags
        tied += int(np.count_nonzero((part == threshold) & flags))
    spared = alive - drop - int(np.count_nonzero(kept))
    if spared:
        flags, taken = _random_flags(tied, spared, rng), 0
        for chunk in _chunks(mask.size):
            places = np.flatnonzero((scores[chunk] == threshold) & mask[chunk])
            kept[chunk][places] = flags[taken : taken + places.size]
            taken += places.size
    return kept


def _chunks(size: int) -> Iterator[slice]:
    for start in range(0, size, CHUNK):
        yield slice(start, start + CHUNK)


def _nth_in_parts(scores: Scores, mask: Flags, number: int) -> Any:
    """Returns the score of a kept weight by its rank, counted from 0.

    Each pass finds the next bits of the score, by counting these bits in all scores whose bits
    before are the same.

    Raises:
        ValueError: If a score is NaN.
    """
    dtype = scores[:0].dtype
    bits, prefix = 8 * dtype.itemsize, 0
    for shift in range(bits - _DIGIT, -1, -_DIGIT):
        counts = np.zeros(1 << _DIGIT, np.int64)
        for chunk in _chunks(mask.size):
            keys = _ordered_bits(scores[chunk][mask[chunk]])
            if shift + _DIGIT < bits:
                keys = keys[keys >> keys.dtype.type(shift + _DIGIT) == prefix]
            digits = (keys >> keys.dtype.type(shift)) & keys.dtype.type((1 << _DIGIT) - 1)
            counts += np.bincount(digits.astype(np.intp), minlength=1 << _DIGIT)
        ends = np.cumsum(counts)
        digit = int(np.searchsorted(ends, number, side="right"))
        number -= int(ends[digit] - counts[digit])
        prefix = (prefix << _DIGIT) | digit
    top = 1 << (bits - 1)
    pattern = prefix ^ top if prefix & top else prefix ^ ((1 << bits) - 1)
    return np.array(pattern, f"u{dtype.itemsize}").view(dtype)[()]


def _ordered_bits(scores: np.ndarray) -> np.ndarray:
    """Returns unsigned integers in the order of floating-point scores, -0.0 below 0.0."""
    if np.isnan(scores).any():
        raise ValueError(NAN)
    signed = f"i{scores.itemsize}"
    keys = scores.view(signed)
    # Negative numbers have their bits inverted, others only the sign.
    keys = keys ^ ((keys >> (8 * scores.itemsize - 1)) | np.iinfo(signed).min)
    return keys.view(f"u{scores.itemsize}")


def _bounds(scores: Scores, mask: Flags, drop: int, alive: int) -> tuple[Any, Any] | None:
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
    mask: Flags,
    drop: int,
    alive: int,
    rng: np.random.Generator,
) -> np.ndarray | None:
    """Does what `drop_lowest` does if the threshold lies between two scores, else returns None."""
    kept = np.empty(mask.size, bool)
    # Each thread compares neighboring parts; NumPy does not hold other threads up meanwhile.
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
    bounds: tuple[Any, Any], scores: Scores, mask: Flags, kept: np.ndarray, starts: range
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
        if found > mask.size // _BETWEEN:
            return None
    return np.concatenate(places), np.concatenate(values)


def check_drop(scores: Scores, mask: Flags, drop: int) -> int:
    """Validates the arguments of `drop_lowest` and returns the number of kept weights."""
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {scores.shape} for a mask of shape {mask.shape}.")
    alive = count(mask)
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
