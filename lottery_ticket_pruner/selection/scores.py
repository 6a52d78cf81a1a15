"""Computes the scores of weights by a criterion."""

from collections.abc import Sequence

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection.weights import HOW_TO_RECORD, Weights, joined, records_of

# Number of weights scored at a time, so that intermediate arrays fit into the processor's cache.
_CHUNK = 2**17


def weight_scores(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    rng: np.random.Generator,
    drop: int | None,
    where: str,
    mask: np.ndarray | None = None,
) -> np.ndarray:
    """Returns the scores of all weights of the kernels as a 1-D array.

    Args:
        criterion: Criterion that scores the weights.
        kernels: Kernels that are scored together.
        rng: Generator for random scores.
        drop: Number of weights to prune, or None if tiles or channels are pruned.
        where: Name of these weights in error messages.
        mask: 1-D bool array of all their weights, if it is known already.
    """
    if criterion.elementwise:
        return _score_in_chunks(criterion, kernels, rng)
    mask = joined([kernel.mask for kernel in kernels]) if mask is None else mask
    return _score(criterion, kernels, mask, rng, drop, where)


def parted(scores: np.ndarray, kernels: Sequence[Weights]) -> list[np.ndarray]:
    """Returns the part of each kernel, in its shape.

    Args:
        scores: Scores (or flags) of all weights of the kernels, of shape (weights,).
        kernels: The kernels, in the same order.

    Raises:
        ValueError: If there is not one score for each weight.
    """
    sizes = [kernel.mask.size for kernel in kernels]
    if scores.shape != (sum(sizes),):
        raise ValueError(f"scores of shape {scores.shape} for {sum(sizes)} weights.")
    parts = np.split(scores, np.cumsum(sizes)[:-1])
    return [part.reshape(kernel.mask.shape) for part, kernel in zip(parts, kernels, strict=True)]


def _score(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    mask: np.ndarray,
    rng: np.random.Generator,
    drop: int | None,
    where: str,
) -> np.ndarray:
    """Returns the scores from one call of the criterion; arguments as for `weight_scores`."""
    # A separate function, so that joined records are freed before the ranking copies the scores.
    records = {
        name: joined([getattr(kernel, name) for kernel in kernels])
        for name in records_of(kernels[0])
    }
    group = criteria.Group(mask=mask, rng=rng, drop=drop, **records)
    try:
        return np.asarray(criterion(group))
    except TypeError as error:
        missing = [name for name in criterion.optional if name not in records]
        if not missing:
            raise
        raise ValueError(
            f"Criterion {criterion.name!r} failed on {where}: {error}. These records do not exist "
            f"and are None: {', '.join(missing)}. "
            + " ".join(HOW_TO_RECORD[name] for name in missing)
        ) from error


def _score_in_chunks(
    criterion: criteria.Criterion, kernels: Sequence[Weights], rng: np.random.Generator
) -> np.ndarray:
    """Returns the scores as a 1-D array, computed in chunks without copying the records."""
    arrays = [array for kernel in kernels for array in records_of(kernel).values()]
    scores = np.empty(
        sum(kernel.mask.size for kernel in kernels), np.result_type(np.float32, *arrays)
    )
    done = 0
    for kernel in kernels:
        mask = joined([kernel.mask])
        records = {name: joined([array]) for name, array in records_of(kernel).items()}
        for start in range(0, mask.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            part = {name: array[chunk] for name, array in records.items()}
            group = criteria.Group(mask=mask[chunk], rng=rng, drop=None, **part)
            scores[done : done + group.mask.size] = criterion(group)
            done += group.mask.size
    return scores
