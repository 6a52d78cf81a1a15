"""New masks of all kernels: scores become masks, to the exact count."""

import numbers
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.selection.amounts import distribute, refuse_amounts, resolve_scope
from lottery_ticket_pruner.selection.comparisons import comparisons
from lottery_ticket_pruner.selection.weights import Weights, prepared
from lottery_ticket_pruner.shares import Share, one_of, shares_of


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
        ValueError: Shares, scope or criterion make no sense; there are no kernels; a record is
            missing, has another shape than its mask or holds a NaN or an infinity; a sparsity is
            exceeded already; a structure applies to no kernel. The message names the path.
    """
    structure = None if structure is None else structures.get(structure)
    criterion, scope, kernels = _admit(criterion, weights, scope, seed, structure)
    if structure is not None and structure.kept is not None:
        refuse_amounts(structure, rate=rate, sparsity=sparsity, distribution=distribution)
        amounts = None
    else:
        if distribution is not None:
            sparsity = distribute(distribution, kernels, scope, rate, sparsity)
        name, share = one_of(rate, sparsity)
        shares = shares_of(name, share, kernels, scope)
        amounts = {
            path: {name: value, "keep_sparser": keep_sparser} for path, value in shares.items()
        }
    pruned = {}
    for comparison in comparisons(criterion, kernels, scope, seed, structure):
        pruned |= comparison.prune(amounts and amounts[comparison.paths[0]])
    return _in_order(weights, pruned)


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
        ValueError: An argument is one that `update` refuses, too.
    """
    structure = None if structure is None else structures.get(structure)
    criterion, scope, kernels = _admit(criterion, weights, scope, seed, structure)
    if structure is not None and structure.kept is not None:
        refuse_amounts(structure, sparsities=sparsities)
    shares = [shares_of("sparsity", share, kernels, scope) for share in sparsities]
    ranked = list(comparisons(criterion, kernels, scope, seed, structure))

    def masks() -> Iterator[dict[str, np.ndarray]]:
        for share in shares:
            pruned: dict[str, np.ndarray] = {}
            for comparison in ranked:
                amount = {"sparsity": share[comparison.paths[0]]}
                pruned |= comparison.prune(amount, again=True)
            yield _in_order(weights, pruned)

    return masks()


def _admit(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    scope: str | None,
    seed: int,
    structure: structures.Structure | None,
) -> tuple[criteria.Criterion, str, dict[str, Weights]]:
    """Returns the criterion, the scope, and the checked kernels to which the structure applies."""
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
            + ("Use N:M, or another criterion." if criterion.scope else 'Use "layer" or "global".')
        )
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
    if not weights:
        raise ValueError("There are no weights to prune: the mapping of weights is empty.")
    kernels = {
        path: prepared(criterion, path, kernel)
        for path, kernel in weights.items()
        if structure is None or structure.applies(kernel.layout)
    }
    if not kernels:
        raise ValueError(f"{structure} applies to none of the weights {list(weights)}.")
    return criterion, scope, kernels


def _in_order(
    weights: Mapping[str, Weights], pruned: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        path: pruned[path] if path in pruned else np.array(kernel.mask, dtype=bool)
        for path, kernel in weights.items()
    }
