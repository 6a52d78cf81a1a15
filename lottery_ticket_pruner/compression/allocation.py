"""Divides the sparsity of a model among its weights, so that none loses everything."""

import math
import re
from collections.abc import Mapping

import numpy as np

# 0.29 * 100 is 28.999999999999996 in floating point, but means 29.
_ROUNDING = 1e-6


def kept_counts(values: Mapping[str, np.ndarray], count: int) -> dict[str, int]:
    """Returns how many entries of each weight to keep, by layer-adaptive magnitude (LAMP).

    The score of an entry is its square over the sum of the squares of all entries of the same
    weight that are at least as large. The entries with the highest scores of the whole model are
    kept. Within a weight, these are the largest ones. The score of the largest one is 1, so each
    weight keeps something, however small its values are (Lee et al., arXiv 2010.07611).

    Args:
        values: The entries of each weight that are still kept, in any shape, by path.
        count: Number of entries to keep in the whole model, at least one for each weight that
            has any.

    Raises:
        ValueError: If `count` is less than that, or more than there are.
    """
    scores = {path: _scores(array) for path, array in values.items()}
    size = sum(len(one) for one in scores.values())
    least = sum(bool(len(one)) for one in scores.values())
    if not least <= count <= size:
        raise ValueError(
            f"Expected to keep from {least} to {size} weights, at least one of each kernel. "
            f"Received: {count}."
        )
    joined = np.concatenate([*scores.values(), np.zeros(0)])
    owners = np.repeat(np.arange(len(scores)), [len(one) for one in scores.values()])
    # Stable, so that of equal scores the earlier weight is kept.
    kept = owners[np.argsort(-joined, kind="stable")[:count]]
    counts = np.bincount(kept, minlength=len(scores))
    return dict(zip(scores, map(int, counts), strict=True))


def sparsities(
    weights: Mapping[str, np.ndarray], masks: Mapping[str, np.ndarray], density: float
) -> dict[str, float]:
    """Returns the sparsity of each weight by pattern, as an argument of `update_masks`.

    Args:
        weights: Values by path.
        masks: Masks by path. Pruned entries stay pruned.
        density: Share of all entries to keep. At least one entry of each weight is kept, and at
            most those that the masks keep.
    """
    kept = {path: array[masks[path]] for path, array in weights.items()}
    size = sum(mask.size for mask in masks.values())
    least = sum(bool(array.size) for array in kept.values())
    alive = sum(array.size for array in kept.values())
    count = min(max(count_of(size, density), least), alive)
    return {
        f"^{re.escape(path)}$": 1 - number / masks[path].size
        for path, number in kept_counts(kept, count).items()
    }


def count_of(size: int, density: float) -> int:
    """Returns the number of entries to keep, as `update_masks` counts them."""
    return size - math.floor((1 - density) * size + _ROUNDING)


def _scores(array: np.ndarray) -> np.ndarray:
    """Returns the scores from the largest entry to the smallest."""
    squares = np.sort(np.square(array.reshape(-1).astype("float64")))[::-1]
    sums = np.cumsum(squares)
    scores = np.divide(squares, sums, out=np.zeros_like(squares), where=sums > 0)
    scores[:1] = 1.0
    return scores
