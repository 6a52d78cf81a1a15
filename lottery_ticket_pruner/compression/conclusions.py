"""Sentences about the goals of a search: those that a model misses, what came nearest, and why."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.compression import metrics
from lottery_ticket_pruner.compression.plan import Goals
from lottery_ticket_pruner.wording import DropText


@dataclasses.dataclass(frozen=True)
class Judge:
    """Judges models by the goals other than the drop.

    Args:
        goals: The goals.
        facts: What the search has decided: `densities` (the density at which each goal should be
            met) and, of the dense model, `milliseconds` and `bytes`, each if there is such a goal.
        rounded: Returns the density that is tried in place of another one.
    """

    goals: Goals
    facts: Mapping[str, Any]
    rounded: Callable[[float], float]

    def reached(self, goal: str, density: float) -> bool:
        """Returns whether a density should meet a goal."""
        return density <= self.rounded(self.facts["densities"][goal])

    def misses(self, density: float, *, size: int | None, in_time: bool) -> list[str]:
        """Returns the goals that a model does not meet.

        Args:
            density: Its density.
            size: Its bytes as served, or None if they were not measured.
            in_time: False if its latency was measured and is above the goal.
        """
        missed = [goal for goal in self.facts["densities"] if not self.reached(goal, density)]
        if size is not None and self.goals.size is not None and size > self.goals.size:
            missed.append("size")
        if not in_time:
            missed.append("latency")
        return list(dict.fromkeys(missed))

    def conclusion(self, best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
        """Returns what was found, and if it misses a goal, what came nearest and why.

        Args:
            best: The row of the result, and as `of` the name of the metric.
            rows: The rows of the search, the dense model's first.
        """
        told = DropText.of(best["of"], rows[0]["validation"])
        text = self._found(best, told)
        if best["misses"] or (not self.facts["densities"] and best["method"] == "dense"):
            tolerance = self.goals.tolerance
            what = "The nearest" if tolerance is None else f"Within max_drop={tolerance}"
            text = f"No model meets the goals. {what}: {text}{self._why(best, rows, told)}"
        return text

    def _found(self, row: Mapping[str, Any], told: DropText) -> str:
        parts = [f"{row['sparsity']:.2%} of the weights are pruned"]
        if row["macs"] is not None:
            parts.append(f"{row['macs']:.2%} of the multiply-adds are left")
        if row["latency"] is not None:
            parts.append(f"a call takes {row['latency']:.3g} ms{self._dense_beside(row, ' ({})')}")
        if row["size"] is not None:
            parts.append(f"{row['size']:,} bytes are served")
        drop = f"a drop of {told.text(row['drop'])} in validation {row['of']}"
        return f"{', '.join(parts)}, with {drop}."

    def _dense_beside(self, row: Mapping[str, Any], form: str) -> str:
        """Returns the latency of the dense model beside that of another one."""
        dense = self.facts["milliseconds"]
        return "" if row["method"] == "dense" else form.format(f"dense {dense:.3g} ms")

    def _why(
        self, best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], told: DropText
    ) -> str:
        missed = best["misses"].split(", ") if best["misses"] else []
        text = f" Missed: {'; '.join(self._miss(goal, best) for goal in missed)}." if missed else ""
        beyond = [row for row in rows if not row["accepted"] and row["drop"] is not None]
        if beyond:
            near = min(beyond, key=lambda row: row["drop"])
            text += (
                f" The nearest beyond: {near['sparsity']:.2%} pruned, with a drop of "
                f"{told.text(near['drop'])} ({near['method'].replace('_', ' ')})."
            )
        for row in [row for row in rows if row["note"]][-1:]:
            text += f" Step {row['step']} failed: {row['note']}"
        if missed == ["latency"] and self.reached("latency", best["density"]):
            text += (
                " A shorter measurement met the goal, but not the last one: other load on this "
                "machine makes measured times vary, and a smaller goal leaves room for this."
            )
        return text

    def _miss(self, goal: str, row: Mapping[str, Any]) -> str:
        """Returns a goal that a model misses, and what it reached."""
        goals, facts = self.goals, self.facts
        if goal == "sparsity":
            return f"sparsity={goals.sparsity} ({row['sparsity']:.2%} pruned)"
        if goal == "macs":
            return f"macs={goals.macs} ({_or_unknown(row['macs'], '.2%')} left)"
        if goal == "size":
            served = f"{_or_unknown(row['size'], ',')} as served, dense {facts['bytes']:,}"
            return f"size={goals.size:,} bytes ({served})"
        latency = Latency.of(goals.latency)
        unit = " ms" if latency.share is None else " of that of the dense model"
        reached = "not measured"
        if row["latency"] is not None:
            reached = f"{row['latency']:.3g} ms{self._dense_beside(row, ', {}')}"
        if row["load"] is not None and latency.share is not None:
            reached = f"{row['load']:.3g}: {reached}"
        return f"a latency of at most {latency.limit:g}{unit} ({reached})"


def _or_unknown(value: float | None, form: str) -> str:
    return "unknown" if value is None else format(value, form)


def verdict(goals: Goals, test: metrics.Comparison) -> str:
    """Returns what the comparison on the test data says about the tolerance, if there is one."""
    if goals.tolerance is None:
        return ""
    where = "within" if goals.accepts(test.drop, test.dense) else "above"
    limit = test.told.limit(goals.tolerance)
    found = f"On the test data the drop is {test.told.text(test.drop)}, {where} {limit}"
    if test.interval is None:
        return f"{found} ({test.method})."
    low, high = test.interval
    if goals.accepts(high, test.dense) or not goals.accepts(low, test.dense):
        return f"{found}, and so is its whole 95 % interval."
    return (
        f"{found}, but {test.examples:,} examples leave open whether it really is: the 95 % "
        f"interval is {test.told.interval(low, high)}."
    )
