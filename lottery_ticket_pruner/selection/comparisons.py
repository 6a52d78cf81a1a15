"""Groups of weights or tiles that are ranked together: kernels, or outputs of a kernel."""

import copy
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from lottery_ticket_pruner import criteria, structures
from lottery_ticket_pruner.selection.amounts import drop_count
from lottery_ticket_pruner.selection.lowest import (
    NAN,
    check_drop,
    drop_lowest,
    drop_up_to,
    generator,
)
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.scores import score, score_in_chunks
from lottery_ticket_pruner.selection.weights import Weights, joined, records_of


def comparisons(
    request: Request, kernels: Mapping[str, Weights]
) -> "Iterator[_Comparison | _PerOutput]":
    """Yields the groups that are ranked separately, each with its own random generator.

    Args:
        request: The pruning request.
        kernels: Kernels to which the request applies, checked, by path.
    """
    criterion, structure = request.criterion, request.structure
    if request.scope == "global":
        together = {path: kernels[path] for path in sorted(kernels)}
        rng = generator(request.seed, "")
        yield _Comparison(criterion, together, rng, "the model as a whole", structure)
        return
    for path, kernel in kernels.items():
        rng = generator(request.seed, path)
        if request.scope == "output":
            yield _PerOutput(criterion, path, kernel, rng)
        else:
            yield _Comparison(criterion, {path: kernel}, rng, repr(path), structure)


