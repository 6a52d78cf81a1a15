"""Computes the scores of weights by a criterion."""

import itertools
from collections.abc import Sequence

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection.lowest import read_all
from lottery_ticket_pruner.selection.weights import HOW_TO_RECORD, Weights, joined, records_of


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
        return read_all(ChunkedScores(criterion, kernels, rng))
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


class ChunkedScores:
    """Scores of all weights of kernels as a 1-D array, of which only what is read is computed.

    Args:
        criterion: A criterion whose scores depend on the records of a weight alone.
        kernels: Kernels that are scored together.
        rng: Generator of the criterion's groups.

    Attributes:
        shape: Shape of the array.
        dtype: Its dtype.
    """

    def __init__(
        self,
        criterion: criteria.Criterion,
        kernels: Sequence[Weights],
        rng: np.random.Generator,
    ) -> None:
        self._criterion, self._rng = criterion, rng
        self._masks = [joined([kernel.mask]) for kernel in kernels]
        self._records = [
            {name: joined([array]) for name, array in records_of(kernel).items()}
            for kernel in kernels
        ]
        self._ends = np.cumsum([mask.size for mask in self._masks])
        arrays = [array for records in self._records for array in records.values()]
        self.dtype = np.result_type(np.float32, *arrays)
        self.shape = (int(self._ends[-1]),)

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Returns the scores of a range without a step, or of positions in ascending order."""
        if not isinstance(key, slice):
            numbers = np.searchsorted(key, [0, *self._ends])
            parts = [key[first:last] for first, last in itertools.pairwise(numbers)]
            return self._of([part - end for part, end in zip(parts, self._starts, strict=True)])
        first, last, _ = key.indices(self.shape[0])
        return self._of(
            [
                slice(max(0, first - start), max(0, min(last, end) - start))
                for start, end in zip(self._starts, self._ends, strict=True)
            ]
        )

    @property
    def _starts(self) -> list[int]:
        return [0, *self._ends[:-1].tolist()]

    def _of(self, keys: Sequence[slice | np.ndarray]) -> np.ndarray:
        """Returns the scores of parts of the kernels."""
        found = []
        for key, mask, records in zip(keys, self._masks, self._records, strict=True):
            part = mask[key]
            if part.size:
                own = {name: array[key] for name, array in records.items()}
                group = criteria.Group(mask=part, rng=self._rng, drop=None, **own)
                scores = np.asarray(self._criterion(group))
                if scores.shape != part.shape or scores.dtype != self.dtype:
                    scores = np.broadcast_to(scores.astype(self.dtype), part.shape)
                found.append(scores)
        if len(found) == 1:
            return found[0]
        return np.concatenate([np.empty(0, self.dtype), *found])
