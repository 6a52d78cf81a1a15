"""Drops the lowest scores, to the exact count; chance decides among equal ones.

Ranking is by partition, which costs little more than finding one order statistic.
"""

import hashlib
import math

import numpy as np

# Entries drawn at a time, which stay in the processor's cache.
_CHUNK = 2**17

NAN = "NaN among the scores of alive weights; scores must be numbers."


def drop_lowest(
    scores: np.ndarray, mask: np.ndarray, drop: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns a new mask without the `drop` lowest scores of kept weights; pruned ones stay pruned.

    Args:
        scores: 1-D array of real numbers; minus infinity is legal.
        mask: Bool array of the same shape, True where a weight is kept. Not changed.
        drop: Number of kept weights to drop.
        rng: Generator that decides which of several weights with the score at the threshold go.

    Raises:
        ValueError: If the shapes differ, there is a NaN among the scores of kept weights, or `drop`
            is negative or more than are kept.
    """
    alive = check_drop(scores, mask, drop)
    if drop == 0:
        return mask.copy()
    ranked = scores.copy() if alive == mask.size else scores[mask]
    lowest = ranked.min()
    if np.isnan(lowest):
        raise ValueError(NAN)
    # Many equal scores (flipped weights, weights that never moved) slow a partition down tenfold,
    # and in practice they are the lowest ones.
    if drop <= np.count_nonzero(ranked == lowest):
        threshold = lowest
    else:
        ranked.partition(drop - 1)
        threshold = ranked[drop - 1]
    del ranked  # as large as the scores: not wanted beside the arrays below
    return drop_up_to(threshold, scores, mask, alive - drop, rng)


def check_drop(scores: np.ndarray, mask: np.ndarray, drop: int) -> int:
    """Checks the arguments of `drop_lowest` and returns how many weights are kept."""
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {scores.shape} for a mask of shape {mask.shape}.")
    alive = int(np.count_nonzero(mask))
    if not 0 <= drop <= alive:
        raise ValueError(f"`drop` must be in [0, {alive}], the number alive. Received: {drop}")
    return alive


def drop_up_to(
    threshold: float, scores: np.ndarray, mask: np.ndarray, keep: int, rng: np.random.Generator
) -> np.ndarray:
    """Returns the mask of `keep` weights: those above the threshold, and some that are at it."""
    kept = scores > threshold
    kept &= mask
    spared = keep - int(np.count_nonzero(kept))
    if spared:
        tied = scores == threshold
        tied &= mask
        kept[tied] = _random_flags(int(np.count_nonzero(tied)), spared, rng)
    return kept


def _random_flags(size: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Returns `size` flags of which `count` are set, every choice being equally likely.

    In most criteria of signs nearly all weights are tied, and a shuffle of so many costs ten times
    what finding their threshold does. Here each is drawn alone with a share that leaves a few
    flags missing (four standard deviations), and those are then drawn from the others.
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


def generator(seed: int, path: str) -> np.random.Generator:
    """Returns the random stream of a seed and a path, the same in every process."""
    # Not hash(): that one differs between processes.
    digest = hashlib.sha256(path.encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([int(seed), int.from_bytes(digest, "big")]))