class _Comparison:
    """Kernels whose weights or tiles are ranked together.

    They are scored when the first weight is pruned. `prune` may be called several times with
    `again=True`. The scores are then kept and sorted, and every call starts from the same masks and
    the same state of the random generator.
    """

    def __init__(
        self,
        criterion: criteria.Criterion,
        kernels: Mapping[str, Weights],
        rng: np.random.Generator,
        where: str,
        structure: structures.Structure | None = None,
    ) -> None:
        self.paths = list(kernels)
        self._criterion = criterion
        self._kernels = list(kernels.values())
        self._rng = rng
        self._where = where
        self._structure = structure
        if structure is None:
            self._alive = joined([kernel.mask for kernel in self._kernels])
        else:
            self._members = [self._cut(kernel.mask, kernel) for kernel in self._kernels]
            self._alive = np.concatenate([tiles.any(axis=1) for tiles in self._members])

    def prune(
        self, amount: Mapping[str, Any] | None, *, again: bool = False
    ) -> dict[str, np.ndarray]:
        """Returns the new mask of each kernel."""
        if amount is None:
            return dict(zip(self.paths, self._best_of_each_tile(), strict=True))
        alive = int(np.count_nonzero(self._alive))
        unit = "weights" if self._structure is None else "tiles"
        drop = drop_count(self._alive.size, alive, where=self._where, unit=unit, **amount)
        if drop == 0:
            kept = self._alive.copy()
        else:
            try:
                kept = self._drop_again(drop, alive) if again else self._drop(drop)
            except ValueError as error:
                name = self._criterion.name
                raise ValueError(f"Criterion {name!r} on {self._where}: {error}") from error
        reached = int(np.count_nonzero(kept))
        assert reached == alive - drop, f"{reached} {unit} kept in {self._where}, not {alive}"
        return dict(zip(self.paths, self._spread(kept), strict=True))

    def _drop(self, drop: int) -> np.ndarray:
        return drop_lowest(self._scores(drop), self._alive, drop, self._rng)

    def _drop_again(self, drop: int, alive: int) -> np.ndarray:
        scores, ordered, rng = self._ranking
        return drop_up_to(ordered[drop - 1], scores, self._alive, alive - drop, copy.deepcopy(rng))

    @functools.cached_property
    def _ranking(self) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        scores = self._scores()
        check_drop(scores, self._alive, 0)
        ordered = np.sort(scores[self._alive])
        if np.isnan(ordered[-1]):
            raise ValueError(NAN)
        return scores, ordered, self._rng

    def _scores(self, drop: int | None = None) -> np.ndarray:
        """Returns a score for each weight or tile.

        Args:
            drop: Number of weights to prune, which some criteria use.
        """
        if self._structure is None:
            return self._weight_scores(drop)
        scores = self._weight_scores()
        return np.concatenate(
            [
                self._structure.pool(self._cut(part, kernel), tiles)
                for part, kernel, tiles in self._parts(scores)
            ]
        )

    def _weight_scores(self, drop: int | None = None) -> np.ndarray:
        if self._criterion.elementwise:
            return score_in_chunks(self._criterion, self._kernels, self._rng)
        masks = [kernel.mask for kernel in self._kernels]
        mask = self._alive if self._structure is None else joined(masks)
        return score(self._criterion, self._kernels, mask, self._rng, drop, self._where)

    def _parts(self, scores: np.ndarray) -> Iterator[tuple[np.ndarray, Weights, np.ndarray]]:
        sizes = [kernel.mask.size for kernel in self._kernels]
        if scores.shape != (sum(sizes),):
            raise ValueError(f"scores of shape {scores.shape} for {sum(sizes)} weights.")
        parts = np.split(scores, np.cumsum(sizes)[:-1])
        for part, kernel, tiles in zip(parts, self._kernels, self._members, strict=True):
            yield part.reshape(kernel.mask.shape), kernel, tiles

    def _cut(self, array: np.ndarray, kernel: Weights) -> np.ndarray:
        layout = kernel.layout
        return structures.cut(array, layout, self._structure.tile(layout))

    def _paste(self, tiles: np.ndarray, kernel: Weights) -> np.ndarray:
        layout = kernel.layout
        return structures.paste(tiles, layout, self._structure.tile(layout))

    def _spread(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the masks of the kernels, given which weights or tiles are kept."""
        if self._structure is None:
            ends = np.cumsum([kernel.mask.size for kernel in self._kernels])
            for part, kernel in zip(np.split(kept, ends[:-1]), self._kernels, strict=True):
                yield part.reshape(kernel.mask.shape)
            return
        ends = np.cumsum([len(tiles) for tiles in self._members])
        parts = np.split(kept, ends[:-1])
        for part, kernel, tiles in zip(parts, self._kernels, self._members, strict=True):
            yield self._paste(tiles & part[:, None], kernel)

    def _best_of_each_tile(self) -> Iterator[np.ndarray]:
        for part, kernel, tiles in self._parts(self._weight_scores()):
            scores = self._cut(part, kernel)
            if np.isnan(scores[tiles]).any():
                raise ValueError(f"Criterion {self._criterion.name!r} on {self._where}: {NAN}")
            # The last key sorts first: pruned weights, then the lowest scores, then random order.
            chance = self._rng.random(scores.shape, dtype=np.float32)
            order = np.lexsort((chance, scores, tiles), axis=-1)
            best = np.zeros_like(tiles)
            np.put_along_axis(best, order[:, -self._structure.kept :], True, axis=-1)
            yield self._paste(tiles & best, kernel)


class _PerOutput:
    """A kernel whose weights are ranked within each output."""

    def __init__(
        self,
        criterion: criteria.Criterion,
        path: str,
        kernel: Weights,
        rng: np.random.Generator,
    ) -> None:
        self.paths = [path]
        self._axes = kernel.output_axes
        self._first = range(len(self._axes))
        self._shape = np.moveaxis(kernel.mask, self._axes, self._first).shape
        units = math.prod(self._shape[: len(self._axes)])
        inputs = math.prod(self._shape[len(self._axes) :])

        def rows(array: np.ndarray) -> np.ndarray:
            return np.moveaxis(array, self._axes, self._first).reshape(units, inputs)

        mask = rows(kernel.mask)
        records = {name: rows(array) for name, array in records_of(kernel).items()}
        self._comparisons = [
            _Comparison(
                criterion,
                {path: Weights(mask=mask[i], **{name: a[i] for name, a in records.items()})},
                # One generator each, so that random scores of an output do not depend on the
                # others.
                unit_rng,
                f"{path!r}, output {i}",
            )
            for i, unit_rng in enumerate(rng.spawn(units))
        ]

    def prune(self, amount: Mapping[str, Any], *, again: bool = False) -> dict[str, np.ndarray]:
        """Returns the new mask of the kernel."""
        (path,) = self.paths
        rows = [comparison.prune(amount, again=again)[path] for comparison in self._comparisons]
        pruned = np.array(rows, dtype=bool).reshape(self._shape)
        return {path: np.ascontiguousarray(np.moveaxis(pruned, self._first, self._axes))}
