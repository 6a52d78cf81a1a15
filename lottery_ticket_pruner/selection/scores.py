"""Scores of weights: what a criterion makes of their records."""

from collections.abc import Sequence

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection.weights import HOW_TO_RECORD, Weights, joined, records_of

# Weights scored at a time: a criterion's intermediate arrays stay in the processor's cache.
_CHUNK = 2**17


def score(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    mask: np.ndarray,
    rng: np.random.Generator,
    drop: int | None,
    where: str,
) -> np.ndarray:
    """Returns the scores of the kernels' weights in one 1-D array, from one call of the criterion.

    Args:
        criterion: Criterion that scores them.
        kernels: Kernels that are scored together.
        mask: Bool array of all their weights, 1-D.
        rng: Generator for random scores.
        drop: Number of weights that are going to be dropped, or None if they are tiles.
        where: Name of these weights in error messages.
    """
    # A function of its own so that the joined records are freed before the ranking copies scores.
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
            f"Criterion {criterion.name!r} failed on {where}: {error}. These weights were not "
            f"recorded, and are None: {', '.join(missing)}. "
            + " ".join(HOW_TO_RECORD[name] for name in missing)
        ) from error


def score_in_chunks(
    criterion: criteria.Criterion, kernels: Sequence[Weights], rng: np.random.Generator
) -> np.ndarray:
    """Returns the scores in one 1-D array without copies of the records, some weights at a time."""
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
            group = criteria.Group(mask=mask[chunk], rng=rng, **part)
            scores[done : done + group.mask.size] = criterion(group)
            done += group.mask.size
    return scores
