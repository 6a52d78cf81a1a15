"""Selects channels to prune, each with all weights that make it, pass it on or read it."""

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
    """Channels made by the same layers. `masked_layers.ChannelFamily` is one."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the channels."""

    @property
    def kind(self) -> str:
        """What the channels are; "" for outputs of the layers."""

    @property
    def size(self) -> int:
        """Number of channels."""

    @property
    def weights(self) -> Mapping[str, Mapping[int, np.ndarray]]:
        """Path of a weight -> {axis: int array with the channel of each index along it, or -1}."""

    @property
    def made(self) -> Mapping[str, int]:
        """Path of a weight that makes the channels -> its output axis."""


class Graph(Protocol):
    """The channels of a model. `masked_layers.ChannelFamilies` is one."""

    @property
    def families(self) -> Sequence[Family]:
        """Families of channels that can be removed."""

    @property
    def positions(self) -> Mapping[str, int | None]:
        """Path of a kernel -> multiply-adds of each of its weights, or None if unknown."""


def select_channels(
    request: Request, weights: Mapping[str, Weights], graph: Graph | None
) -> dict[str, np.ndarray]:
    """Returns new masks without the channels that the criterion ranks lowest.

    Args:
        request: The pruning request. Its structure is `Channels`.
        weights: Weights by path. They are not changed.
        graph: The channels of the model, or None if they were not followed.

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
    families = [family for family in graph.families if structure.takes(family.kind)]
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
    """The channels of a model with their scores, ready to be pruned to any amount."""

    request: Request
    structure: Channels
    families: Sequence[Family]
    kept: Sequence[np.ndarray]
    scores: Sequence[np.ndarray]
    masks: Mapping[str, np.ndarray]

    def prune(self, request: Request, shares: Sequence[float]) -> dict[str, np.ndarray]:
        """Returns masks with a share of each family pruned, or of the model for scope "global"."""
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


# Number of bisection steps in the search for the smallest sparsity within a budget.
_STEPS = 20


def _within_budget(
    budget: Mapping[str, float], ranking: _Ranking, positions: Mapping[str, int | None]
) -> dict[str, np.ndarray]:
    """Returns masks of the smallest sparsity of channels that meets the budget."""
    if "macs" in budget and (unknown := [path for path, n in positions.items() if n is None]):
        raise ValueError(
            "The multiply-adds of these kernels are unknown, because the input shape of the model "
            f"is not fixed: {unknown}. Give the model a fixed input shape, or pass a budget of "
            "weights."
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
            f"{ranking.request.structure} allows, {reached} are left. Pass a larger budget or a "
            "higher `at_most`. `masked_layers.channel_families(model)` returns the layers that "
            "stay whole."
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
    """Returns the sum of kernel sizes, without empty rows and columns, each times its factor."""
    total = 0.0
    for path, factor in factors.items():
        if path in masks:
            mask = masks[path]
            left = [int(_along(mask, axis, np.any).sum()) for axis in range(mask.ndim)]
            total += math.prod(left) * factor
    return total


def kept_channels(family: Family, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns which channels of a family have a kept weight, as a bool array."""
    kept = np.zeros(family.size, bool)
    for path, axes in family.weights.items():
        for axis, channels in axes.items():
            kept[np.unique(channels[(channels >= 0) & _along(masks[path], axis, np.any)])] = True
    return kept


def remove(family: Family, channels: np.ndarray, masks: dict[str, np.ndarray]) -> None:
    """Prunes channels (a bool array) in the masks of all weights that belong to them, in place."""
    flags = np.append(channels, False)  # Index -1 reads the last entry.
    for path, axes in family.weights.items():
        for axis, members in axes.items():
            np.moveaxis(masks[path], axis, 0)[flags[members]] = False


def complete(families: Sequence[Family], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns masks without the weights that read or pass on channels that no kept weight makes.

    Such a channel may have a bias or the shift of a normalization as its value, but does not depend
    on the input of the model.
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
    """Returns an array of channel scores per family, pooled over the kept weights of a channel."""
    greatest = structure.pooling == "max"

    @functools.cache  # Several families may belong to one kernel.
    def along(path: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pooled scores and the number of the kept weights at each index."""
        mask = masks[path]
        others = tuple(i for i in range(mask.ndim) if i != axis)
        kept = np.count_nonzero(mask, others)
        if greatest:
            return np.max(scores[path], others, where=mask, initial=-np.inf), kept
        values = scores[path]
        if structure.pooling == "norm":
            if np.min(values, where=mask, initial=0) < 0:
                raise ValueError(
                    'pooling="norm" squares scores, and some scores of '
                    f'{path!r} are negative. Use pooling="average" with this criterion.'
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
    """Returns which channels of a family are kept if the family is ranked by itself."""
    count = int(np.count_nonzero(kept))
    drop = _drop(request, share, family.size, count, repr(", ".join(family.layers)))
    left = rounded(structure, family.size, count, count - drop)
    rng = stream("ties", request.seed, family.layers[0] + family.kind)
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


def _of_model(
    request: Request,
    structure: Channels,
    families: Sequence[Family],
    kept: Sequence[np.ndarray],
    scores: Sequence[np.ndarray],
) -> list[np.ndarray]:
    """Returns which channels of each family are kept if all families are ranked together.

    Scores are divided by the mean score of their family, so that layers of different sizes are
    comparable.
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
        # A family always keeps its best channels, as many as `fewest` requires.
        order = np.lexsort((rng.random(family.size), values, flags))
        reach = np.zeros(family.size, bool)
        reach[order[: family.size - fewest(structure, family.size)]] = True
        allowed.append(reach & flags)
    within = np.concatenate(allowed)
    if drop > np.count_nonzero(within):
        raise ValueError(
            f"Requested to prune {drop} of {count} channels, but {structure} allows at most "
            f"{np.count_nonzero(within)}. Prune less, or pass a higher `at_most`."
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
