"""Budgets: the fewest channels to prune, so that a share of multiply-adds or weights is left."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner.selection.families import Family, Graph
from lottery_ticket_pruner.structures import Channels

# Number of bisection steps in the search for the smallest sparsity within a budget.
_STEPS = 20


def within_budget(
    budget: Mapping[str, float],
    structure: Channels,
    graph: Graph,
    shapes: Mapping[str, tuple[int, ...]],
    most: float,
    kept_at: Callable[[float], list[np.ndarray]],
) -> list[np.ndarray]:
    """Returns the kept channels of the smallest sparsity that meets a budget.

    Args:
        budget: Share that may remain of each cost.
        structure: Structure of the request, for messages.
        graph: The channels of the model.
        shapes: Shapes of the masked weights by path.
        most: Greatest sparsity that is possible.
        kept_at: Function from a sparsity to the kept channels of all families.

    Raises:
        ValueError: If the multiply-adds of a kernel are unknown, or the budget cannot be met.
    """
    if "macs" in budget and (unknown := [path for path, n in graph.positions.items() if n is None]):
        raise ValueError(
            "The multiply-adds of these kernels are unknown, because the input shape of the model "
            f"is not fixed: {unknown}. Give the model a fixed input shape, or pass a budget of "
            "weights."
        )
    known = {path: number for path, number in graph.positions.items() if number is not None}
    factors = {"macs": known, "weights": dict.fromkeys([*shapes, *graph.unmasked], 1)}
    everything = [np.ones(family.size, bool) for family in graph.families]

    def left(name: str, kept: Sequence[np.ndarray]) -> float:
        sizes = {**_sizes(graph.families, kept, {**shapes, **graph.products}), **graph.unmasked}
        return sum(sizes[path] * factor for path, factor in factors[name].items())

    dense = {name: left(name, everything) for name in budget}

    def fits(kept: Sequence[np.ndarray]) -> bool:
        return all(left(name, kept) <= share * dense[name] for name, share in budget.items())

    low, high = 0.0, most
    best = kept_at(high)
    if not fits(best):
        reached = ", ".join(f"{name} {left(name, best) / dense[name]:.3g}" for name in budget)
        raise ValueError(
            f"The budget {dict(budget)} cannot be met: with as many channels pruned as {structure} "
            f"allows, these shares are left: {reached}. Pass larger shares or a higher `at_most`. "
            "`masked_layers.channel_families(model)` returns the layers that stay whole."
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        kept = kept_at(middle)
        if fits(kept):
            best, high = kept, middle
        else:
            low = middle
    return best


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
