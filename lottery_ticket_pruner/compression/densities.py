"""The densities at which the goals of a search other than the drop should be met."""

import dataclasses
import time
from typing import Any

from lottery_ticket_pruner import latencies
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.compression.clock import Clock
from lottery_ticket_pruner.compression.ladder import density_of_size
from lottery_ticket_pruner.compression.states import State
from lottery_ticket_pruner.compression.steps import Workbench


@dataclasses.dataclass(frozen=True)
class Densities:
    """Finds the density at which each goal should be met, and stores it with what it measured.

    The facts are `densities` by goal, `shares` by what they are of, and `target`, the lowest; of
    the dense model its `milliseconds` and `bytes`; and `export`, the seconds of the longest export.
    Each is only there if there is such a goal.

    Args:
        bench: The model, the data and the plan.
        facts: The facts of the search.
        clock: The time that the search takes.
    """

    bench: Workbench
    facts: dict[str, Any]
    clock: Clock

    def check(self, dense: State) -> None:
        """Checks a goal of size, before anything else takes time.

        Args:
            dense: The state of the model that is pruned.

        Raises:
            ValueError: If no density is small enough.
        """
        if self.bench.plan.goals.size is not None:
            self._lowest(dense, self.bench.plan.goals.size)
            dense.restore(self.bench.model)

    def find(self, dense: State) -> None:
        """Finds the densities.

        Args:
            dense: The state of the model that is pruned.

        Raises:
            ValueError: If no density is small enough for a goal of size.
        """
        goals, facts, model = self.bench.plan.goals, self.facts, self.bench.model
        densities = {} if goals.sparsity is None else {"sparsity": 1 - goals.sparsity}
        if goals.size is not None:
            densities["size"] = self._of_size(dense, goals.size)
        if goals.macs is not None:
            densities["macs"] = goals.macs
        if goals.latency is not None:
            latency = Latency.of(goals.latency)
            milliseconds = latencies.milliseconds_without_pruning(model, latency.batch_size)
            facts["milliseconds"] = milliseconds
            densities["latency"] = min(latency.share or latency.limit / milliseconds, 1.0)
        facts["densities"] = densities
        self.share_out()

    def share_out(self) -> None:
        """Turns the densities of the goals into shares of what is pruned, and into a target."""
        bench = self.bench
        cost = bench.cost() if bench.prunes_channels else "weights"
        costs = {"sparsity": "weights", "size": cost, "macs": "macs", "latency": "latency"}
        shares: dict[str, float] = {}
        for goal, density in self.facts["densities"].items():
            shares[costs[goal]] = min(density, shares.get(costs[goal], 1.0))
        self.facts.update(shares=shares, target=min(shares.values(), default=None))

    def _of_size(self, dense: State, goal: int) -> float:
        """Returns a density whose served folder is about as large as the goal."""
        low = self._lowest(dense, goal)
        found = density_of_size(
            lambda density: self._size_at(density, dense),
            goal,
            low,
            # The last measurement of the search takes as long.
            may_go_on=lambda: self.clock.left > 2 * self.facts["export"],
        )
        dense.restore(self.bench.model)
        self.clock.reserve += self.facts["export"]
        return found

    def _lowest(self, dense: State, goal: int) -> tuple[float, int]:
        """Returns the lowest density and its size."""
        bench = self.bench
        lowest = bench.lowest_of_channels(dense) if bench.prunes_channels else bench.lowest
        size = self._size_at(lowest, dense)
        if size > goal:
            raise ValueError(
                f"No sparsity makes the served folder of {bench.model.name} as small as "
                f"{goal:,} bytes: with a density of {lowest:.2g} it takes {size:,}, most of them "
                "for the graph."
            )
        return lowest, size

    def _size_at(self, density: float, dense: State) -> int:
        started = time.perf_counter()
        size = self.bench.size_at(density, dense)
        seconds = time.perf_counter() - started
        self.facts["export"] = max(seconds, self.facts.get("export", 0.0))
        if density == 1:
            self.facts["bytes"] = size
        return size
