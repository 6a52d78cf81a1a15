"""New masks of all kernels: scores become masks, to the exact count."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.selection.amounts import amounts, rounds
from lottery_ticket_pruner.selection.comparisons import comparisons
from lottery_ticket_pruner.selection.request import Request, refuse_amounts
from lottery_ticket_pruner.selection.weights import Weights, prepared
from lottery_ticket_pruner.shares import Share, shares_of

# Evidence by name and path, of masks by path.
Measure = Callable[[Mapping[str, np.ndarray]], Mapping[str, Mapping[str, np.ndarray]]]


def select(
    request: Request, weights: Mapping[str, Weights], measure: Measure | None = None
) -> dict[str, np.ndarray]:
    """Returns new masks without what the criterion ranks lowest, to the exact count.

    Args:
        request: What is to be pruned.
        weights: Kernels by path. Nothing in them is changed.
        measure: Function that finds the evidence of the criterion for masks by path: a dict from
            the name of the evidence to arrays by path. It is called before each round of the
            criterion. Without it there is one round, with the evidence in `weights`.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: As for `update`; or rounds are to lead on from masks that are not ones under a
            structure.
    """
    if measure is None:
        return _select_once(request, weights)
    masks = {path: kernel.mask for path, kernel in weights.items()}
    for part in rounds(request, weights):
        found = measure(masks)
        weights = {
            path: dataclasses.replace(
                kernel,
                mask=masks[path],
                **{name: arrays[path] for name, arrays in found.items()},
            )
            for path, kernel in weights.items()
        }
        masks = _select_once(part, weights)
    return masks


def select_many(
    request: Request, weights: Mapping[str, Weights], sparsities: Sequence[Share]
) -> Iterator[dict[str, np.ndarray]]:
    """Returns the masks of `select` for each of many sparsities, from one ranking.

    Args:
        request: What is to be pruned, without an amount.
        weights: As for `select`.
        sparsities: Shares of all weights that are pruned afterwards: numbers or mappings.

    Returns:
        An iterator as that of `update_many`.

    Raises:
        ValueError: As for `update`.
    """
    kernels = _admitted(request, weights)
    if request.keeps_fixed_number:
        refuse_amounts(request.structure, sparsities=sparsities)
    shares = [shares_of("sparsity", share, kernels, request.scope) for share in sparsities]
    ranked = list(comparisons(request, kernels))

    def masks() -> Iterator[dict[str, np.ndarray]]:
        for share in shares:
            pruned: dict[str, np.ndarray] = {}
            for comparison in ranked:
                amount = {"sparsity": share[comparison.paths[0]]}
                pruned |= comparison.prune(amount, again=True)
            yield _in_order(weights, pruned)

    return masks()


def update(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    *,
    rate: Share | None = None,
    sparsity: Share | None = None,
    scope: str | None = None,
    seed: int = 0,
    structure: structures.Identifier | None = None,
    distribution: distributions.Identifier | None = None,
    keep_sparser: bool = False,
) -> dict[str, np.ndarray]:
    """Returns new masks without what the criterion ranks lowest, to the exact count.

    The result depends on the arrays, paths and seed, not on the order of the mapping; under
    `"layer"` and `"output"` a kernel's mask does not depend on the other kernels either.

    Args:
        criterion: Whatever `criteria.get` takes.
        weights: Kernels by path. Nothing in them is changed.
        rate: Share of the kept weights to drop now, in [0, 1). Or a mapping from a pattern to a
            share: a key that is the path itself holds, else the first one that `re.search` finds in
            the path, else the key `"default"`. A pattern that is found in no path is an error.
        sparsity: Share of all weights that are pruned afterwards, likewise. Exactly one of the two.
        scope: Weights that are ranked together: `"layer"` (each kernel alone), `"global"` (all
            kernels together) or `"output"` (each output unit of each kernel alone). By default
            `"layer"`, or the scope that the criterion insists on.
        seed: Non-negative integer for random scores and for the order of ties.
        structure: Whatever `structures.get` takes. Tiles of weights are then ranked, and rates,
            sparsities and counts are those of tiles; a tile is kept as long as one of its weights
            is. N:M sets the sparsity itself and takes none of `rate`, `sparsity`, `scope` and
            `distribution`. Kernels without such tiles stay as they are and count for nothing.
        distribution: Whatever `distributions.get` takes: shares `sparsity`, which is then that of
            all kernels together, out among them. With tiles the shares are rounded to whole ones.
        keep_sparser: If True, weights that are ranked together stay as they are where a `sparsity`
            is below their present one; otherwise that is an error.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: If shares, scope or criterion make no sense; there are no kernels; a record is
            missing, has another shape than its mask or holds a NaN or an infinity; a sparsity is
            exceeded already; a structure applies to no kernel. The message names the path.
    """
    request = Request.of(
        criterion,
        rate=rate,
        sparsity=sparsity,
        scope=scope,
        seed=seed,
        structure=structure,
        distribution=distribution,
        keep_sparser=keep_sparser,
    )
    return select(request, weights)


def update_many(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    *,
    sparsities: Sequence[Share],
    scope: str | None = None,
    seed: int = 0,
    structure: structures.Identifier | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """Returns the masks of `update` for each of many sparsities, from one ranking.

    Every one is what `update(criterion, weights, sparsity=..., scope=scope, seed=seed)` returns for
    these same weights, ties included: they do not build on each other, and need no order. Weights
    are scored and sorted once; each mask then costs a comparison per weight.

    Args:
        criterion: As for `update`.
        weights: As for `update`.
        sparsities: Shares of all weights that are pruned afterwards: numbers or mappings.
        scope: As for `update`.
        seed: As for `update`.
        structure: As for `update`, but for those that fix the sparsity themselves.

    Returns:
        An iterator over dicts from path to bool mask, one for each sparsity. Masks are made when
        they are asked for.

    Raises:
        ValueError: If an argument is one that `update` refuses, too.
    """
    request = Request.of(criterion, scope=scope, seed=seed, structure=structure)
    return select_many(request, weights, sparsities)


def _select_once(request: Request, weights: Mapping[str, Weights]) -> dict[str, np.ndarray]:
    kernels = _admitted(request, weights)
    amount_of = amounts(request, kernels)
    pruned: dict[str, np.ndarray] = {}
    for comparison in comparisons(request, kernels):
        pruned |= comparison.prune(amount_of[comparison.paths[0]])
    return _in_order(weights, pruned)


def _admitted(request: Request, weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """Returns the kernels to which the structure applies, checked."""
    if not weights:
        raise ValueError("There are no weights to prune: the mapping of weights is empty.")
    structure = request.structure
    kernels = {
        path: prepared(request.criterion, path, kernel)
        for path, kernel in weights.items()
        if structure is None or structure.applies(kernel.layout)
    }
    if not kernels:
        raise ValueError(f"{structure} applies to none of the weights {list(weights)}.")
    return kernels


def _in_order(
    weights: Mapping[str, Weights], pruned: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        path: pruned[path] if path in pruned else np.array(kernel.mask, dtype=bool)
        for path, kernel in weights.items()
    }
