"""Turns rates, sparsities and distributions into exact counts."""

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner.selection.request import Request, refuse_amounts
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import check_share, one_of, shares_of

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


def amounts(request: Request, kernels: Mapping[str, Weights]) -> dict[str, dict[str, Any] | None]:
    """Returns what to ask of each kernel: arguments of `drop_count`, or None where N:M says it.

    Args:
        request: Request with the amount for all kernels.
        kernels: Kernels that it applies to, by path.

    Raises:
        ValueError: Not exactly one of rate and sparsity is given, a share is not a number in
            [0, 1), a pattern is not found, or the structure or the distribution excludes the
            amount.
    """
    rate, sparsity = request.rate, request.sparsity
    if request.keeps_fixed_number:
        distribution = request.distribution and request.distribution.name
        refuse_amounts(request.structure, rate=rate, sparsity=sparsity, distribution=distribution)
        return dict.fromkeys(kernels)
    if request.distribution is not None:
        sparsity = _distribute(request, kernels)
    name, share = one_of(rate, sparsity)
    shares = shares_of(name, share, kernels, request.scope)
    return {
        path: {name: value, "keep_sparser": request.keep_sparser} for path, value in shares.items()
    }


def _distribute(request: Request, kernels: Mapping[str, Weights]) -> dict[str, float]:
    """Returns the sparsity of each kernel, of one sparsity of all kernels together."""
    rate, sparsity, scope = request.rate, request.sparsity, request.scope
    if rate is not None or isinstance(sparsity, Mapping | None) or scope != "layer":
        raise ValueError(
            "A `distribution` shares one `sparsity` of all kernels together out among them: give a "
            'number, no `rate`, and the scope "layer". Received: '
            f"distribution={request.distribution.name!r}, rate={rate!r}, sparsity={sparsity!r}, "
            f"scope={scope!r}"
        )
    check_share("sparsity", sparsity)
    shapes = {path: kernel.mask.shape for path, kernel in kernels.items()}
    return request.distribution(shapes, sparsity)


def rounds(request: Request, weights: Mapping[str, Weights]) -> list[Request]:
    """Returns the requests that lead to this one in as many rounds as its criterion has.

    Each round drops the same share of what is kept, and the last reaches what was asked for
    exactly.

    Args:
        request: Request for the end.
        weights: Kernels as they are now, by path.

    Raises:
        ValueError: If rounds are to lead on from masks that are not ones under a structure.
    """
    criterion, rate, sparsity = request.criterion, request.rate, request.sparsity
    share = rate if sparsity is None else sparsity
    count = criterion.rounds
    # What is wrong with the amount is for the last request to say.
    if count == 1 or not isinstance(share, numbers.Real) or not 0 <= share < 1:
        return [request]
    size = sum(kernel.mask.size for kernel in weights.values())
    alive = sum(int(np.count_nonzero(kernel.mask)) for kernel in weights.values())
    if request.structure is not None and (alive < size or sparsity is None):
        raise ValueError(
            f"Criterion {criterion.name!r} prunes in {count} rounds. With a structure these start "
            "from masks of ones and lead to a `sparsity`: reset the masks, or leave one of both."
        )
    now = alive / size
    # What was asked for, not what is left once counts are rounded: that is for each round to do.
    then = now * (1 - rate) if sparsity is None else min(now, 1 - sparsity)
    last = request
    if request.structure is None:
        left = alive - drop_count(
            size, alive, rate=rate, sparsity=sparsity, keep_sparser=request.keep_sparser
        )
        last = dataclasses.replace(request, rate=None, sparsity=1 - left / size)
    densities = [now * (then / now) ** (k / count) for k in range(1, count)]
    return [
        *(dataclasses.replace(request, rate=None, sparsity=1 - density) for density in densities),
        last,
    ]
