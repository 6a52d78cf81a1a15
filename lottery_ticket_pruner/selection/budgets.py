"""Budgets: the fewest channels to prune, so that a share of multiply-adds or weights is left."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner.budgets import UnreachableBudgetError
from lottery_ticket_pruner.selection.families import Family, Graph
from lottery_ticket_pruner.structures import Channels

# Number of bisection steps in the search for the smallest sparsity within a budget.
_STEPS = 20


class Costs:
    """Multiply-adds and weights that are left when only some channels are kept.

    Args:
        graph: The channels of the model.
        shapes: Shapes of the masked weights by path.
    """

    def __init__(self, graph: Graph, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._graph, self._shapes = graph, shapes
        known = {path: number for path, number in graph.positions.items() if number is not None}
        self._factors = {"macs": known, "weights": dict.fromkeys([*shapes, *graph.unmasked], 1)}
        self.unknown = [path for path, number in graph.positions.items() if number is None]
        self._dense: dict[str, int] = {}

    def left(self, name: str, kept: Sequence[np.ndarray]) -> float:
        """Returns the share of a cost that is left with the kept channels of all families."""
        if name not in self._dense:
            everything = [np.ones(family.size, bool) for family in self._graph.families]
            self._dense[name] = self._of(name, everything)
        return self._of(name, kept) / self._dense[name]

    def _of(self, name: str, kept: Sequence[np.ndarray]) -> int:
        graph, shapes = self._graph, {**self._shapes, **self._graph.products}
        sizes = {**_sizes(graph.families, kept, shapes), **graph.unmasked}
        return sum(sizes[path] * factor for path, factor in self._factors[name].items())


def within_budget(
    budget: Mapping[str, float],
    structure: Channels,
    costs: Costs,
    most: float,
    kept_at: Callable[[float], list[np.ndarray]],
) -> float:
    """Returns the smallest sparsity of channels that meets budgets of multiply-adds and weights.

    Args:
        budget: Share that may remain of each cost.
        structure: Structure of the request, for messages.
        costs: The costs of the model.
        most: Greatest sparsity that is possible.
        kept_at: Function from a sparsity to the kept channels of all families.

    Raises:
        ValueError: If the multiply-adds of a kernel are unknown, or the budget cannot be met.
    """
    if "macs" in budget and costs.unknown:
        raise ValueError(
            "The multiply-adds of these kernels are unknown, because the input shape of the model "
            f"is not fixed: {costs.unknown}. Give the model a fixed input shape, or pass a budget "
            "of weights."
        )

    def fits(kept: Sequence[np.ndarray]) -> bool:
        return all(costs.left(name, kept) <= share for name, share in budget.items())

    low, high = 0.0, most
    best = kept_at(high)
    if not fits(best):
        reached = ", ".join(f"{name} {costs.left(name, best):.3g}" for name in budget)
        raise UnreachableBudgetError(
            f"The budget {dict(budget)} cannot be met: with as many channels pruned as possible "
            f"(at most {structure.at_most:.0%} of each family), these shares are left: {reached}.",
            "Pass larger shares or a higher `at_most`. `masked_layers.channel_families(model)` "
            "returns the layers that stay whole.",
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if fits(kept_at(middle)):
            high = middle
        else:
            low = middle
    return high


def _sizes(
    families: Sequence[Family],
    kept: Sequence[np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, int]:
    """Returns the sizes of weights and products that `shrink` leaves of these channels."""
    alive: dict[tuple[str, int], np.ndarray] = {}
    for family, flags in zip(families, kept, strict=True):
        of_index = np.append(flags, True)  # Index -1 reads the last entry.
        for path, axes in (*family.weights.items(), *family.products.items()):
            for axis, channels in axes.items():
                before = alive.get((path, axis), True)
                alive[path, axis] = before & of_index[channels]
    return {
        path: math.prod(
            int(np.count_nonzero(alive[path, axis])) if (path, axis) in alive else size
            for axis, size in enumerate(shape)
        )
        for path, shape in shapes.items()
    }
