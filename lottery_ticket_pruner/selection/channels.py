"""Selects channels to prune, each with all weights that make it, pass it on or read it."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.checks import is_number
from lottery_ticket_pruner.selection.amounts import drop_count
from lottery_ticket_pruner.selection.budgets import Costs, within_budget
from lottery_ticket_pruner.selection.channel_scores import channel_scores
from lottery_ticket_pruner.selection.families import (
    Family,
    Graph,
    kept_channels,
    remove,
    stream_name,
)
from lottery_ticket_pruner.selection.latency_search import Probe, within_latency
from lottery_ticket_pruner.selection.lowest import drop_lowest
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.weights import Weights, prepared
from lottery_ticket_pruner.shares import check_share, one_of, shares_of
from lottery_ticket_pruner.structures import Channels
from masked_layers.randomness import stream


def select_channels(
    request: Request,
    weights: Mapping[str, Weights],
    graph: Graph | None,
    probe: Probe | None = None,
) -> dict[str, np.ndarray]:
    """Returns new masks without the channels that the criterion ranks lowest.

    Args:
        request: The pruning request. Its structure is `Channels`.
        weights: Weights by path. They are not changed.
        graph: The channels of the model, or None if they were not followed.
        probe: Function that measures latencies, for a budget of latency.

    Returns:
        A dict from path to a new bool mask, True where a weight is kept, in the order of `weights`.

    Raises:
        ValueError: If the graph has no families, an amount or a budget is out of range or cannot be
            reached under `at_most`, or a score is NaN.
    """
    structure = request.structure
    assert isinstance(structure, Channels)
    if graph is None or not graph.families:
        raise ValueError(
            f"{structure} finds no channels that can be removed. It requires a masked Sequential "
            "or Functional model and `LotteryTicketPruner.update_masks`, which follows its "
            "channels. `masked_layers.channel_families(model)` returns why layers stay whole."
        )
    if request.distribution is not None:
        raise ValueError(
            f"`distribution` sets a sparsity for each kernel, but {structure} prunes channels "
            'across kernels. Leave `distribution` out. scope="global" ranks the channels of all '
            "layers together."
        )
    masks = {path: np.asarray(kernel.mask, bool) for path, kernel in weights.items()}
    kept = [kept_channels(family, masks) for family in graph.families]
    ranking = _ranking(request, structure, graph.families, kept, weights)
    if request.budget is None:
        families = [graph.families[number] for number in ranking.scores]
        shares = _shares(request, structure, list(weights), families)
        kept = ranking.prune(request, shares)
    else:
        kept = _within_budgets(request, structure, graph, ranking, masks, probe)
    return _masks(graph, ranking, masks, kept)


def _within_budgets(
    request: Request,
    structure: Channels,
    graph: Graph,
    ranking: "_Ranking",
    masks: Mapping[str, np.ndarray],
    probe: Probe | None,
) -> list[np.ndarray]:
    """Returns which channels of each family are kept under the budgets of a request."""
    assert request.budget is not None

    def kept_at(sparsity: float) -> list[np.ndarray]:
        at = dataclasses.replace(request, sparsity=sparsity, budget=None, keep_sparser=True)
        return ranking.prune(at, [sparsity] * len(ranking.scores))

    costs = Costs(graph, {path: mask.shape for path, mask in masks.items()})
    most = ranking.most(request.scope)
    shares = {name: share for name, share in request.budget.items() if is_number(share)}
    least = within_budget(shares, structure, costs, most, kept_at) if shares else 0.0
    latency = request.budget.get("latency")
    if not isinstance(latency, Latency):
        return kept_at(least)
    if probe is None:
        raise ValueError(
            "A budget of latency is met by measuring smaller models: call "
            "`LotteryTicketPruner.update_masks`."
        )
    cost = "macs" if graph.positions and not costs.unknown else "weights"
    found = within_latency(
        latency,
        structure,
        probe,
        (least, most),
        lambda sparsity: _masks(graph, ranking, masks, kept_at(sparsity)),
        lambda sparsity: costs.left(cost, kept_at(sparsity)),
    )
    return kept_at(found)


def _masks(
    graph: Graph,
    ranking: "_Ranking",
    masks: Mapping[str, np.ndarray],
    kept: Sequence[np.ndarray],
) -> dict[str, np.ndarray]:
    """Returns the masks without the channels that ranked families do not keep."""
    masks = {path: mask.copy() for path, mask in masks.items()}
    for number in ranking.scores:
        remove(graph.families[number], ~kept[number], masks)
    return masks


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranking:
    """The channels of a model with their scores, ready to be pruned to any amount.

    Attributes:
        structure: Structure of the request.
        families: All families of the model.
        kept: For each of them, which channels are kept so far.
        scores: Position of a family that is ranked -> the scores of its channels.
    """

    structure: Channels
    families: Sequence[Family]
    kept: Sequence[np.ndarray]
    scores: Mapping[int, np.ndarray]

    def prune(self, request: Request, shares: Sequence[float]) -> list[np.ndarray]:
        """Returns which channels of each family are kept.

        Args:
            request: Request with an amount.
            shares: Share of each ranked family, for scope `"layer"`.
        """
        kept = list(self.kept)
        if request.scope == "layer":
            for number, share in zip(self.scores, shares, strict=True):
                kept[number] = _of_family(
                    request,
                    self.structure,
                    self.families[number],
                    share,
                    self.kept[number],
                    self.scores[number],
                )
            return kept
        for numbers in self._together(request.scope):
            chosen = _of_group(
                request,
                self.structure,
                [self.families[n] for n in numbers],
                [self.kept[n] for n in numbers],
                [self.scores[n] for n in numbers],
            )
            for number, flags in zip(numbers, chosen, strict=True):
                kept[number] = flags
        return kept

    def most(self, scope: str) -> float:
        """Returns the greatest sparsity of channels that is possible in all groups."""
        if scope == "layer":
            return self.structure.at_most
        sizes = [[self.families[n].size for n in group] for group in self._together(scope)]
        return min(
            1 - sum(fewest(self.structure, size) for size in group) / sum(group) for group in sizes
        )

    def _together(self, scope: str) -> list[list[int]]:
        """Returns the positions of the families that are ranked together, group by group."""
        groups: dict[object, list[int]] = {}
        for number in self.scores:
            family = self.families[number]
            key = (family.kind, family.form) if scope == "isomorphic" else None
            groups.setdefault(key, []).append(number)
        return list(groups.values())


def _ranking(
    request: Request,
    structure: Channels,
    families: Sequence[Family],
    kept: Sequence[np.ndarray],
    weights: Mapping[str, Weights],
) -> _Ranking:
    """Returns the ranking of all families that the structure takes and the criterion can score."""
    taken = [number for number, family in enumerate(families) if structure.takes(family.kind)]
    within = {path for number in taken for path in families[number].weights}
    kernels = {p: prepared(request.criterion, p, k) for p, k in weights.items() if p in within}
    scores = channel_scores(
        request, structure, [families[n] for n in taken], kernels, [kept[n] for n in taken]
    )
    found = {n: values for n, values in zip(taken, scores, strict=True) if values is not None}
    return _Ranking(structure=structure, families=families, kept=kept, scores=found)


def _shares(
    request: Request, structure: Channels, paths: Sequence[str], families: Sequence[Family]
) -> list[float]:
    """Returns the share of each family: the smallest one of the weights that make it."""
    name, share = one_of(request.rate, request.sparsity)
    found = shares_of(name, share, paths, request.scope)
    shares = [min(found[path] for path in family.made or family.weights) for family in families]
    for value in shares:
        check_share(name, value)
        if name == "sparsity" and value > structure.at_most:
            raise ValueError(
                f"A sparsity of {value} exceeds `at_most` of {structure}. Pass a lower sparsity "
                f"or structure=structures.Channels(at_most={value})."
            )
    return shares


def _of_family(
    request: Request,
    structure: Channels,
    family: Family,
    share: float,
    kept: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """Returns which channels of a family are kept if the family is ranked by itself."""
    count = int(np.count_nonzero(kept))
    drop = _drop(request, share, family.size, count, repr(", ".join(family.layers)))
    left = rounded(structure, family.size, count, count - drop)
    rng = stream("ties", request.seed, stream_name(family))
    return drop_lowest(scores, kept, count - left, rng)


def _drop(request: Request, share: float, size: int, count: int, where: str) -> int:
    """Returns how many of the `count` kept channels of `size` are pruned for a share."""
    return drop_count(
        size,
        count,
        rate=None if request.rate is None else share,
        sparsity=None if request.sparsity is None else share,
        keep_sparser=request.keep_sparser,
        where=where,
        unit="channels",
    )


def rounded(structure: Channels, size: int, count: int, left: int) -> int:
    """Returns how many of the `count` kept channels of `size` stay if `left` are requested."""
    left = max(left, fewest(structure, size))
    return min(count, -(-left // structure.round_to) * structure.round_to)


def fewest(structure: Channels, size: int) -> int:
    """Returns the minimum number of channels that a layer of `size` channels keeps."""
    return max(1, size - drop_count(size, size, sparsity=structure.at_most))


def _of_group(
    request: Request,
    structure: Channels,
    families: Sequence[Family],
    kept: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Returns which channels of each family are kept if these families are ranked together.

    With scope `"global"`, scores are divided by the mean score of their family, so that layers of
    different sizes are comparable. Families of equal form, and random scores, are so without that.
    """
    alike = request.scope == "isomorphic"
    comparable = alike or request.criterion is criteria.get("random")
    rng = stream("ties", request.seed, stream_name(families[0]) if alike else "")
    where = "the model as a whole"
    if alike:
        where = f"the group of {', '.join(family.layers[0] for family in families)!r}"
    name, share = one_of(request.rate, request.sparsity)
    share = check_share(name, share)
    ends = np.cumsum([family.size for family in families])[:-1]
    count = sum(int(np.count_nonzero(flags)) for flags in kept)
    size = sum(family.size for family in families)
    drop = _drop(request, share, size, count, where)
    relative, allowed = [], []
    for family, flags, values in zip(families, kept, scores, strict=True):
        finite = values[flags & np.isfinite(values)]
        mean = np.abs(finite).mean() if finite.size else 0.0
        relative.append(values / mean if mean > 0 and not comparable else values)
        # A family always keeps its best channels, as many as `fewest` requires.
        order = np.lexsort((rng.random(family.size), values, flags))
        reach = np.zeros(family.size, bool)
        reach[order[: family.size - fewest(structure, family.size)]] = True
        allowed.append(reach & flags)
    within = np.concatenate(allowed)
    if drop > np.count_nonzero(within):
        raise ValueError(
            f"Requested to prune {drop} of {count} channels in {where}, but {structure} allows at "
            f"most {np.count_nonzero(within)}. Prune less, or pass a higher `at_most`."
        )
    left = drop_lowest(np.concatenate(relative), within, drop, rng) | ~within
    chosen = []
    for family, flags, values, part in zip(
        families, kept, scores, np.split(left, ends), strict=True
    ):
        now = int(np.count_nonzero(flags))
        stay = rounded(structure, family.size, now, int(np.count_nonzero(part & flags)))
        chosen.append(drop_lowest(values, flags, now - stay, rng))
    return chosen


