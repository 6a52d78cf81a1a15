"""Prunes an exact number of lowest scores. Ties are broken at random.

Scores are partitioned, which costs little more than finding a single order statistic.
"""

import math

import numpy as np

# Number of entries drawn at a time, so that they fit into the processor's cache.
_CHUNK = 2**17

NAN = "NaN among the scores of kept weights; scores must be numbers."


def drop_lowest(
    scores: np.ndarray, mask: np.ndarray, drop: int, rng: np.random.Generator
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
    ranked = scores.copy() if alive == mask.size else scores[mask]
    lowest = ranked.min()
    if np.isnan(lowest):
        raise ValueError(NAN)
    # Partitioning is ten times as slow with many equal scores (flipped weights, weights that never
    # moved), and in practice these are the lowest ones.
    if drop <= np.count_nonzero(ranked == lowest):
        threshold = lowest
    else:
        ranked.partition(drop - 1)
        threshold = ranked[drop - 1]
    del ranked  # as large as the scores, so freed before the arrays below are created
    return drop_up_to(threshold, scores, mask, alive - drop, rng)


def check_drop(scores: np.ndarray, mask: np.ndarray, drop: int) -> int:
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
        for start in range(0, size if share else 0, _CHUNK):
            part = flags[start : start + _CHUNK]
            np.less(rng.random(part.size, dtype=np.float32), share, out=part)
        missing = count - int(np.count_nonzero(flags))
    while missing:
        drawn = np.unique(rng.integers(size, size=missing))
        drawn = drawn[~flags[drawn]]
        flags[drawn] = True
        missing -= drawn.size
    return flags
