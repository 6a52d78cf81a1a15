"""Computes new masks of all kernels from scores, with exact counts."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.selection.amounts import amounts, rounds
from lottery_ticket_pruner.selection.channels import select_channels
from lottery_ticket_pruner.selection.comparisons import comparisons
from lottery_ticket_pruner.selection.families import Graph, complete
from lottery_ticket_pruner.selection.latency_search import Probe
from lottery_ticket_pruner.selection.request import Request, refuse_amounts
from lottery_ticket_pruner.selection.weight_budgets import WeightProbe, within_budget
from lottery_ticket_pruner.selection.weights import Weights, prepared
from lottery_ticket_pruner.shares import Share, shares_of

# A function from masks by path to evidence by name and path.
Measure = Callable[[Mapping[str, np.ndarray]], Mapping[str, Mapping[str, np.ndarray]]]


def select(
    request: Request,
    weights: Mapping[str, Weights],
    measure: Measure | None = None,
    graph: Graph | None = None,
    probe: Probe | WeightProbe | None = None,
) -> dict[str, np.ndarray]:
    """Returns new masks without the lowest-ranked weights, with exact counts.

    Args:
        request: The pruning request.
        weights: Kernels by path. They are not changed.
        measure: Function that measures the evidence of the criterion under given masks. It maps
            masks by path to a dict from the name of the evidence to arrays by path. It is called
            before each round of the criterion. If None, there is one round, with the evidence in
            `weights`.
        graph: Channels of the model, for structures that need them.
        probe: What is left or measured with given masks, for a budget.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: If the request does not fit the weights, as described for `update`.
    """
    if measure is None:
        return _select_once(request, weights, graph, probe)
    masks = {path: kernel.mask for path, kernel in weights.items()}
    for part in rounds(request, weights):
        found = measure(masks)
        weights = {
            path: dataclasses.replace(kernel, mask=masks[path]).with_records(
                {name: arrays[path] for name, arrays in found.items()}
            )
            for path, kernel in weights.items()
        }
        masks = _select_once(part, weights, graph, probe)
    return masks


def apart(request: Request, weights: Mapping[str, Weights]) -> dict[str, Request] | None:
    """Returns a request for each kernel alone, which together prune what the request prunes.

    Args:
        request: The pruning request.
        weights: Kernels by path.

    Returns:
        A dict from paths to requests, without the kernels that a structure does not apply to; or
        None if weights of several kernels are ranked or pruned together, for a budget, or in
        several rounds.

    Raises:
        ValueError: If an amount does not fit the kernels, as described for `update`.
    """
    structure = request.structure
    together = structure is not None and (structure.coupled or structure.whole_outputs)
    if (
        together
        or request.budget is not None
        or request.scope == "global"
        or request.criterion.rounds > 1
    ):
        return None
    kernels = {
        path: kernel
        for path, kernel in weights.items()
        if structure is None or structure.applies(kernel.layout)
    }
    bare = dataclasses.replace(request, rate=None, sparsity=None, distribution=None)
    return {
        path: dataclasses.replace(bare, **amount)
        for path, amount in amounts(request, kernels).items()
    }


def select_many(
    request: Request, weights: Mapping[str, Weights], sparsities: Sequence[Share]
) -> Iterator[dict[str, np.ndarray]]:
    """Returns the results of `select` for many sparsities, from a single ranking.

    Args:
        request: The pruning request, without an amount.
        weights: Kernels by path. They are not changed.
        sparsities: Shares of all weights that are pruned afterwards: numbers or mappings.

    Returns:
        An iterator over dicts from path to bool mask, one for each sparsity.

    Raises:
        ValueError: If the request does not fit the weights, as described for `update`.
    """
    if request.structure is not None and request.structure.coupled:
        raise ValueError(
            f"{request.structure} requires the channels of a model: call "
            "`LotteryTicketPruner.update_masks` for each sparsity, on masks that were reset."
        )
    kernels = _admitted(request, weights)
    if request.fixed is not None:
        refuse_amounts(request.fixed, sparsities=sparsities)
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
    """Returns new masks without the lowest-ranked weights, with exact counts.

    The result depends on the arrays, paths and seed, but not on the order of `weights`. With the
    scopes `"layer"` and `"output"`, the mask of a kernel does not depend on other kernels.

    Args:
        criterion: An identifier for `criteria.get`: name, configuration, criterion or function.
        weights: Kernels by path. They are not changed.
        rate: Share of the kept weights to prune now, in [0, 1), or a mapping from patterns to
            shares. A key equal to the path is used first, then the first pattern that `re.search`
            finds in the path, then the key `"default"`. A pattern that matches no path is an error.
        sparsity: Share of all weights that are pruned afterwards, in the same form as `rate`.
            Exactly one of `rate` and `sparsity` must be given.
        scope: Weights that are ranked together: `"layer"` (each kernel separately), `"global"` (all
            kernels together) or `"output"` (each output unit of each kernel separately). The
            default is the criterion's own scope, or else `"layer"`.
        seed: Non-negative integer for random scores and ties.
        structure: An identifier for `structures.get`, or None. If given, tiles of weights are
            ranked, and rates, sparsities and counts refer to tiles. A tile counts as kept while any
            of its weights is kept. N:M sets the sparsity itself and excludes `rate`, `sparsity`,
            `scope` and `distribution`. Kernels without such tiles are left unchanged and do not
            count.
        distribution: An identifier for `distributions.get`, or None. If given, `sparsity` is that
            of all kernels together and is divided among them. Shares are rounded to whole tiles.
        keep_sparser: Whether weights that are already sparser than `sparsity` are left unchanged,
            instead of raising an error.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: If a share, the scope or the criterion is not valid, `weights` is empty, a
            record is missing, does not have the shape of its mask or contains NaN or infinity, a
            sparsity is already exceeded, or a structure applies to no kernel. The message names
            the path.
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
    """Returns the results of `update` for many sparsities, from a single ranking.

    Each result equals `update(criterion, weights, sparsity=..., scope=scope, seed=seed)` for the
    same weights, including ties. The sparsities may be in any order, because results do not build
    on each other. Weights are scored and sorted once, and each mask then costs one comparison per
    weight.

    Args:
        criterion: An identifier for `criteria.get`.
        weights: Kernels by path. They are not changed.
        sparsities: Shares of all weights that are pruned afterwards: numbers or mappings.
        scope: Weights that are ranked together: `"layer"`, `"global"` or `"output"`.
        seed: Non-negative integer for random scores and ties.
        structure: An identifier for `structures.get`, or None. N:M is not supported, because it
            sets the sparsity itself.

    Returns:
        An iterator over dicts from path to bool mask, one for each sparsity. Masks are computed
        lazily.

    Raises:
        ValueError: If an argument is not valid, as described for `update`.
    """
    request = Request.of(criterion, scope=scope, seed=seed, structure=structure)
    return select_many(request, weights, sparsities)


