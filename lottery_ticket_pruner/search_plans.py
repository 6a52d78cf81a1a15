"""Plans of a ticket search: how it prunes, which controls it trains, and how all of them train."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict, TypeVar, cast

import numpy as np

from lottery_ticket_pruner import checks, criteria, structures, training, treatments
from lottery_ticket_pruner.fingerprints import description, identity

CONTROLS = ("random_reinit", "reinit_same_sign", "random_mask", "reshuffled_mask")
RETRAINING = ("weight_rewinding", "learning_rate_rewinding", "fine_tuning")

# Fields of a training that do not affect the results of a search.
_NO_MATTER = ("deterministic", "validation_batch_size")

Share = float | Mapping[str, float]
Plan = TypeVar("Plan")


class Amount(TypedDict, total=False):
    """The rate or the sparsity of an update of masks."""

    rate: Share
    sparsity: Share


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruningPlan:
    """The pruning of a search, and what its ticket trains from: arguments of `find_ticket`.

    Raises:
        ValueError: If a name is unknown, both a rate and a sparsity are given, or the treatment of
            kept weights contradicts the kind of retraining.
    """

    rounds: int
    strategy: Any = "large_final"
    scope: str | None = None
    structure: Any = None
    rate: Share | None = None
    sparsity: Share | None = None
    rewind_to: int = 0
    retraining: str = "weight_rewinding"
    kept: Any = "rewind"
    pruned: Any = "zero"

    def __post_init__(self) -> None:
        training.check_integer("rounds", self.rounds)
        training.check_integer("rewind_to", self.rewind_to, "an integer, in training steps")
        if self.rate is not None and self.sparsity is not None:
            raise ValueError(
                "Give rate or sparsity, not both. Received: "
                f"rate={self.rate}, sparsity={self.sparsity}."
            )
        if self.retraining not in RETRAINING:
            raise ValueError(
                f"`retraining` must be one of {RETRAINING}. Received: {self.retraining!r}"
            )
        _ = self.criterion, self.kept_treatment, self.pruned_treatment  # Raises errors early.
        if self._fixed and self.rounds > 1:
            raise ValueError(
                f"{self.found_structure} sets the sparsity in the first round, so that later ones "
                f"would prune nothing: pass rounds=1. Received: rounds={self.rounds}"
            )

    @functools.cached_property
    def criterion(self) -> criteria.Criterion:
        """Criterion resolved from `strategy`."""
        return criteria.get(self.strategy)

    @functools.cached_property
    def found_structure(self) -> structures.Structure | None:
        """Structure resolved from `structure`, or None."""
        return None if self.structure is None else structures.get(self.structure)

    @property
    def _fixed(self) -> bool:
        """True if the structure determines how many weights are kept."""
        return self.found_structure is not None and self.found_structure.kept is not None

    @functools.cached_property
    def kept_treatment(self) -> treatments.Treatment[[treatments.Kernel]]:
        """Treatment of the ticket's kept weights."""
        return retraining_treatment(self.retraining, self.kept)

    @functools.cached_property
    def pruned_treatment(self) -> treatments.Treatment[[treatments.Kernel, np.ndarray]]:
        """Treatment of the ticket's pruned weights."""
        return treatments.get_pruned(self.pruned)

    def amount(self, number: int) -> Amount:
        """Returns the rate or the sparsity of a round as an argument of `update_masks`."""
        sparsity, progress = self.sparsity, number / self.rounds
        if sparsity is None:
            if self._fixed and self.rate is None:
                return {}
            return {"rate": 0.2 if self.rate is None else self.rate}
        if isinstance(sparsity, Mapping):
            return {"sparsity": {key: _eased(share, progress) for key, share in sparsity.items()}}
        return {"sparsity": _eased(sparsity, progress)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ControlPlan:
    """The controls of a search, and their rounds: arguments of `tickets.find_ticket`.

    Raises:
        ValueError: If a control is unknown or named twice.
    """

    controls: Sequence[str] = ("random_reinit", "random_mask")
    control_rounds: Sequence[int] | None = None

    def __post_init__(self) -> None:
        controls = self.controls
        known = not isinstance(controls, str) and set(controls) <= set(CONTROLS)
        if not known or len(set(controls)) < len(controls):
            raise ValueError(
                f"`controls` must be a list of names from {CONTROLS}, each once. Received: "
                f"{controls!r}"
            )

    def of_round(self, number: int) -> Sequence[str]:
        """Returns the controls to train in a round."""
        here = self.control_rounds is None or number in self.control_rounds
        return self.controls if here else ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """Everything that determines the results of a search, except for the model and the data.

    Args:
        training: Plan of a full training. Its seed is that of the whole search.
        pruning: Plan of rounds, criterion, amounts and rewinding.
        control: Plan of the controls.
        replicate: Value of the `replicate` column of the rows.

    Raises:
        ValueError: If a number is out of range.
    """

    training: training.TrainingPlan
    pruning: PruningPlan
    control: ControlPlan
    replicate: int = 0

    def __post_init__(self) -> None:
        rounds, steps, rewind_to = self.pruning.rounds, self.training.steps, self.pruning.rewind_to
        if rounds < 1 or not 0 <= rewind_to < steps:
            raise ValueError(
                "Expected rounds >= 1 and 0 <= rewind_to < steps. Received: "
                f"rounds={rounds}, steps={steps}, rewind_to={rewind_to}."
            )
        control_rounds, seed = self.control.control_rounds, self.seed
        if control_rounds is not None and not set(control_rounds) <= set(range(1, rounds + 1)):
            raise ValueError(
                f"`control_rounds` must be from 1 to {rounds}. Received: {control_rounds!r}"
            )
        if not checks.is_integer(seed) or seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer. Received: {seed!r}.")

    @property
    def seed(self) -> int:
        """The seed of everything random in the search."""
        return cast(int, self.training.seed)

    @property
    def steps_after_rewinding(self) -> int:
        """Number of steps of every training from the rewinding point on."""
        return self.training.steps - self.pruning.rewind_to

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments of `find_ticket` that determine the results, as JSON data."""
        values = _fields(self.training) | _fields(self.pruning) | _fields(self.control)
        rounds, structure = self.control.control_rounds, self.pruning.found_structure
        values = {name: value for name, value in values.items() if name not in _NO_MATTER}
        # States of searches without a structure have the form that they have always had.
        del values["structure"]
        if structure is not None:
            known = identity(structure)
            values["structure"] = structure.get_config() if isinstance(known, str) else known
        return values | {
            "strategy": identity(self.pruning.criterion),
            "kept": identity(self.pruning.kept_treatment),
            "pruned": identity(self.pruning.pruned_treatment),
            "augment": description(self.training.augment),
            "controls": list(self.control.controls),
            "control_rounds": None if rounds is None else list(rounds),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listeners:
    """Functions that are called during a search: arguments of `tickets.find_ticket`."""

    on_result: Callable[[dict[str, Any]], object] | None = None
    on_evaluation: Callable[[dict[str, Any]], object] | None = None
    on_progress: Callable[[int], object] | None = None


def taken(kind: type[Plan], options: Any, **others: Any) -> Plan:
    """Creates a plan from those options of a configuration that have the names of its fields.

    Args:
        kind: Class of the plan, a dataclass.
        options: Object with some of these fields as attributes.
        **others: All other fields of the plan.
    """
    names = inspect.signature(kind).parameters
    there = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return kind(**there | others)


def retraining_treatment(retraining: str, kept: Any) -> treatments.Treatment[[treatments.Kernel]]:
    """Returns the treatment of kept weights for a kind of retraining.

    Raises:
        ValueError: If the treatment is unknown, or contradicts the kind of retraining.
    """
    treatment = treatments.get_kept(kept)
    if retraining == "weight_rewinding":
        return treatment
    if treatment.name not in ("rewind", "finetune"):
        raise ValueError(
            f"With retraining={retraining!r} the kept weights stay as they were trained. "
            f"Received: kept={treatment.name!r}"
        )
    return treatments.get_kept("finetune")


def _fields(plan: Any) -> dict[str, Any]:
    return {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}


def _eased(final: float, progress: float) -> float:
    return 1 - (1 - final) ** progress
