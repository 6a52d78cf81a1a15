"""Chooses masks of single weights for budgets: bytes, multiply-adds and latency."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TypeAlias

import numpy as np

from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.selection.amounts import amounts
from lottery_ticket_pruner.selection.byte_search import StoredSize, within_bytes
from lottery_ticket_pruner.selection.comparisons import comparisons, ranked_by, scores_of
from lottery_ticket_pruner.selection.lowest import NAN
from lottery_ticket_pruner.selection.multiply_adds import MultiplyAdds, within_multiply_adds
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.served_latency import ServedProbe, within_served_latency
from lottery_ticket_pruner.selection.weights import Weights

Masks = dict[str, np.ndarray]

_INFINITE = 1e200

# What is left or measured with given masks, for a budget of single weights.
WeightProbe: TypeAlias = StoredSize | MultiplyAdds | ServedProbe


def within_budget(
    request: Request,
    kernels: Mapping[str, Weights],
    probe: object,
    finished: Callable[[Masks], Masks],
) -> Masks:
    """Returns the masks of all kernels that meet a budget of single weights or tiles.

    Args:
        request: The pruning request, with one budget.
        kernels: Kernels to which it applies, checked, by path.
        probe: What is left or measured with given masks.
        finished: Function from masks of some of these kernels to those of all kernels.

    Raises:
        ValueError: If the budget cannot be met.
    """
    ((name, limit),) = (request.budget or {}).items()
    bare = dataclasses.replace(request, budget=None, keep_sparser=True)
    if isinstance(limit, Latency) and isinstance(probe, ServedProbe):
        return _within_latency(limit, bare, kernels, probe, finished)
    if not isinstance(limit, Latency) and isinstance(probe, StoredSize):
        masks_at = _masks_at(bare, kernels, finished)
        return within_bytes(limit, probe, _most(bare, kernels), masks_at)
    if not isinstance(limit, Latency) and isinstance(probe, MultiplyAdds):
        return _within_multiply_adds(limit, bare, kernels, probe, finished)
    raise ValueError(
        f"A budget of {name} is one of a model: call `LotteryTicketPruner.update_masks`."
    )


def _within_multiply_adds(
    share: float,
    request: Request,
    kernels: Mapping[str, Weights],
    costs: MultiplyAdds,
    finished: Callable[[Masks], Masks],
) -> Masks:
    used = {path: kernel for path, kernel in kernels.items() if path in costs.uses}
    if not used:
        raise ValueError(
            f"None of the weights {list(kernels)} takes part in multiply-adds, so that pruning "
            "saves none. Pass a `sparsity`, or a budget of bytes."
        )
    size = sum(kernel.mask.size for kernel in used.values())
    masks_at = _masks_at(request, used, finished)
    if request.scope == "global":
        # The weights that are worth most for what they cost are those to keep.
        worth = {p: s / costs.uses[p] for p, s in scores_of(request, used).items()}
        ranked = ranked_by(request, used, worth)

        def masks_at(sparsity: float) -> Masks:
            amount = {"sparsity": sparsity, "keep_sparser": True}
            return finished(ranked.prune(amount, again=True))

    most = int(_most(request, used) * size)
    return within_multiply_adds(share, costs, most, size, masks_at)


def _within_latency(
    latency: Latency,
    request: Request,
    kernels: Mapping[str, Weights],
    probe: ServedProbe,
    finished: Callable[[Masks], Masks],
) -> Masks:
    prune: dict[str, Callable[..., Masks]]
    losses = None
    if request.scope == "global":
        scores = scores_of(request, kernels)
        prune = {p: ranked_by(request, {p: kernels[p]}, {p: s}).prune for p, s in scores.items()}
        losses = {p: _loss_of(request, p, kernels[p].mask, s) for p, s in scores.items()}
    else:
        prune = {each.paths[0]: each.prune for each in comparisons(request, kernels)}

    def masks_at(sparsities: Mapping[str, float]) -> Masks:
        pruned: Masks = {}
        for path, sparsity in sparsities.items():
            amount = {"sparsity": _keeping_one(sparsity, kernels[path]), "keep_sparser": True}
            pruned |= prune[path](amount, again=True)
        return finished(pruned)

    now = {path: 1 - float(np.mean(kernel.mask)) for path, kernel in kernels.items()}
    return within_served_latency(latency, probe, now, masks_at, losses)


def _keeping_one(sparsity: float, kernel: Weights) -> float:
    return min(sparsity, 1 - 1 / kernel.mask.size)


def _loss_of(
    request: Request, path: str, mask: np.ndarray, scores: np.ndarray
) -> Callable[[float], float]:
    """Returns the function from a sparsity to the sum of the scores that are pruned for it."""
    kept = scores[mask].astype("float64")
    if np.isnan(kept).any():
        raise ValueError(f"Criterion {request.criterion.name!r} on {path!r}: {NAN}")
    # Infinite scores outweigh all others, in sums that can be compared.
    finite = np.nan_to_num(kept, posinf=_INFINITE, neginf=-_INFINITE)
    sums = np.concatenate([[0.0], np.cumsum(np.sort(finite))])

    def loss(sparsity: float) -> float:
        drop = int(sparsity * mask.size) - (mask.size - (sums.size - 1))
        return float(sums[min(max(drop, 0), sums.size - 1)])

    return loss


def _masks_at(
    request: Request, kernels: Mapping[str, Weights], finished: Callable[[Masks], Masks]
) -> Callable[[float], Masks]:
    """Returns the function from a sparsity to masks, as the request ranks and divides it."""
    ranked = list(comparisons(request, kernels))

    def masks_at(sparsity: float) -> Masks:
        amount_of = amounts(dataclasses.replace(request, sparsity=sparsity), kernels)
        pruned: Masks = {}
        for comparison in ranked:
            pruned |= comparison.prune(amount_of[comparison.paths[0]], again=True)
        return finished(pruned)

    return masks_at


def _most(request: Request, kernels: Mapping[str, Weights]) -> float:
    """Returns about the greatest sparsity with which each kernel keeps a weight on average."""
    most = 1 - len(kernels) / sum(kernel.mask.size for kernel in kernels.values())
    least = most if request.distribution is None else 0.0
    while most - least > 1e-4:  # A distribution may leave kernels dense.
        middle = (least + most) / 2
        try:
            amounts(dataclasses.replace(request, sparsity=middle), kernels)
        except ValueError:
            most = middle
        else:
            least = middle
    return least
