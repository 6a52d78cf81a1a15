"""Finds the fewest channels to prune, so that a smaller model is fast enough, by trying models."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from lottery_ticket_pruner.budgets import Latency, UnreachableBudgetError
from lottery_ticket_pruner.structures import Channels

# A model that takes this much less than the budget is close enough.
_CLOSE = 0.06
# Number of models to try at most.
_TRIALS = 12
# Number of bisection steps in the search for the sparsity with a cost.
_STEPS = 16


@runtime_checkable
class Probe(Protocol):
    """Measures the model that given masks leave. Latencies are divided by the budget: loads."""

    @property
    def unpruned(self) -> float:
        """Load of the model without pruned weights."""

    def __call__(
        self, masks: Mapping[str, np.ndarray], *, predicted: float, final: bool = False
    ) -> float:
        """Returns the measured load.

        Args:
            masks: Bool masks of all weights by path.
            predicted: The load that the search expects, for reports.
            final: Whether this is the result of the search, which is measured for longer.
        """


@dataclasses.dataclass(frozen=True)
class _Point:
    """A smaller model: sparsity of its channels, cost that is left, predicted and measured load."""

    sparsity: float
    cost: float
    predicted: float
    load: float


def within_latency(
    latency: Latency,
    structure: Channels,
    probe: Probe,
    bounds: tuple[float, float],
    masks_at: Callable[[float], Mapping[str, np.ndarray]],
    cost_at: Callable[[float], float],
) -> float:
    """Returns the smallest sparsity of channels that meets a budget of latency, closely.

    The load is predicted from a cost, such as multiply-adds: in proportion to it for the first
    model, then along the line through the models on both sides of the budget. The result is
    measured again, for longer. If it exceeds the budget then, the search goes on from there.

    Args:
        latency: The budget.
        structure: Structure of the request, for messages.
        probe: Function that measures a model.
        bounds: The least sparsity, which other budgets require, and the greatest possible one.
        masks_at: Function from a sparsity to masks.
        cost_at: Function from a sparsity to the share of a cost that is left.

    Returns:
        The sparsity. If the machine is too noisy to find one that meets the budget in its last
        measurement, too, that of the model that was measured last.

    Raises:
        ValueError: If the budget cannot be met.
    """
    least, most = bounds
    guess = probe.unpruned * cost_at(least)
    slow = [_Point(least, cost_at(least), guess, guess)]
    fast: _Point | None = None
    result: float | None = None
    aim, misses = 1 - _CLOSE / 2, 0
    for trial in range(_TRIALS):
        sparsity, predicted = _next(slow, fast, aim, misses, most, cost_at)
        cost = cost_at(sparsity)
        if fast is None or cost > fast.cost:  # Otherwise there is no model between the two.
            load = probe(masks_at(sparsity), predicted=predicted)
            point = _Point(sparsity, cost, predicted, load)
            if load > 1 and sparsity >= most:
                break
            if load <= 1:
                fast, misses = point, 0
            else:
                slow = _with(slow, point)
                misses += 1
            close = fast is not None and (
                fast.load >= aim - _CLOSE / 2 or fast.cost >= slow[-1].cost  # None is in between.
            )
            if fast is None or not (close or trial == _TRIALS - 1):
                continue
        result = fast.sparsity
        load = probe(masks_at(result), predicted=fast.predicted, final=True)
        if load <= 1:
            break
        if result >= most:
            result = None
            break
        slow, fast = _with(slow, dataclasses.replace(fast, load=load)), None
        aim -= _CLOSE / 2
    if result is None:
        raise UnreachableBudgetError(
            f"A latency of at most {latency.text(1)} (batch size {latency.batch_size}) cannot be "
            f"reached: with as many channels pruned as possible (at most {structure.at_most:.0%} "
            f"of each family), {latency.text(load)} was measured.",
            "Pass a larger budget or a higher `at_most`. "
            "`masked_layers.channel_families(model)` returns the layers that stay whole, and "
            "`masked_layers.latency_table` the time of each layer.",
        )
    return result


def _with(slow: Sequence[_Point], point: _Point) -> list[_Point]:
    """Adds a model that is too slow. It replaces what is known of models of the same cost."""
    return [*(other for other in slow if other.cost > point.cost), point]


def _next(
    slow: Sequence[_Point],
    fast: _Point | None,
    aim: float,
    misses: int,
    most: float,
    cost_at: Callable[[float], float],
) -> tuple[float, float]:
    """Returns the sparsity to try next, and the load that is predicted for it."""
    last = slow[-1]
    if fast is not None:
        width = last.cost - fast.cost
        slope = (last.load - fast.load) / width
        cost = fast.cost + (aim - fast.load) / slope
        cost = min(max(cost, fast.cost + width / 10), last.cost - width / 10)
    elif last.load <= 1:  # It is only predicted.
        return last.sparsity, last.load
    else:
        slope = last.load / last.cost
        if len(slow) > 1:  # From the first one, as noise matters less over a long distance.
            slope = (slow[0].load - last.load) / (slow[0].cost - last.cost)
        step = (last.load - aim) / slope if slope > 0 else last.cost
        # Steps grow, so that the end is reached even where the latency hardly depends on the cost.
        cost = last.cost - min(max(step, 0.02 * 2**misses * last.cost), last.cost / 2)
    low, high = last.sparsity, most if fast is None else fast.sparsity
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if cost_at(middle) <= cost:
            high = middle
        else:
            low = middle
    return high, last.load + slope * (cost_at(high) - last.cost)
