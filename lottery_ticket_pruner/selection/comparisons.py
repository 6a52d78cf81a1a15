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
    Chain,
    Flags,
    Scores,
    check_drop,
    count,
    drop_lowest,
    drop_up_to,
)
from lottery_ticket_pruner.selection.request import Request
from lottery_ticket_pruner.selection.scores import ChunkedScores, parted, weight_scores
from lottery_ticket_pruner.selection.weights import Weights, joined, records_of
from masked_layers.randomness import stream


def comparisons(
    request: Request, kernels: Mapping[str, Weights]
) -> "Iterator[_Comparison | _PerOutput]":
    """Yields the groups that are ranked separately, each with its own random generator.

    Args:
        request: The pruning request.
        kernels: Kernels to which the request applies, checked, by path.
    """
    if request.scope == "global":
        together = {path: kernels[path] for path in sorted(kernels)}
        rng = stream("ties", request.seed, "")
        yield _compared(request, together, rng, "the model as a whole")
        return
    for path, kernel in kernels.items():
        rng = stream("ties", request.seed, path)
        if request.scope == "output":
            yield _PerOutput(request.criterion, path, kernel, rng)
        else:
            yield _compared(request, {path: kernel}, rng, repr(path))


def scores_of(request: Request, kernels: Mapping[str, Weights]) -> dict[str, np.ndarray]:
    """Returns the scores of all weights by path, as weights that are ranked together have them."""
    together = {path: kernels[path] for path in sorted(kernels)}
    where = "the model as a whole"
    rng = stream("ties", request.seed, "")
    scores = weight_scores(request.criterion, list(together.values()), rng, None, where)
    return dict(zip(together, parted(scores, list(together.values())), strict=True))


def ranked_by(
    request: Request, kernels: Mapping[str, Weights], scores: Mapping[str, np.ndarray]
) -> "_Comparison":
    """Returns a comparison of all weights of kernels by given scores."""
    where = "the model as a whole" if len(kernels) > 1 else repr(next(iter(kernels)))
    rng = stream("ties", request.seed, "" if len(kernels) > 1 else next(iter(kernels)))
    return _Given(joined([scores[p] for p in kernels]), request.criterion, kernels, rng, where)


def _compared(
    request: Request, kernels: Mapping[str, Weights], rng: np.random.Generator, where: str
) -> "_Comparison":
    criterion, structure = request.criterion, request.structure
    if structure is None:
        return _Comparison(criterion, kernels, rng, where)
    if structure.kept is None:
        return _TileComparison(criterion, kernels, rng, where, structure)
    return _BestOfEachTile(criterion, kernels, rng, where, structure, structure.kept)


