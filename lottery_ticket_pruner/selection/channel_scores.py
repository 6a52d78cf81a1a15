"""Scores of channels: pooled from those of their weights, or by a criterion for channels."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection.families import Family, along, stream_name
from lottery_ticket_pruner.selection.lowest import NAN
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.scores import parted, weight_scores
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.structures import Channels
from masked_layers.randomness import stream


def channel_scores(
    request: Request,
    structure: Channels,
    families: Sequence[Family],
    kernels: Mapping[str, Weights],
    kept: Sequence[np.ndarray],
) -> list[np.ndarray | None]:
    """Returns an array of scores for each family, or None where the criterion has none.

    Args:
        request: The pruning request.
        structure: Its structure.
        families: Families of channels.
        kernels: Prepared weights of the families by path.
        kept: For each family, which channels are kept.

    Raises:
        ValueError: If the criterion has no scores at all, or scores that are not numbers.
    """
    criterion = request.criterion
    if criterion is criteria.get("random"):
        # Averages of random scores would vary more between channels with fewer weights.
        return [_rng(request, family).random(family.size) for family in families]
    if not isinstance(criterion, criteria.ChannelCriterion):
        masks = {path: kernel.mask for path, kernel in kernels.items()}
        return [*_pooled(structure, families, _weight_scores(request, kernels), masks)]
    found = [
        criterion.scores(_group(family, kernels, flags, _rng(request, family)))
        for family, flags in zip(families, kept, strict=True)
    ]
    if all(scores is None for scores in found):
        raise ValueError(
            f"Criterion {criterion.name!r} has no scores for any channel of the model. "
            f"{criterion.doc}"
        )
    for family, flags, scores in zip(families, kept, found, strict=True):
        if scores is None:
            continue
        where = f"Criterion {criterion.name!r} on {', '.join(family.layers)!r}"
        if scores.shape != (family.size,):
            raise ValueError(f"{where}: scores of shape {scores.shape}, not {(family.size,)}.")
        if np.isnan(scores[flags]).any():
            raise ValueError(f"{where}: {NAN}")
    return found


def _rng(request: Request, family: Family) -> np.random.Generator:
    return stream("ties", request.seed, "channels", stream_name(family))


def _group(
    family: Family,
    kernels: Mapping[str, Weights],
    kept: np.ndarray,
    rng: np.random.Generator,
) -> criteria.ChannelGroup:
    """Returns a family as its criterion sees it."""
    rows = []
    for path, axis in family.made.items():
        kernel, channels = kernels[path], family.weights[path][axis]
        assert kernel.current is not None  # Every criterion for channels needs it.
        values = np.moveaxis(np.where(kernel.mask, kernel.current, 0), axis, 0)
        # A channel may have several columns, as a unit of an LSTM in each of its gates.
        order = np.argsort(channels, kind="stable")[np.count_nonzero(channels < 0) :]
        rows.append(values[order].reshape(family.size, -1))
    scales = []
    for values, channels in family.scales:
        inside = channels >= 0
        total, count = np.zeros(family.size), np.zeros(family.size)
        np.add.at(total, channels[inside], np.abs(values[inside]))
        np.add.at(count, channels[inside], 1)
        scales.append(np.where(count > 0, total / np.maximum(count, 1), np.nan))
    return criteria.ChannelGroup(mask=kept, rng=rng, kernels=tuple(rows), scales=tuple(scales))


def _weight_scores(request: Request, kernels: Mapping[str, Weights]) -> dict[str, np.ndarray]:
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
    """Returns an array of channel scores per family, pooled over the kept weights of a channel.

    Each weight counts once for a channel, even if it lies in its row and in its column, as the
    weight between a recurrent unit and itself.
    """
    greatest = structure.pooling == "max"

    def reduced(path: str, axis: int, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pooled scores and the number of the weights of a mask at each index."""
        kept = along(mask, axis, np.count_nonzero)
        others = tuple(i for i in range(mask.ndim) if i != axis)
        values = scores[path]
        if greatest:
            return np.max(values, others, where=mask, initial=-np.inf), kept
        if structure.pooling == "norm":
            if np.min(values, where=mask, initial=0) < 0:
                raise ValueError(
                    'pooling="norm" squares scores, and some scores of '
                    f'{path!r} are negative. Use pooling="average" with this criterion.'
                )
            values = np.square(values, dtype="float64")
        return np.sum(values, others, where=mask, dtype="float64"), kept

    @functools.cache  # Several families may belong to one kernel.
    def at_each_index(path: str, axis: int) -> tuple[np.ndarray, np.ndarray]:
        return reduced(path, axis, masks[path])

    pooled = []
    for family in families:
        values, counts = np.zeros(family.size), np.zeros(family.size)
        if greatest:
            values -= np.inf
        for path, axes in family.weights.items():
            for axis, channels, rest in _each_once(masks[path], axes):
                here = channels >= 0
                parts, kept = (
                    at_each_index(path, axis) if rest is None else reduced(path, axis, rest)
                )
                combine = np.maximum if greatest else np.add
                combine.at(values, channels[here], parts[here])
                np.add.at(counts, channels[here], kept[here])
        if not greatest:
            values /= np.maximum(counts, 1)
        pooled.append(np.sqrt(values) if structure.pooling == "norm" else values)
    return pooled


def _each_once(
    mask: np.ndarray, axes: Mapping[int, np.ndarray]
) -> Iterator[tuple[int, np.ndarray, np.ndarray | None]]:
    """Yields the axes of a kernel with their channels, and the mask of the weights that count.

    That mask leaves out the weights that belong to the same channel along an earlier axis. It is
    None for the first axis, where all kept weights count.
    """
    earlier: list[tuple[int, np.ndarray]] = []
    for axis, channels in axes.items():
        rest = mask if earlier else None
        for other, others in earlier:
            same = (others[:, None] == channels) & (channels >= 0)
            shape = [1] * mask.ndim
            shape[other], shape[axis] = len(others), len(channels)
            rest = rest & ~(same if other < axis else same.T).reshape(shape)
        yield axis, channels, rest
        earlier.append((axis, channels))
