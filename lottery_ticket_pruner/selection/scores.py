"""Computes the scores of weights by a criterion."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection.lowest import CHUNK, Chain, read_all
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
        return read_all(ChunkedScores(criterion, kernels))
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


# Number of weights by which a criterion of users is checked, and at a time.
_CHECKED, _AT_A_TIME = 64, 8
# The most by which scores may differ, relative to the score and to the greatest one: instructions
# for several numbers at a time may round differently.
_ROUNDING = 1e-3, 1e-6


class ChunkedScores:
    """Scores of all weights of kernels as a 1-D array, of which only what is read is computed.

    Args:
        criterion: A criterion whose scores depend on the records of a weight alone.
        kernels: Kernels that are scored together.

    Attributes:
        shape: Shape of the array.
        dtype: Its dtype.
        in_threads: Whether several threads may read it. Functions of users may not be ready for
            that, for example if they write to an array that they keep.

    Raises:
        ValueError: If the criterion's scores of some weights depend on which others are scored.
    """

    def __init__(self, criterion: criteria.Criterion, kernels: Sequence[Weights]) -> None:
        self._criterion = criterion
        self.in_threads = getattr(criterion.function, "__module__", "") == criteria.__name__
        self._masks = [joined([kernel.mask]) for kernel in kernels]
        self._records = [
            {name: joined([array]) for name, array in records_of(kernel).items()}
            for kernel in kernels
        ]
        self._chain = Chain(self._masks)
        arrays = [array for records in self._records for array in records.values()]
        self.dtype = np.result_type(np.float32, *arrays)
        self.shape = self._chain.shape
        if not self.in_threads and (len(kernels) > 1 or self.shape[0] > CHUNK):
            self._check()

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        """Returns the scores of a range without a step, or of positions in ascending order."""
        keys = self._chain.keys(key)
        found = [
            self._scored(mask[key], {name: array[key] for name, array in records.items()})
            for key, mask, records in zip(keys, self._masks, self._records, strict=True)
            if mask[key].size
        ]
        if len(found) == 1:
            return found[0]
        return np.concatenate([np.empty(0, self.dtype), *found])

    def _scored(self, mask: np.ndarray, records: Mapping[str, np.ndarray]) -> np.ndarray:
        """Returns the scores of weights from one call of the criterion."""
        name = self._criterion.name
        rng: Any = _NoGenerator(name)
        group = criteria.Group(mask=mask, rng=rng, drop=None, **records)
        scores = np.asarray(self._criterion(group))
        if scores.shape != mask.shape:
            raise ValueError(
                f"Criterion {name!r} returned scores of shape {scores.shape} for weights of shape "
                f"{mask.shape}. Expected one score for each weight."
            )
        # Functions of users may return the same array again.
        return scores.astype(self.dtype, copy=not self.in_threads)

    def _check(self) -> None:
        """Scores a few weights of all kernels together and in parts, and compares the scores."""
        some = np.random.default_rng(0).integers(self.shape[0], size=_CHECKED)
        ends = np.cumsum([mask.size for mask in self._masks])
        owners = np.searchsorted(ends, some, side="right")
        places = some - np.array([0, *ends])[owners]
        pairs = list(zip(owners.tolist(), places.tolist(), strict=True))
        mask = np.array([self._masks[owner][place] for owner, place in pairs])
        records = {
            name: np.array([self._records[owner][name][place] for owner, place in pairs])
            for name in self._records[0]
        }
        together = self._scored(mask, records)
        parts = [slice(i, i + _AT_A_TIME) for i in range(0, _CHECKED, _AT_A_TIME)]
        alone = np.concatenate(
            [self._scored(mask[part], {n: a[part] for n, a in records.items()}) for part in parts]
        )
        relative, absolute = _ROUNDING
        finite = np.abs(together[np.isfinite(together)]).max(initial=0)
        same = np.isclose(alone, together, relative, absolute * finite, equal_nan=True)
        if not same[mask].all():
            raise ValueError(
                f"Criterion {self._criterion.name!r} is declared with `elementwise=True`, but its "
                "scores of some weights change with the other weights that are scored with them "
                f"(from {together[mask & ~same][0]} to {alone[mask & ~same][0]}). Weights would be "
                "ranked in parts, one by one and not as a whole. Register it with "
                "`elementwise=False`."
            )


class _NoGenerator:
    """Stands for the generator of weights that are scored in parts, and refuses to be used."""

    def __init__(self, criterion: str) -> None:
        self._criterion = criterion

    def __getattr__(self, name: str) -> NoReturn:
        raise ValueError(
            f"Criterion {self._criterion!r} is declared with `elementwise=True` and cannot use "
            f"`group.rng` (`rng.{name}`): random scores depend on the parts in which weights are "
            "scored. Register it with `elementwise=False`."
        )
