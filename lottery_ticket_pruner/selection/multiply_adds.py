"""Finds the fewest weights to prune, so that so many multiply-adds are left."""

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

Masks = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class MultiplyAdds:
    """Multiply-adds for one example, if every kernel multiplies by its kept weights only.

    Attributes:
        uses: Number of multiply-adds of each weight of a kernel, by its path. Kernels that are not
            listed have none.
        rest: Multiply-adds that no mask saves.
        sizes: Sizes of the listed kernels.
    """

    uses: Mapping[str, int]
    rest: int
    sizes: Mapping[str, int]

    @property
    def dense(self) -> int:
        """Multiply-adds without masks."""
        return self.rest + sum(uses * self.sizes[path] for path, uses in self.uses.items())

    def of(self, masks: Mapping[str, np.ndarray]) -> int:
        """Returns the multiply-adds that masks leave."""
        kept = {path: int(np.count_nonzero(masks[path])) for path in self.uses}
        return self.rest + sum(uses * kept[path] for path, uses in self.uses.items())


def within_multiply_adds(
    share: float, costs: MultiplyAdds, most: int, size: int, masks_at: Callable[[float], Masks]
) -> Masks:
    """Returns the masks of the smallest sparsity with which so many multiply-adds are left.

    With one weight less pruned, more would be left: the number is found exactly, by bisection.

    Args:
        share: Share of the dense multiply-adds, in (0, 1].
        costs: The multiply-adds.
        most: Greatest number of weights that may be pruned.
        size: Number of weights.
        masks_at: Function from a sparsity to masks.

    Raises:
        ValueError: If the budget cannot be met. The message has the smallest share.
    """
    limit = share * costs.dense
    low, masks = 0, masks_at(0.0)
    if costs.of(masks) <= limit:
        return masks
    high, best = most, masks_at(most / size)
    if (left := costs.of(best)) > limit:
        raise ValueError(
            f"A share of {share} of the multiply-adds ({int(limit):,}) cannot be met: with as many "
            f"weights pruned as possible, {left / costs.dense:.3g} are left ({left:,} of "
            f"{costs.dense:,}). Weights without a mask and the products of queries, keys and "
            "values count in full. Pass a larger share, or mask more layers."
        )
    while high - low > 1:
        middle = (low + high) // 2
        masks = masks_at(middle / size)
        if costs.of(masks) <= limit:
            high, best = middle, masks
        else:
            low = middle
    return best
