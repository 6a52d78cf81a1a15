"""Selection of coupled channels: each goes with all weights that make it, pass it on or read it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from lottery_ticket_pruner.selection.amounts import drop_count
from lottery_ticket_pruner.selection.lowest import NAN, drop_lowest
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.scores import parted, weight_scores
from lottery_ticket_pruner.selection.weights import Weights, prepared
from lottery_ticket_pruner.shares import check_share, one_of, shares_of
from lottery_ticket_pruner.structures import Channels
from masked_layers.randomness import stream


class Family(Protocol):
    """Channels that the same layers make, as `masked_layers.ChannelFamily` describes them."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the channels."""

    @property
    def size(self) -> int:
        """Number of channels."""

    @property
    def weights(self) -> Mapping[str, Mapping[int, np.ndarray]]:
        """Path of a kernel -> {axis: the channel that each index along it belongs to, or -1}."""

    @property
    def made(self) -> Mapping[str, int]:
        """Path of a kernel that makes the channels -> the axis of its outputs."""


class Graph(Protocol):
    """The channels of a model, as `masked_layers.ChannelFamilies` describes them."""

    @property
    def families(self) -> Sequence[Family]:
        """Channels that can be removed."""

    @property
    def positions(self) -> Mapping[str, int | None]:
        """Path of a kernel -> multiply-adds of each of its weights; None where not known."""


def select_channels(
    request: Request, weights: Mapping[str, Weights], graph: Graph | None
) -> dict[str, np.ndarray]:
    """Returns new masks without the channels that the criterion ranks lowest.

    Args:
        request: What is to be pruned; its structure is `Channels`.
        weights: Kernels by path. Nothing in them is changed.
        graph: The channels of the model.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: If the graph has no families, an amount or a budget is not legal or cannot be
            reached under `at_most`, or a score is not a number.
    """
    structure = request.structure
    assert isinstance(structure, Channels)
    if graph is None or not graph.families:
        raise ValueError(
            f"{structure} finds no channels that could be removed. It needs a masked Sequential or "
            "Functional model, and `LotteryTicketPruner.update_masks` to follow its channels; "
            "`masked_layers.channel_families(model)` says why layers stay whole."
        )
    if request.distribution is not None:
        raise ValueError(
            f"A distribution shares weights out among kernels, and {structure} prunes channels of "
            'several kernels. Leave `distribution` out; scope="global" shares channels out.'
        )
    families = graph.families
    within = {path for family in families for path in family.weights}
    kernels = {p: prepared(request.criterion, p, k) for p, k in weights.items() if p in within}
    masks = {path: np.asarray(kernel.mask, bool) for path, kernel in weights.items()}
    ranking = _Ranking(
        request=request,
        structure=structure,
        families=families,
        kept=[kept_channels(family, masks) for family in families],
        scores=_pooled(structure, families, _scores(request, kernels), masks),
        masks=masks,
    )
    if request.budget is not None:
        return _within_budget(request.budget, ranking, graph.positions)
    return ranking.prune(request, _shares(request, structure, list(weights), families))


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Ranking:
    """Channels with their scores, of which more or fewer can be pruned."""

    request: Request
    structure: Channels
    families: Sequence[Family]
    kept: Sequence[np.ndarray]
    scores: Sequence[np.ndarray]
    masks: Mapping[str, np.ndarray]

    def prune(self, request: Request, shares: Sequence[float]) -> dict[str, np.ndarray]:
        """Returns the masks for a share of each family, or for the amount of the whole model."""
        if request.scope == "global":
            chosen = _of_model(request, self.structure, self.families, self.kept, self.scores)
        else:
            chosen = [
                _of_family(request, self.structure, *each)
                for each in zip(self.families, shares, self.kept, self.scores, strict=True)
            ]
        masks = {path: mask.copy() for path, mask in self.masks.items()}
        for family, flags in zip(self.families, chosen, strict=True):
            remove(family, ~flags, masks)
        return masks


# Steps of the search for the smallest sparsity within a budget.
_STEPS = 20


