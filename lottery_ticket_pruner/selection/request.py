"""A request says what is to be pruned: by which criterion, how much, and among which weights."""

import dataclasses
import numbers
from typing import Any

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.shares import Share


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Request:
    """A request to the selection, with every name resolved.

    `Request.of` makes one from what users write and checks all that can be checked without weights.
    Amounts are checked by `select`: they may name patterns of paths, and several rounds, or the
    steps of a schedule, replace them by their own.

    Attributes:
        criterion: Criterion that ranks the weights.
        rate: Share of the kept weights to drop, or None; or a mapping from patterns to shares.
        sparsity: Share of all weights that are pruned afterwards, or None; likewise.
        scope: Weights that are ranked together: `"layer"`, `"global"` or `"output"`.
        seed: Non-negative integer for random scores and for the order of ties.
        structure: Structure whose tiles are ranked in place of weights, or None.
        distribution: Rule that shares one sparsity out among the kernels, or None.
        keep_sparser: If True, a sparsity below the present one drops none, and is not an error.
    """

    criterion: criteria.Criterion
    rate: Share | None = None
    sparsity: Share | None = None
    scope: str = "layer"
    seed: int = 0
    structure: structures.Structure | None = None
    distribution: distributions.Distribution | None = None
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
        """Makes a request from names, configurations or objects.

        Args:
            criterion: Whatever `criteria.get` takes.
            scope: Name of a scope; by default `"layer"`, or the scope that the criterion insists
                on. None with N:M.
            seed: Non-negative integer.
            structure: Whatever `structures.get` takes, or None.
            distribution: Whatever `distributions.get` takes, or None.
            **amount: `rate`, `sparsity` and `keep_sparser`, as they are.

        Raises:
            ValueError: If a name is unknown, the scope does not go with the criterion or the
                structure, or the seed is not a non-negative integer.
        """
        if structure is not None:
            structure = structures.get(structure)
        criterion = criteria.get(criterion)
        if structure is not None and structure.kept is not None:
            refuse_amounts(structure, scope=scope)
            # Each tile is ranked alone; what may still matter is which weights are scored together.
            scope = "global" if criterion.scope == "global" else "layer"
        else:
            scope = resolve_scope(criterion, scope)
        if structure is not None and scope == "output":
            raise ValueError(
                f"{structure} makes tiles of whole layers compete, which contradicts "
                f'scope="output" (criterion {criterion.name!r}). '
                + (
                    "Use N:M, or another criterion."
                    if criterion.scope
                    else 'Use "layer" or "global".'
                )
            )
        if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
            raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
        if distribution is not None:
            distribution = distributions.get(distribution)
        return cls(
            criterion=criterion,
            scope=scope,
            seed=seed,
            structure=structure,
            distribution=distribution,
            **amount,
        )

    @property
    def keeps_fixed_number(self) -> bool:
        """If True, the structure (N:M) says itself how many weights each tile keeps."""
        return self.structure is not None and self.structure.kept is not None


def refuse_amounts(structure: structures.Structure, **arguments: object) -> None:
    """Raises an error if a structure that fixes the sparsity is given anything that does, too."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if given:
        raise ValueError(
            f"{structure} says itself how many weights stay, and which compete. Leave out: {given}"
        )


def resolve_scope(criterion: criteria.Criterion, scope: str | None) -> str:
    """Returns the scope asked for, else the one that the criterion insists on, else `"layer"`.

    Args:
        criterion: Criterion that is going to rank the weights.
        scope: Name of a scope, or None.

    Raises:
        ValueError: If no scope has this name, or the criterion insists on another.
    """
    if scope is None:
        return criterion.scope or "layer"
    if scope not in criteria.SCOPES:
        raise ValueError(f"`scope` must be one of {criteria.SCOPES}. Received: scope={scope!r}")
    if criterion.scope not in (None, scope):
        raise ValueError(
            f"Criterion {criterion.name!r} works with scope={criterion.scope!r} alone. "
            f"Received: scope={scope!r}"
        )
    return scope
