"""Computes exact counts from rates, sparsities and distributions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner.checks import is_number
from lottery_ticket_pruner.distributions import Distribution
from lottery_ticket_pruner.selection.request import Request, refuse_amounts
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import check_share, one_of, shares_of

# 0.29 * 100 is 28.999999999999996 in floating point, but means 29.
_ROUNDING = 1e-6


def drop_count(
    size: int,
    alive: int,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    keep_sparser: bool = False,
    where: str = "the model as a whole",
    unit: str = "weights",
) -> int:
    """Returns the exact number of kept weights to prune now.

    Args:
        size: Number of weights, including pruned ones.
        alive: Number of weights that are still kept.
        rate: Share of the kept weights to prune, as `floor(rate * alive + 1e-6)`.
        sparsity: Share of all weights that are pruned afterwards, as
            `floor(sparsity * size + 1e-6)` minus the number of pruned weights.
        keep_sparser: Whether to return 0, instead of raising an error, if `sparsity` is below the
            current one.
        where: Name of these weights in error messages.
        unit: Name of the counted things in error messages.

    Raises:
        ValueError: If not exactly one of `rate` and `sparsity` is given, it is outside [0, 1), or
            `sparsity` is below the current one and `keep_sparser` is False.
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
            f"Requested sparsity {share}, but {where} is already sparser: "
            f"{size - alive} of {size} {unit} are pruned, and pruned weights do not come back. "
            "Request a higher sparsity, pass a `rate`, or reset the masks first."
        )
    return drop


def amounts(request: Request, kernels: Mapping[str, Weights]) -> dict[str, dict[str, Any]]:
    """Returns the amount to prune from each kernel: arguments of `drop_count`, none for N:M.

    Args:
        request: A request with the amount for all kernels.
        kernels: Kernels to which the request applies, by path.

    Raises:
        ValueError: If not exactly one of rate and sparsity is given, a share is not a number in
            [0, 1), a pattern matches no path, or the amount contradicts the structure or the
            distribution.
    """
    rate, sparsity = request.rate, request.sparsity
    if request.fixed is not None:
        distribution = request.distribution and request.distribution.name
        refuse_amounts(request.fixed, rate=rate, sparsity=sparsity, distribution=distribution)
        return {path: {} for path in kernels}
    if request.distribution is not None:
        sparsity = _distribute(request.distribution, request, kernels)
    name, share = one_of(rate, sparsity)
    shares = shares_of(name, share, kernels, request.scope)
    return {
        path: {name: value, "keep_sparser": request.keep_sparser} for path, value in shares.items()
    }


def _distribute(
    distribution: Distribution, request: Request, kernels: Mapping[str, Weights]
) -> dict[str, float]:
    """Divides the sparsity of the whole model among its kernels."""
    rate, sparsity, scope = request.rate, request.sparsity, request.scope
    if rate is not None or isinstance(sparsity, Mapping | None) or scope != "layer":
        raise ValueError(
            "A `distribution` divides a single `sparsity` among all kernels: pass a number, no "
            '`rate`, and the scope "layer". Received: '
            f"distribution={distribution.name!r}, rate={rate!r}, sparsity={sparsity!r}, "
            f"scope={scope!r}"
        )
    check_share("sparsity", sparsity)
    shapes = {path: kernel.mask.shape for path, kernel in kernels.items()}
    return distribution(shapes, sparsity)


def rounds(request: Request, weights: Mapping[str, Weights]) -> list[Request]:
    """Splits a request into the rounds of its criterion.

    Each round prunes the same share of the kept weights. The last one reaches the requested amount
    exactly.

    Args:
        request: The complete request.
        weights: Current kernels by path.

    Raises:
        ValueError: If the criterion has several rounds and a structure, and masks are not all ones
            or no `sparsity` is given.
    """
    criterion, rate, sparsity = request.criterion, request.rate, request.sparsity
    by_rate = sparsity is None
    share = rate if by_rate else sparsity
    count = criterion.rounds
    # Invalid amounts are left to the last request, which raises the error.
    right = by_rate == (rate is not None)
    if count == 1 or not right or not is_number(share) or not 0 <= share < 1:
        return [request]
    size = sum(kernel.mask.size for kernel in weights.values())
    alive = sum(int(np.count_nonzero(kernel.mask)) for kernel in weights.values())
    if request.structure is not None and (alive < size or by_rate):
        raise ValueError(
            f"Criterion {criterion.name!r} prunes in {count} rounds. With a structure, these start "
            "from masks of ones and need a `sparsity`. Reset the masks, or drop one of the two."
        )
    now = alive / size
    # From the requested amount, not from rounded counts: each round does its own rounding.
    then = now * (1 - share) if by_rate else min(now, 1 - share)
    last = request
    if request.structure is None:
        left = alive - drop_count(
            size,
            alive,
            rate=share if by_rate else None,
            sparsity=None if by_rate else share,
            keep_sparser=request.keep_sparser,
        )
        last = dataclasses.replace(request, rate=None, sparsity=1 - left / size)
    densities = [now * (then / now) ** (k / count) for k in range(1, count)]
    return [
        *(dataclasses.replace(request, rate=None, sparsity=1 - density) for density in densities),
        last,
    ]
