"""Finds the fewest weights to prune, so that what is stored of a model fits into so many bytes."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from lottery_ticket_pruner.checks import is_integer

# A result that takes this much less than the budget is close enough.
_CLOSE = 0.005
# Number of sparsities to try at most.
_TRIALS = 20

Masks = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class StoredSize:
    """Bytes that are stored of a model.

    Attributes:
        dense: Bytes of all weights, in their dtypes.
        of: Function from masks by path to the bytes that are stored with them.
    """

    dense: int
    of: Callable[[Mapping[str, np.ndarray]], int]


def within_bytes(
    budget: float, size: StoredSize, most: float, masks_at: Callable[[float], Masks]
) -> Masks:
    """Returns the masks of about the smallest sparsity with which a model fits into a budget.

    Bytes are counted by encoding the weights, and sparsities are found between two on both sides
    of the budget: by a line through both, and every third time halfway.

    Args:
        budget: Share of the dense bytes, in (0, 1], or an integer above 1: bytes.
        size: Function that counts the bytes.
        most: Greatest sparsity that is possible.
        masks_at: Function from a sparsity to masks.

    Raises:
        ValueError: If the budget cannot be met. The message has the smallest number of bytes.
    """
    limit = int(budget) if is_integer(budget) and budget > 1 else int(budget * size.dense)
    low, best = 0.0, masks_at(0.0)
    at_low = size.of(best)
    if at_low <= limit:
        return best
    high, best = most, masks_at(most)
    at_high = size.of(best)
    if at_high > limit:
        raise ValueError(
            f"A budget of {limit:,} bytes cannot be met: with as many weights pruned as possible, "
            f"{at_high:,} bytes are stored, and {size.dense:,} without encoding. Weights without a "
            "mask and one value of each layer are left. Pass a larger budget, or mask more layers."
        )
    for trial in range(_TRIALS):
        if at_high >= (1 - _CLOSE) * limit:
            break
        share = (at_low - (1 - _CLOSE / 2) * limit) / (at_low - at_high)
        share = 0.5 if trial % 3 == 2 else min(max(share, 0.02), 0.98)
        middle = low + share * (high - low)
        masks = masks_at(middle)
        found = size.of(masks)
        if found <= limit:
            high, at_high, best = middle, found, masks
        else:
            low, at_low = middle, found
    return best