def shortfalls(
    request: Request,
    graph: Graph,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
) -> dict[str, str]:
    """Returns where fewer channels were pruned than requested, because of limits and rounding.

    Args:
        request: The pruning request, with a rate or a sparsity. Its structure is `Channels`.
        graph: The channels of the model.
        before: Bool masks by path, before pruning.
        after: Bool masks by path, after pruning.

    Returns:
        Names of the layers, or of the whole model -> a text with the numbers.
    """
    structure = request.structure
    assert isinstance(structure, Channels)
    families = [family for family in graph.families if structure.takes(family.kind)]
    then, now = (
        [int(np.count_nonzero(kept_channels(family, masks))) for family in families]
        for masks in (before, after)
    )
    sizes = [family.size for family in families]
    names = [", ".join(family.layers) for family in families]
    least = 1
    if request.scope == "layer":
        shares = _shares(request, structure, list(before), families)
    else:
        name, share = one_of(request.rate, request.sparsity)
        names, shares = ["the model as a whole"], [check_share(name, share)]
        sizes, then, now = [sum(sizes)], [sum(then)], [sum(now)]
        # In isomorphic groups, each count is rounded down by itself.
        least = len(families) if request.scope == "isomorphic" else 1
    found = {}
    for name, share, size, before_it, after_it in zip(names, shares, sizes, then, now, strict=True):
        wanted = before_it - _drop(request, share, size, before_it, name)
        if after_it - wanted >= least:
            found[name] = f"{after_it} of {size} are kept"
    return found
