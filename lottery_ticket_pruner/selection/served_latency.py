"""Finds a sparsity for each kernel, so that the program that is served is fast enough."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from lottery_ticket_pruner.budgets import Latency

MOST = 0.999
"""Greatest sparsity of a kernel."""

# A program that takes this much less than the budget is close enough.
_CLOSE = 0.1
# Number of programs to try at most.
_TRIALS = 5
# Number of intervals into which time is divided, and of sparsities that are tried for a kernel.
_INTERVALS, _CHOICES = 4000, 48
# Number of bisection steps.
_STEPS = 30

Masks = dict[str, np.ndarray]
Sparsities = dict[str, float]
Losses = Mapping[str, Callable[[float], float]]


@dataclasses.dataclass(frozen=True)
class Product:
    """The products of an input with one weight, or with several that are joined.

    Attributes:
        sizes: Number of entries of each weight, by path.
        dense: Load of the dense kernel: its time, divided by the budget.
        sparsities: The sparsities that were measured, in ascending order.
        sparse: Load of the fastest sparse kernel for each of them.
        gain: A sparse kernel is only served if it takes less than this share of the dense one.
    """

    sizes: Mapping[str, int]
    dense: float
    sparsities: Sequence[float]
    sparse: Sequence[float]
    gain: float = 1.0

    def load(self, sparsity: float) -> float:
        """Returns the load with weights of a sparsity, with the kernel that would be served.

        Between two measured sparsities, it is on the line between them, and more zeros never take
        longer. Below the first one, the kernel is dense.
        """
        if sparsity < self.sparsities[0]:
            return self.dense
        falling = np.minimum.accumulate(self.sparse)
        sparse = float(np.interp(sparsity, self.sparsities, falling))
        return sparse if sparse < self.gain * self.dense else self.dense

    def now(self, sparsities: Mapping[str, float]) -> float:
        """Returns the sparsity of all entries together, given that of each weight."""
        pruned = sum(size * sparsities[path] for path, size in self.sizes.items())
        return pruned / sum(self.sizes.values())


@dataclasses.dataclass(frozen=True)
class Loads:
    """Loads of a program and of its products.

    Attributes:
        products: The products that have a sparse form; each weight is in one of them.
        rest: Load of everything else in the program.
    """

    products: Sequence[Product]
    rest: float

    def predicted(self, sparsities: Mapping[str, float]) -> float:
        """Returns the load that is expected with given sparsities of all kernels."""
        return self.rest + sum(each.load(each.now(sparsities)) for each in self.products)


@runtime_checkable
class ServedProbe(Protocol):
    """Measures the program of given masks. Times are divided by the budget: loads."""

    def loads(self) -> Loads:
        """Measures the products, which takes long."""

    def __call__(self, masks: Mapping[str, np.ndarray], *, predicted: float | None) -> float:
        """Returns the measured load, given masks and the load that is expected of them."""


def within_served_latency(
    latency: Latency,
    probe: ServedProbe,
    now: Mapping[str, float],
    masks_at: Callable[[Mapping[str, float]], Masks],
    losses: Losses | None = None,
) -> Masks:
    """Returns masks with which the served program meets a budget of latency, closely.

    A program that meets it without an update stays as it is. Otherwise, sparsities are solved from
    the loads of the products, and the program is measured. If it takes another time than predicted,
    all predictions are multiplied by the quotient, and the sparsities are solved again.

    Args:
        latency: The budget.
        probe: Function that measures a program.
        now: Current sparsity of every kernel by path.
        masks_at: Function from sparsities by path to masks.
        losses: Function of each kernel from a sparsity to what its pruned weights are worth, of
            which the sum is minimized; if None, all kernels that gain time get the same sparsity.

    Returns:
        The masks. If the machine is too noisy to find a program that meets the budget, those of the
        fastest program.

    Raises:
        ValueError: If the budget cannot be met.
    """
    factor, aim = 1.0, 1.0
    tried: list[tuple[float, Masks]] = []
    before: Sparsities | None = None
    if latency.share in (None, 1) or any(now.values()):  # Otherwise, it is slower than the budget.
        masks = masks_at({})
        tried.append((probe(masks, predicted=None), masks))
        if tried[0][0] <= 1:
            return masks
    loads = probe.loads()
    if tried:
        factor, aim = tried[0][0] / loads.predicted(now), 1 - _CLOSE / 2
    for _ in range(_TRIALS):
        found = _solved(loads, now, aim / factor, losses)
        sparsities = _all_that_gain(loads.products, now, MOST) if found is None else found
        if sparsities == before and tried[-1][0] <= 1:
            break  # With less pruned, kernels would be dense.
        before = sparsities
        masks = masks_at(sparsities)
        predicted = factor * loads.predicted({**now, **sparsities})
        load = probe(masks, predicted=predicted)
        tried.append((load, masks))
        fastest = min(other for other, _ in tried)
        if found is None and fastest > 1:
            raise ValueError(
                f"A latency of at most {latency.text(1)} (batch size {latency.batch_size}) cannot "
                f"be reached by pruning single weights: {latency.text(fastest)} is the smallest "
                f"that was measured, with up to {MOST:.1%} of the weights of every kernel pruned "
                "that becomes faster. Pass a larger budget, or prune channels "
                '(structure="channels").'
            )
        nothing = all(sparsities[path] <= now[path] for path in sparsities)
        if load <= 1 and (load >= 1 - _CLOSE or nothing):
            break
        factor *= load / predicted
        aim = 1 - _CLOSE / 2
    # The fewest weights are pruned where the load is the largest.
    met = [trial for trial in tried if trial[0] <= 1]
    return max(met, key=lambda trial: trial[0])[1] if met else min(tried, key=lambda t: t[0])[1]


def _solved(
    loads: Loads, now: Mapping[str, float], limit: float, losses: Losses | None
) -> Sparsities | None:
    """Returns the sparsities of kernels that are to be pruned within a load, or None."""
    if loads.predicted(now) <= limit:
        return {}
    if losses is None:
        return _same_for_all(loads, now, limit)
    return _least_loss(loads, now, limit, losses)


def _all_that_gain(
    products: Sequence[Product], now: Mapping[str, float], sparsity: float
) -> Sparsities:
    """Returns the sparsities if every kernel that becomes faster is pruned to the same one."""
    return {
        path: max(sparsity, now[path])
        for each in products
        if each.load(sparsity) < each.load(each.now(now))
        for path in each.sizes
    }


def _same_for_all(loads: Loads, now: Mapping[str, float], limit: float) -> Sparsities | None:
    def fits(sparsity: float) -> bool:
        pruned = _all_that_gain(loads.products, now, sparsity)
        return loads.predicted({**now, **pruned}) <= limit

    low, high = 0.0, MOST
    if not fits(high):
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return _all_that_gain(loads.products, now, high)


def _least_loss(
    loads: Loads, now: Mapping[str, float], limit: float, losses: Losses
) -> Sparsities | None:
    """Returns the sparsities with the least sum of losses, by dynamic programming over time."""
    choices = [_choices(each, now, losses) for each in loads.products]
    fastest = [options[-1][0] for options in choices]
    room = limit - loads.rest - sum(fastest)
    if room < 0:
        return None
    # Loads beyond the least one of each product, in intervals; rounded up, so that the sum fits.
    unit = max(room, 1e-12) / _INTERVALS
    steps = [
        [int(np.ceil((load - least) / unit - 1e-9)) for load, *_ in options]
        for options, least in zip(choices, fastest, strict=True)
    ]
    best = np.zeros(_INTERVALS + 1)
    taken = []
    for options, intervals in zip(choices, steps, strict=True):
        rows = np.full((len(options), best.size), np.inf)
        for row, (_, loss, _), step in zip(rows, options, intervals, strict=True):
            if step < best.size:
                row[step:] = best[: best.size - step] + loss
        taken.append(rows.argmin(axis=0))
        best = rows.min(axis=0)
    place = best.size - 1
    found: Sparsities = {}
    for options, intervals, numbers in reversed(list(zip(choices, steps, taken, strict=True))):
        number = numbers[place]
        place -= intervals[number]
        found |= options[number][2]
    return found


def _choices(
    product: Product, now: Mapping[str, float], losses: Losses
) -> list[tuple[float, float, Sparsities]]:
    """Returns the load, the loss and the sparsities of a product for each way to prune it.

    The last way has the least load.
    """
    current = product.now(now)
    found: list[tuple[float, float, Sparsities]] = [(product.load(current), 0.0, {})]
    densities = np.geomspace(1 - product.sparsities[0], 1 - MOST, _CHOICES)
    for sparsity in (1 - densities).tolist():
        pruned = {path: max(sparsity, now[path]) for path in product.sizes}
        load = product.load(product.now(pruned))
        if load < found[-1][0]:
            loss = sum(losses[path](sparsity) for path in product.sizes)
            found.append((load, loss, pruned))
    return found
