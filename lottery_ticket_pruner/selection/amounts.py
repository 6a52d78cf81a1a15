"""How much goes: rates, sparsities and distributions become exact counts."""

import math
from collections.abc import Mapping

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import Share, check_share, one_of

# 0.29 * 100 is 28.999999999999996 in floating point; 29 is meant.
_ROUNDING = 1e-6


def drop_count(
    size: int,
    alive: int,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    keep_sparser: bool = False,
    where: str = "the weights",
    unit: str = "weights",
) -> int:
    """Returns the exact number of kept weights to drop now.

    Args:
        size: Number of weights, pruned ones included.
        alive: Number of weights that are not pruned yet.
        rate: Share of the kept weights to drop: `floor(rate * alive + 1e-6)`.
        sparsity: Share of all weights that are pruned afterwards:
            `floor(sparsity * size + 1e-6)` less those that are pruned already.
        keep_sparser: If True, a `sparsity` below the present one drops none.
        where: Name of these weights in error messages.
        unit: Name of the things counted in error messages.

    Raises:
        ValueError: Not exactly one of `rate` and `sparsity`, one outside [0, 1), or a `sparsity`
            below the present one unless `keep_sparser`.
    """
    name, share = one_of(rate, sparsity)
    check_share(name, share)
    if name == "rate":
        return math.floor(float(share) * alive + _ROUNDING)
    drop = math.floor(float(share) * size + _ROUNDING) - (size - alive)
    if drop < 0 and keep_sparser:
        return 0
    if drop < 0:
        raise ValueError(
            f"A sparsity of {share} was asked for, but {where} is already sparser: "
            f"{size - alive} of {size} {unit} are pruned, and pruned weights do not come back. "
            "Ask for a higher sparsity, give a `rate`, or reset the masks first."
        )
    return drop


def refuse_amounts(structure: structures.Structure, **arguments: object) -> None:
    """Raises an error if a structure that fixes the sparsity is given anything that does, too."""
    given = {name: value for name, value in arguments.items() if value is not None}
    if given:
        raise ValueError(
            f"{structure} says itself how many weights stay, and which compete. Leave out: {given}"
        )


def distribute(
    distribution: distributions.Identifier,
    kernels: Mapping[str, Weights],
    scope: str,
    rate: Share | None,
    sparsity: Share | None,
) -> dict[str, float]:
    """Returns the sparsity of each kernel, of one sparsity of all kernels together."""
    if rate is not None or isinstance(sparsity, Mapping | None) or scope != "layer":
        raise ValueError(
            "A `distribution` shares one `sparsity` of all kernels together out among them: give a "
            f'number, no `rate`, and the scope "layer". Received: distribution={distribution!r}, '
            f"rate={rate!r}, sparsity={sparsity!r}, scope={scope!r}"
        )
    check_share("sparsity", sparsity)
    shapes = {path: kernel.mask.shape for path, kernel in kernels.items()}
    return distributions.get(distribution)(shapes, sparsity)


def resolve_scope(criterion: criteria.Criterion, scope: str | None) -> str:
    """Returns the scope asked for, else the one that the criterion insists on, else `"layer"`.

    Args:
        criterion: Criterion that is going to rank the weights.
        scope: Name of a scope, or None.


    Raises:
        ValueError: No scope has this name, or the criterion insists on another.
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
