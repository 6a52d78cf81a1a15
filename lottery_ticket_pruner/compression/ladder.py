"""The search for the lowest density that is good enough: geometric steps, then bisection."""

import dataclasses
import math
from collections.abc import Callable, Sequence

# Exports that a search for the density of a given size makes at most, and the share of the size
# that is close enough to it.
_MEASUREMENTS = 8
_CLOSE = 0.95
# 0.1 * 70 is 7.000000000000001 in floating point, but means 7.
_ROUNDING = 1e-6


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A density that was tried.

    Attributes:
        density: Share of what is pruned that was kept, in (0, 1].
        accepted: Whether the result was good enough.
    """

    density: float
    accepted: bool


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The densities of a search, each determined by the results of the earlier ones.

    From the lowest accepted density on, each step keeps the share `1 - rate` of it. After the
    first density that was not accepted, the steps are the geometric means of the lowest accepted
    one and the highest one that was not accepted below it, until their ratio is at most
    `precision`.

    Attributes:
        rate: Share of the kept weights that a geometric step prunes, in (0, 1).
        precision: Ratio of two densities at which the search ends, above 1.
        target: Density that is low enough, where the search ends. None if the lowest is wanted.
        lowest: Density below which nothing is tried.
        start: Density that needs no attempt.
        size: Number of things that are pruned, so that no two attempts keep the same number of
            them. None if it is not known.
    """

    rate: float = 0.5
    precision: float = 1.2
    target: float | None = None
    lowest: float = 0.0
    start: float = 1.0
    size: int | None = None

    def best(self, tried: Sequence[Attempt]) -> float:
        """Returns the lowest accepted density, or `start`."""
        return min([self.start, *(attempt.density for attempt in tried if attempt.accepted)])

    def following(self, tried: Sequence[Attempt]) -> float | None:
        """Returns the next density to try, below `best(tried)`. None if the search is complete."""
        best = self.best(tried)
        low = self.rounded(max(self.lowest, self.target or 0.0))
        if best <= low:
            return None
        failed = [attempt.density for attempt in tried if not attempt.accepted]
        below = [density for density in failed if density < best]
        if below:
            highest = max(below)
            if best <= highest * self.precision or best - highest < 1.5 * self._unit:
                return None
            return self.rounded(math.sqrt(best * highest))
        return max(min(self.rounded(best * (1 - self.rate)), best - self._unit), low)

    def expected(self, tried: Sequence[Attempt]) -> int:
        """Returns how many attempts probably follow.

        With a target, each step towards it is good enough. Without one, the next step is the first
        that is not. Then steps in the middle follow in any case.
        """
        simulated = list(tried)
        while (density := self.following(simulated)) is not None:
            below = any(not one.accepted and one.density < density for one in simulated)
            simulated.append(Attempt(density, self.target is not None and not below))
        return len(simulated) - len(tried)

    def rounded(self, density: float) -> float:
        """Returns the density of a whole number of things, not below the given one."""
        if self.size is None:
            return density
        return math.ceil(density * self.size - _ROUNDING) / self.size

    @property
    def _unit(self) -> float:
        return 0.0 if self.size is None else 1 / self.size


def density_of_size(
    size_at: Callable[[float], int],
    goal: int,
    low: tuple[float, int],
    may_go_on: Callable[[], bool] = lambda: True,
) -> float:
    """Returns a density whose size is at most `goal` and close to it.

    Sizes are about linear in the density, so each new density is on the line through the two
    measured ones around the goal, or in the middle between them if that converges slowly.

    Args:
        size_at: Returns the size in bytes of a density in (0, 1].
        goal: Size in bytes.
        low: Lowest density to consider, and its size, which is at most `goal`.
        may_go_on: Returns False if there is no time for another measurement. The density is then
            only where the size is expected to be a little below `goal`.
    """
    high = 1.0, size_at(1.0)
    if high[1] <= goal:
        return high[0]
    for number in range(_MEASUREMENTS):
        if low[1] >= _CLOSE * goal:
            break
        share = (0.98 * goal - low[1]) / (high[1] - low[1]) if number % 3 < 2 else 0.5
        middle = low[0] + min(max(share, 0.02), 0.98) * (high[0] - low[0])
        if not may_go_on():
            return middle
        size = size_at(middle)
        if size <= goal:
            low = middle, size
        else:
            high = middle, size
    return low[0]