class _Comparison:
    """Kernels whose weights are ranked together.

    They are scored when the first weight is pruned. `prune` may be called several times with
    `again=True`. The scores are then kept and sorted, and every call starts from the same masks and
    the same state of the random generator.
    """

    _unit = "weights"

    def __init__(
        self,
        criterion: criteria.Criterion,
        kernels: Mapping[str, Weights],
        rng: np.random.Generator,
        where: str,
    ) -> None:
        self.paths = list(kernels)
        self._criterion = criterion
        self._kernels = list(kernels.values())
        self._rng = rng
        self._where = where
        self._alive = self._flags()

    def prune(self, amount: Mapping[str, Any], *, again: bool = False) -> dict[str, np.ndarray]:
        """Returns the new mask of each kernel."""
        alive = count(self._alive)
        drop = drop_count(self._alive.size, alive, where=self._where, unit=self._unit, **amount)
        if drop == 0:
            kept = np.array(self._alive)
        else:
            try:
                kept = self._drop_again(drop, alive) if again else self._drop(drop)
            except ValueError as error:
                name = self._criterion.name
                raise ValueError(f"Criterion {name!r} on {self._where}: {error}") from error
        reached = int(np.count_nonzero(kept))
        assert reached == alive - drop, f"{reached} {self._unit} kept in {self._where}"
        return dict(zip(self.paths, self._spread(kept), strict=True))

    def _drop(self, drop: int) -> np.ndarray:
        return drop_lowest(self._scores_to_drop(drop), self._alive, drop, self._rng)

    def _scores_to_drop(self, drop: int) -> Scores:
        """Returns the scores for a single pass over them."""
        if self._criterion.elementwise:
            return ChunkedScores(self._criterion, self._kernels)
        return self._scores(drop)

    def _drop_again(self, drop: int, alive: int) -> np.ndarray:
        self._alive = np.asarray(self._alive)
        scores, ordered, rng = self._ranking
        return drop_up_to(ordered[drop - 1], scores, self._alive, alive - drop, copy.deepcopy(rng))

    @functools.cached_property
    def _ranking(self) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        scores = self._scores(None)
        check_drop(scores, self._alive, 0)
        ordered = np.sort(scores[np.asarray(self._alive)])
        if np.isnan(ordered[-1]):
            raise ValueError(NAN)
        return scores, ordered, self._rng

    def _flags(self) -> Flags:
        """Returns a flag for each weight or tile, True if it is still kept."""
        masks = [kernel.mask for kernel in self._kernels]
        if self._criterion.elementwise:  # Its scores are read in parts, and so are the masks.
            return Chain([joined([mask]) for mask in masks])
        return joined(masks)

    def _scores(self, drop: int | None) -> np.ndarray:
        """Returns a score for each weight or tile.

        Args:
            drop: Number of weights to prune, which some criteria use.
        """
        # Without joined masks where scores are read in parts, which need none.
        mask = None if isinstance(self._alive, Chain) else self._alive
        return weight_scores(self._criterion, self._kernels, self._rng, drop, self._where, mask)

    def _spread(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the masks of the kernels, given which weights or tiles are kept."""
        yield from parted(kept, self._kernels)


class _Given(_Comparison):
    """Kernels whose weights are ranked together by scores that are known already."""

    def __init__(self, scores: np.ndarray, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._given = scores

    def _scores_to_drop(self, drop: int) -> Scores:
        return self._given

    def _scores(self, drop: int | None) -> np.ndarray:
        return self._given


class _TileComparison(_Comparison):
    """Kernels whose tiles are ranked together, by their pooled scores."""

    _unit = "tiles"

    def __init__(
        self,
        criterion: criteria.Criterion,
        kernels: Mapping[str, Weights],
        rng: np.random.Generator,
        where: str,
        structure: structures.Structure,
    ) -> None:
        self._structure = structure
        super().__init__(criterion, kernels, rng, where)

    def _flags(self) -> np.ndarray:
        self._members = [self._cut(kernel.mask, kernel) for kernel in self._kernels]
        return np.concatenate([tiles.any(axis=1) for tiles in self._members])

    def _scores_to_drop(self, drop: int) -> Scores:
        return self._scores(drop)

    def _scores(self, drop: int | None) -> np.ndarray:
        return np.concatenate(
            [
                self._structure.pool(self._cut(part, kernel), tiles)
                for part, kernel, tiles in self._parts()
            ]
        )

    def _spread(self, kept: np.ndarray) -> Iterator[np.ndarray]:
        ends = np.cumsum([len(tiles) for tiles in self._members])
        parts = np.split(kept, ends[:-1])
        for part, kernel, tiles in zip(parts, self._kernels, self._members, strict=True):
            yield self._paste(tiles & part[:, None], kernel)

    def _parts(self) -> Iterator[tuple[np.ndarray, Weights, np.ndarray]]:
        """Yields each kernel with the scores of its weights and its mask in tiles."""
        scores = weight_scores(self._criterion, self._kernels, self._rng, None, self._where)
        yield from zip(parted(scores, self._kernels), self._kernels, self._members, strict=True)

    def _cut(self, array: np.ndarray, kernel: Weights) -> np.ndarray:
        layout = kernel.layout
        return structures.cut(array, layout, self._structure.tile(layout))

    def _paste(self, tiles: np.ndarray, kernel: Weights) -> np.ndarray:
        layout = kernel.layout
        return structures.paste(tiles, layout, self._structure.tile(layout))


class _BestOfEachTile(_TileComparison):
    """Kernels that keep the same number of weights in each tile."""

    def __init__(
        self,
        criterion: criteria.Criterion,
        kernels: Mapping[str, Weights],
        rng: np.random.Generator,
        where: str,
        structure: structures.Structure,
        count: int,
    ) -> None:
        super().__init__(criterion, kernels, rng, where, structure)
        self._count = count

    def prune(self, amount: Mapping[str, Any], *, again: bool = False) -> dict[str, np.ndarray]:
        """Returns the new mask of each kernel. The amount is not used."""
        return dict(zip(self.paths, self._masks(), strict=True))

    def _masks(self) -> Iterator[np.ndarray]:
        for part, kernel, tiles in self._parts():
            scores = self._cut(part, kernel)
            if np.isnan(scores[tiles]).any():
                raise ValueError(f"Criterion {self._criterion.name!r} on {self._where}: {NAN}")
            # The last key sorts first: pruned weights, then the lowest scores, then random order.
            chance = self._rng.random(scores.shape, dtype=np.float32)
            order = np.lexsort((chance, scores, tiles), axis=-1)
            best = np.zeros_like(tiles)
            np.put_along_axis(best, order[:, -self._count :], True, axis=-1)
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

        def row(i: int) -> Weights:
            return Weights(mask=mask[i]).with_records({name: a[i] for name, a in records.items()})

        self._comparisons = [
            _Comparison(
                criterion,
                {path: row(i)},
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