def _within_budget(
    budget: Mapping[str, float], ranking: _Ranking, positions: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
    """Returns the masks of the smallest sparsity of channels that keeps within the budget."""
    if "macs" in budget and (unknown := [path for path, n in positions.items() if n is None]):
        raise ValueError(
            "The multiply-adds of these kernels depend on the size of the input, which the model "
            f"leaves open: {unknown}. Give the model a fixed input shape, or a budget of weights."
        )
    known = {path: number for path, number in positions.items() if number is not None}
    factors = {"macs": known, "weights": dict.fromkeys(ranking.masks, 1)}
    dense = {path: np.ones_like(mask) for path, mask in ranking.masks.items()}
    limits = {name: share * cost(dense, factors[name]) for name, share in budget.items()}

    def masks_of(sparsity: float) -> dict[str, np.ndarray]:
        request = dataclasses.replace(ranking.request, sparsity=sparsity, keep_sparser=True)
        return ranking.prune(request, [sparsity] * len(ranking.families))

    def fits(masks: Mapping[str, np.ndarray]) -> bool:
        return all(cost(masks, factors[name]) <= limit for name, limit in limits.items())

    low, high = 0.0, _most(ranking)
    best = masks_of(high)
    if not fits(best):
        reached = {name: cost(best, factors[name]) / cost(dense, factors[name]) for name in budget}
        raise ValueError(
            f"The budget {dict(budget)} cannot be met: with as many channels pruned as "
            f"{ranking.request.structure} allows, {reached} are left. Ask for less, pass a higher "
            "`at_most`, or see `masked_layers.channel_families(model)` for what stays whole."
        )
    for _ in range(_STEPS):
        middle = (low + high) / 2
        masks = masks_of(middle)
        if fits(masks):
            best, high = masks, middle
        else:
            low = middle
    return best


def _most(ranking: _Ranking) -> float:
    """Returns the greatest sparsity of channels that is possible."""
    structure = ranking.structure
    if ranking.request.scope != "global":
        return structure.at_most
    sizes = [family.size for family in ranking.families]
    return 1 - sum(fewest(structure, size) for size in sizes) / sum(sizes)


def cost(masks: Mapping[str, np.ndarray], factors: Mapping[str, int]) -> float:
    """Returns the sum of the sizes of all kernels without empty rows and columns, times factors."""
    total = 0.0
    for path, factor in factors.items():
        if path in masks:
            mask = masks[path]
            left = [int(_along(mask, axis, np.any).sum()) for axis in range(mask.ndim)]
            total += math.prod(left) * factor
    return total


def kept_channels(family: Family, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns which channels of a family have a kept weight left, as bools."""
    kept = np.zeros(family.size, bool)
    for path, axes in family.weights.items():
        for axis, channels in axes.items():
            kept[np.unique(channels[(channels >= 0) & _along(masks[path], axis, np.any)])] = True
    return kept


def remove(family: Family, channels: np.ndarray, masks: dict[str, np.ndarray]) -> None:
    """Takes channels (bool) out of the masks of all weights that belong to them, in place."""
    flags = np.append(channels, False)  # -1 is the last
    for path, axes in family.weights.items():
        for axis, members in axes.items():
            np.moveaxis(masks[path], axis, 0)[flags[members]] = False


def complete(families: Sequence[Family], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns masks without what reads or passes on channels whose makers are pruned altogether.

    Such a channel still holds a bias or the shift of a normalization, but nothing that depends on
    the input of the model.
    """
    masks = {path: mask.copy() for path, mask in masks.items()}
    for family in families:
        made = np.zeros(family.size, bool)
        for path, axis in family.made.items():
            channels = family.weights[path][axis]
            made[channels[(channels >= 0) & _along(masks[path], axis, np.any)]] = True
        if family.made:
            remove(family, ~made, masks)
    return masks


def _along(array: np.ndarray, axis: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    return reduce(array, tuple(i for i in range(array.ndim) if i != axis))


def _shares(
    request: Request, structure: Channels, paths: Sequence[str], families: Sequence[Family]
) -> list[float]:
    """Returns the share of each family: the smallest of those of the kernels that make it."""
    name, share = one_of(request.rate, request.sparsity)
    found = shares_of(name, share, paths, request.scope)
    shares = [min(found[path] for path in family.made or family.weights) for family in families]
    for value in shares:
        check_share(name, value)
        if name == "sparsity" and value > structure.at_most:
            raise ValueError(
                f"A sparsity of {value} is above the share of channels that {structure} "
                "takes from a layer at most. Ask for less, or pass "
                f"structure=structures.Channels(at_most={value})."
            )
    return shares


def _scores(request: Request, kernels: Mapping[str, Weights]) -> dict[str, np.ndarray]:
    """Returns the scores of all weights by path."""
    criterion = request.criterion
    together = criterion.scope == "global"
    found = {}
    for paths in [sorted(kernels)] if together else [[path] for path in kernels]:
        where = "the model as a whole" if together else repr(paths[0])
        members = [kernels[path] for path in paths]
        rng = stream("ties", request.seed, "" if together else paths[0])
        scores = weight_scores(criterion, members, rng, None, where)
        try:
            parts = parted(scores, members)
        except ValueError as error:
            raise ValueError(f"Criterion {criterion.name!r} on {where}: {error}") from error
        for path, part in zip(paths, parts, strict=True):
            if np.isnan(part[kernels[path].mask]).any():
                raise ValueError(f"Criterion {criterion.name!r} on {path!r}: {NAN}")
            found[path] = part.astype(np.result_type(part, np.float32), copy=False)
    return found


def _pooled(
    structure: Channels,
    families: Sequence[Family],
    scores: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
) -> list[np.ndarray]:
    """Returns one score for each channel of each family, of all kept weights that belong to it."""
    greatest = structure.pooling == "max"

    @functools.cache  # Many families may read one kernel.
    def along(path: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pooled scores, and the number, of the kept weights at each index."""
        mask = masks[path]
        others = tuple(i for i in range(mask.ndim) if i != axis)
        kept = np.count_nonzero(mask, others)
        if greatest:
            return np.max(scores[path], others, where=mask, initial=-np.inf), kept
        values = scores[path]
        if structure.pooling == "norm":
            if np.min(values, where=mask, initial=0) < 0:
                raise ValueError(
                    'pooling="norm" squares scores, and some are negative on '
                    f'{path!r}. Use "average" with this criterion.'
                )
            values = np.square(values, dtype="float64")
        return np.sum(values, others, where=mask, dtype="float64"), kept

    pooled = []
    for family in families:
        values, counts = np.zeros(family.size), np.zeros(family.size)
        if greatest:
            values -= np.inf
        for path, axes in family.weights.items():
            for axis, channels in axes.items():
                here = channels >= 0
                parts, kept = along(path, axis)
                combine = np.maximum if greatest else np.add
                combine.at(values, channels[here], parts[here])
                np.add.at(counts, channels[here], kept[here])
        if not greatest:
            values /= np.maximum(counts, 1)
        pooled.append(np.sqrt(values) if structure.pooling == "norm" else values)
    return pooled


def _of_family(
    request: Request,
    structure: Channels,
    family: Family,
    share: float,
    kept: np.ndarray,
    scores: np.ndarray,
) -> np.ndarray:
    """Returns which channels of a family are kept, when it is ranked alone."""
    count = int(np.count_nonzero(kept))
    drop = _drop(request, share, family.size, count, repr(", ".join(family.layers)))
    left = rounded(structure, family.size, count, count - drop)
    rng = stream("ties", request.seed, family.layers[0])
    return drop_lowest(scores, kept, count - left, rng)


def _drop(request: Request, share: float, size: int, count: int, where: str) -> int:
    """Returns how many of `count` kept channels of `size` a share of the request prunes."""
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
    """Returns how many of `count` kept channels of `size` stay, where `left` were asked for."""
    left = max(left, fewest(structure, size))
    return min(count, -(-left // structure.round_to) * structure.round_to)


def fewest(structure: Channels, size: int) -> int:
    """Returns the number of channels that a layer of `size` keeps at least."""
    return max(1, size - drop_count(size, size, sparsity=structure.at_most))


def _of_model(
    request: Request,
    structure: Channels,
    families: Sequence[Family],
    kept: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Returns which channels of each family are kept, when all are ranked together.

    Scores are divided by their mean over the family, so that layers of different size compare.
    """
    rng = stream("ties", request.seed, "")
    name, share = one_of(request.rate, request.sparsity)
    share = check_share(name, share)
    ends = np.cumsum([family.size for family in families])[:-1]
    count = sum(int(np.count_nonzero(flags)) for flags in kept)
    size = sum(family.size for family in families)
    drop = _drop(request, share, size, count, "the model as a whole")
    relative, allowed = [], []
    for family, flags, values in zip(families, kept, scores, strict=True):
        finite = values[flags & np.isfinite(values)]
        mean = np.abs(finite).mean() if finite.size else 0.0
        relative.append(values / mean if mean > 0 else values)
        # The best of a family are out of reach: so many as it keeps in any case.
        order = np.lexsort((rng.random(family.size), values, flags))
        reach = np.zeros(family.size, bool)
        reach[order[: family.size - fewest(structure, family.size)]] = True
        allowed.append(reach & flags)
    within = np.concatenate(allowed)
    if drop > np.count_nonzero(within):
        raise ValueError(
            f"{drop} of {count} channels were to go, and {structure} lets at most "
            f"{np.count_nonzero(within)} go. Ask for less, or pass a higher `at_most`."
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
