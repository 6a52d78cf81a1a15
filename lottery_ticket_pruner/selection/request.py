"""The pruning request: which criterion, how much, and which weights are ranked together."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.checks import is_integer, is_number
from lottery_ticket_pruner.shares import Share

BUDGETS = ("macs", "weights", "latency", "bytes")


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A pruning request with all names resolved.

    `Request.of` creates a request from user arguments and checks everything that can be checked
    without weights. Amounts are checked by `select`, because they may contain patterns of paths and
    are replaced in each round of a criterion or step of a schedule.

    Attributes:
        criterion: Criterion that ranks the weights.
        rate: Share of the kept weights to prune, a mapping from patterns to shares, or None.
        sparsity: Share of all weights that are pruned afterwards, a mapping from patterns to
            shares, or None.
        scope: Weights that are ranked together: `"layer"`, `"global"` or `"output"`.
        seed: Non-negative integer for random scores and ties.
        structure: Structure whose tiles are ranked instead of weights, or None.
        distribution: Rule that divides a single sparsity among the kernels, or None.
        budget: Share of the multiply-adds (`"macs"`) or of the weights of all kernels
            (`"weights"`) that is left afterwards, or a `Latency` (`"latency"`), by name, instead of
            rate and sparsity. For single weights one of multiply-adds, latency and the bytes that
            are stored (`"bytes"`), as a share of those of the dense weights or an integer above 1.
            Or None.
        keep_sparser: Whether a sparsity below the current one prunes nothing, instead of raising an
            error.
    """

    criterion: criteria.Criterion
    rate: Share | None = None
    sparsity: Share | None = None
    scope: str = "layer"
    seed: int = 0
    structure: structures.Structure | None = None
    distribution: distributions.Distribution | None = None
    budget: Mapping[str, float | Latency] | None = None
    keep_sparser: bool = False

    @classmethod
    def of(
        cls,
        criterion: criteria.Identifier,
        *,
        scope: str | None = None,
        seed: int = 0,
        structure: structures.Identifier | None = None,
        distribution: distributions.Identifier | None = None,
        **amount: Any,
    ) -> "Request":
        """Creates a request from names, configurations or objects.

        Args:
            criterion: An identifier for `criteria.get`.
            scope: Name of a scope. The default is the criterion's own scope, or else `"layer"`.
                Must be None with N:M.
            seed: Non-negative integer.
            structure: An identifier for `structures.get`, or None.
            distribution: An identifier for `distributions.get`, or None.
            **amount: `rate`, `sparsity` and `keep_sparser`, which are not checked here, or
                `budget`, which is.

        Raises:
            ValueError: If a name is unknown, the scope is incompatible with the criterion or the
                structure, or the seed is not a non-negative integer.
        """
        if structure is not None:
            structure = structures.get(structure)
        criterion = criteria.get(criterion)
        if structure is not None and structure.kept is not None:
            refuse_amounts(structure, scope=scope)
            # Each tile is ranked separately. The scope still decides what is scored together.
            scope = "global" if criterion.scope == "global" else "layer"
        else:
            scope = resolve_scope(criterion, scope)
        if structure is not None and scope == "output":
            raise ValueError(
                f"{structure} ranks tiles of whole layers, which contradicts "
                f'scope="output" (criterion {criterion.name!r}). '
                + (
                    "Use N:M, or another criterion."
                    if criterion.scope
                    else 'Use "layer" or "global".'
                )
            )
        coupled = structure is not None and structure.coupled
        if scope == "isomorphic" and not coupled:
            raise ValueError(
                'scope="isomorphic" ranks channels of layers with equal shapes together and needs '
                f'structure="channels". Received: structure={structure!r}'
            )
        if isinstance(criterion, criteria.ChannelCriterion) and not coupled:
            raise ValueError(
                f"Criterion {criterion.name!r} scores whole channels and needs "
                f'structure="channels". Received: structure={structure!r}'
            )
        if not is_integer(seed) or seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
        if distribution is not None:
            distribution = distributions.get(distribution)
        if amount.get("budget") is not None:
            amount["budget"] = _checked_budget(criterion, structure, distribution, **amount)
        return cls(
            criterion=criterion,
            scope=scope,
            seed=seed,
            structure=structure,
            distribution=distribution,
            **amount,
        )

    @property
    def fixed(self) -> structures.Structure | None:
        """The structure if it determines how many weights each tile keeps (N:M), else None."""
        structure = self.structure
        return None if structure is None or structure.kept is None else structure