def _select_once(
    request: Request,
    weights: Mapping[str, Weights],
    graph: Graph | None = None,
    probe: Probe | WeightProbe | None = None,
) -> dict[str, np.ndarray]:
    structure = request.structure
    if structure is not None and structure.coupled:
        assert probe is None or isinstance(probe, Probe)
        return select_channels(request, weights, graph, probe)
    kernels = _admitted(request, weights)
    if request.budget is None:
        amount_of = amounts(request, kernels)
        pruned: dict[str, np.ndarray] = {}
        for comparison in comparisons(request, kernels):
            pruned |= comparison.prune(amount_of[comparison.paths[0]])
        return _completed(request, _in_order(weights, pruned), graph)

    def finished(pruned: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return _completed(request, _in_order(weights, pruned), graph)

    return within_budget(request, kernels, probe, finished)


def _completed(
    request: Request, masks: dict[str, np.ndarray], graph: Graph | None
) -> dict[str, np.ndarray]:
    """Returns masks without the weights that read outputs that are pruned as a whole."""
    structure = request.structure
    if graph is None or structure is None or not structure.whole_outputs:
        return masks
    return complete(graph.families, masks)


def _admitted(request: Request, weights: Mapping[str, Weights]) -> dict[str, Weights]:
    """Returns the kernels to which the structure applies, after checking them."""
    if not weights:
        raise ValueError("There are no weights to prune: the mapping of weights is empty.")
    structure = request.structure
    kernels = {
        path: prepared(request.criterion, path, kernel)
        for path, kernel in weights.items()
        if structure is None or structure.applies(kernel.layout)
    }
    if not kernels:
        raise ValueError(f"{structure} does not apply to any of the weights {list(weights)}.")
    return kernels


def _in_order(
    weights: Mapping[str, Weights], pruned: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        path: pruned[path] if path in pruned else np.array(kernel.mask, dtype=bool)
        for path, kernel in weights.items()
    }