def _checked_budget(
    criterion: criteria.Criterion,
    structure: structures.Structure | None,
    distribution: distributions.Distribution | None,
    budget: Any,
    **others: Any,
) -> dict[str, float | Latency]:
    """Returns a budget of the user after checking it, with a share of latency as `Latency`."""
    if not isinstance(budget, Mapping) or not budget or set(budget) - set(BUDGETS):
        raise ValueError(
            f"`budget` must be a dict with some of the keys {BUDGETS}. Received: budget={budget!r}"
        )
    budget = dict(budget)
    if "latency" in budget:
        budget["latency"] = Latency.of(budget["latency"])
    for name, share in budget.items():
        if name == "latency" or (name == "bytes" and is_integer(share) and share > 1):
            continue
        if not is_number(share) or not 0 < share <= 1:
            raise ValueError(
                f"`budget` holds the share that is left, a number in (0, 1]"
                f"{', or an integer number of bytes' * (name == 'bytes')}. Received: "
                f"{name}={share!r}"
            )
    given = {"rate": others.get("rate"), "sparsity": others.get("sparsity")}
    divided = {"bytes"} if structure is not None else {"bytes", "macs"}
    if any(value is not None for value in given.values()) or (
        distribution is not None and not divided & budget.keys()
    ):
        raise ValueError(
            f"A budget says how much is pruned: leave out `rate`, `sparsity` and `distribution`. "
            f"Received: budget={budget!r}, {given}, distribution={distribution!r}"
        )
    _check_kind(budget, structure)
    if criterion.rounds > 1:
        raise ValueError(
            f"Criterion {criterion.name!r} prunes in {criterion.rounds} rounds, and each needs a "
            "sparsity. Give a `sparsity` in place of the budget, or take another criterion."
        )
    return budget


def _check_kind(
    budget: Mapping[str, float | Latency], structure: structures.Structure | None
) -> None:
    """Checks that budgets and structure fit together.

    Raises:
        ValueError: If they do not.
    """
    if structure is not None and structure.coupled:
        if "bytes" in budget:
            raise ValueError(
                "A budget of bytes counts what is stored of single weights. With "
                'structure="channels", {"weights": ...} is the share of the weights that is left. '
                f"Received: budget={budget!r}, structure={structure!r}"
            )
        return
    if "weights" in budget or len(budget) > 1:
        raise ValueError(
            'Without structure="channels", `budget` holds one of "macs", "latency" and "bytes"; a '
            "share of the weights is a `sparsity`. Received: "
            f"budget={budget!r}, structure={structure!r}"
        )
    if structure is not None and structure.kept is not None:
        raise ValueError(f"{structure} determines how many weights are kept: leave the budget out.")
    if structure is not None and "bytes" not in budget:
        raise ValueError(
            f'The budget {list(budget)} is one for single weights or for structure="channels". '
            f"Pass a `sparsity` with other structures. Received: structure={structure!r}"
        )


def refuse_amounts(structure: structures.Structure, **arguments: object) -> None:
    """Raises an error if a structure with a fixed sparsity is combined with these arguments."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if given:
        raise ValueError(
            f"{structure} determines how many weights are kept in which groups. Leave out: {given}"
        )


def resolve_scope(criterion: criteria.Criterion, scope: str | None) -> str:
    """Returns the given scope, or else the criterion's own, or else `"layer"`.

    Args:
        criterion: Criterion that ranks the weights.
        scope: Name of a scope, or None.

    Raises:
        ValueError: If the scope is unknown, or the criterion supports only another one.
    """
    if scope is None:
        return criterion.scope or "layer"
    known = (*criteria.SCOPES, "isomorphic")
    if scope not in known:
        raise ValueError(f"`scope` must be one of {known}. Received: scope={scope!r}")
    if criterion.scope not in (None, scope):
        raise ValueError(
            f"Criterion {criterion.name!r} supports only scope={criterion.scope!r}. "
            f"Received: scope={scope!r}"
        )
    return scope
