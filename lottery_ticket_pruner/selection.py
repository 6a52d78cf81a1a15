"""Selection says how many weights go and who competes: scores become masks, to the exact count.

Pure functions on arrays. Ranking is by partition, so that it costs little more than finding one
order statistic; weights with equal scores go in an order that the seed alone decides.
"""

import copy
import dataclasses
import functools
import hashlib
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lottery_ticket_pruner import criteria, distributions, structures
from lottery_ticket_pruner.shares import Share, check_share, one_of, shares_of

# 0.29 * 100 is 28.999999999999996 in floating point; 29 is meant.
_ROUNDING = 1e-6

_HOW_TO_RECORD = {
    "initial": "Record them with `pruner.set_initial_weights(model)`.",
    "final": "Record them with `pruner.set_pretrained_weights(model)` after training.",
    "current": "Pass the raw weights as `current`.",
}

_ARRAYS = (*criteria.RECORDS, *criteria.EVIDENCE)

# Weights scored at a time: a criterion's intermediate arrays stay in the processor's cache.
_CHUNK = 2**17


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """What is known of one kernel: its mask and its records, all of one shape.

    Args:
        mask: bool array, True where a weight is alive.
        output_axes: the axes that index outputs, for `scope="output"`; the last one by default.
        input_axes: the axes that index inputs, for structures; the last one but one by default.
        initial: array of the recorded initial weights (any real dtype), or None.
        final: array of the recorded final weights, or None.
        current: array of the raw weights as they are now, or None.
        gradient: evidence, as `criteria.Group` has it, or None. So are the next three.
        hessian_gradient: evidence, or None.
        flow: evidence, or None.
        input_norm: evidence, or None.
    """

    mask: np.ndarray
    output_axes: tuple[int, ...] = (-1,)
    input_axes: tuple[int, ...] = (-2,)
    initial: np.ndarray | None = None
    final: np.ndarray | None = None
    current: np.ndarray | None = None
    gradient: np.ndarray | None = None
    hessian_gradient: np.ndarray | None = None
    flow: np.ndarray | None = None
    input_norm: np.ndarray | None = None

    @property
    def layout(self) -> structures.Layout:
        """What the axes mean."""
        return structures.Layout(self.mask.shape, self.input_axes, self.output_axes)


def drop_count(
    size: int,
    alive: int,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    keep_sparser: bool = False,
    where: str = "the weights",
    unit: str = "weights",
) -> int:
    """The exact number of alive weights to drop now.

    Args:
        size: number of weights, dead ones included.
        alive: number of weights not yet pruned.
        rate: share of the alive weights to drop: `floor(rate * alive + 1e-6)`.
        sparsity: share of all weights that are pruned afterwards:
            `floor(sparsity * size + 1e-6)` less those that are dead already.
        keep_sparser: whether to drop none where a `sparsity` is below the present one.
        where: what the error message calls these weights.
        unit: what it says is counted.

    Raises:
        ValueError: not exactly one of `rate` and `sparsity`, one outside [0, 1), or a `sparsity`
            below the present one unless `keep_sparser`.
    """
    name, share = one_of(rate, sparsity)
    check_share(name, share)
    if name == "rate":
        return math.floor(float(share) * alive + _ROUNDING)
    drop = math.floor(float(share) * size + _ROUNDING) - (size - alive)
    if drop < 0 and keep_sparser:
        return 0
    if drop < 0:
        raise ValueError(
            f"A sparsity of {share} was asked for, but {where} is already sparser: "
            f"{size - alive} of {size} {unit} are pruned, and pruned weights do not come back. "
            "Ask for a higher sparsity, give a `rate`, or reset the masks first."
        )
    return drop


def drop_lowest(
    scores: np.ndarray, mask: np.ndarray, drop: int, rng: np.random.Generator
) -> np.ndarray:
    """A new mask with exactly the `drop` lowest alive scores gone; dead weights stay dead.

    Args:
        scores: 1-D array of real numbers; minus infinity is legal.
        mask: bool array of the same shape, True where alive. Not changed.
        drop: how many alive weights go.
        rng: decides which of several weights with the score at the threshold go.

    Raises:
        ValueError: shapes that differ, a NaN among the alive scores, or a `drop` that is negative
            or more than there are alive.
    """
    alive = _check_drop(scores, mask, drop)
    if drop == 0:
        return mask.copy()
    competing = scores.copy() if alive == mask.size else scores[mask]
    lowest = competing.min()
    if np.isnan(lowest):
        raise ValueError(_NAN)
    # Many equal scores (flipped weights, weights that never moved) slow a partition down tenfold,
    # and in practice they are the lowest ones.
    if drop <= np.count_nonzero(competing == lowest):
        threshold = lowest
    else:
        competing.partition(drop - 1)
        threshold = competing[drop - 1]
    del competing  # as large as the scores: not wanted beside the arrays below
    return _drop_up_to(threshold, scores, mask, alive - drop, rng)


_NAN = "NaN among the scores of alive weights; scores must be numbers."


def _check_drop(scores: np.ndarray, mask: np.ndarray, drop: int) -> int:
    """How many are alive, after a look at the arguments of `drop_lowest`."""
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {scores.shape} for a mask of shape {mask.shape}.")
    alive = int(np.count_nonzero(mask))
    if not 0 <= drop <= alive:
        raise ValueError(f"`drop` must be in [0, {alive}], the number alive. Received: {drop}")
    return alive


def _drop_up_to(
    threshold: float, scores: np.ndarray, mask: np.ndarray, keep: int, rng: np.random.Generator
) -> np.ndarray:
    """The mask of the `keep` weights above the threshold, and of some that are at it."""
    kept = scores > threshold
    kept &= mask
    spared = keep - int(np.count_nonzero(kept))
    if spared:
        tied = scores == threshold
        tied &= mask
        kept[tied] = _lottery(int(np.count_nonzero(tied)), spared, rng)
    return kept


def _lottery(size: int, winners: int, rng: np.random.Generator) -> np.ndarray:
    """So many flags of which `winners` are set, every choice being equally likely.

    In most criteria of signs nearly all weights are tied, and a shuffle of so many costs ten times
    what finding their threshold does. Here each is drawn alone with a share that leaves a few
    winners missing (four standard deviations), and those are then drawn from the others.
    """
    if winners > size // 2:
        return ~_lottery(size, size - winners, rng)
    share = max(winners - 4 * math.sqrt(winners), 0) / size
    flags = np.zeros(size, dtype=bool)
    missing = -1
    while missing < 0:
        for start in range(0, size if share else 0, _CHUNK):
            part = flags[start : start + _CHUNK]
            np.less(rng.random(part.size, dtype=np.float32), share, out=part)
        missing = winners - int(np.count_nonzero(flags))
    while missing:
        drawn = np.unique(rng.integers(size, size=missing))
        drawn = drawn[~flags[drawn]]
        flags[drawn] = True
        missing -= drawn.size
    return flags


def update(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    *,
    rate: Share | None = None,
    sparsity: Share | None = None,
    scope: str | None = None,
    seed: int = 0,
    structure: structures.Identifier | None = None,
    distribution: distributions.Identifier | None = None,
    keep_sparser: bool = False,
) -> dict[str, np.ndarray]:
    """New masks for all kernels, each scope at its exact count, by what the criterion ranks lowest.

    The result depends on the arrays, paths and seed, not on the order of the mapping; under
    `"layer"` and `"output"` a kernel's mask does not depend on the other kernels either.

    Args:
        criterion: whatever `criteria.get` takes.
        weights: the kernels by path. Nothing in them is changed.
        rate: share of the alive weights to drop now, in [0, 1). Or a mapping from a pattern to a
            share: a key that is the path itself holds, else the first one that `re.search` finds in
            the path, else the key `"default"`. A pattern that is found in no path is an error.
        sparsity: share of all weights that are pruned afterwards, likewise. Exactly one of the two.
        scope: who competes: `"layer"` (each kernel alone), `"global"` (all weights together) or
            `"output"` (each output unit of each kernel alone). By default `"layer"`, or the scope
            that the criterion insists on.
        seed: non-negative integer for random scores and for the order of ties.
        structure: whatever `structures.get` takes. Tiles of weights then compete, and rates,
            sparsities and counts are those of tiles; a tile is alive as long as one of its weights
            is. N:M sets the sparsity itself and takes none of `rate`, `sparsity`, `scope` and
            `distribution`. Kernels without such tiles stay as they are and count for nothing.
        distribution: whatever `distributions.get` takes: shares `sparsity`, which is then that of
            all kernels together, out among them. With tiles the shares are rounded to whole ones.
        keep_sparser: whether those who compete with each other stay as they are, where a `sparsity`
            is below their present one; otherwise that is an error.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: shares, scope or criterion that make no sense; no kernels; a record that is
            missing, has another shape than its mask or holds a NaN or an infinity; a sparsity
            already exceeded; a structure that applies to no kernel. The message names the path.
    """
    structure = None if structure is None else structures.get(structure)
    criterion, scope, kernels = _admit(criterion, weights, scope, seed, structure)
    if structure is not None and structure.kept is not None:
        _refuse_amounts(structure, rate=rate, sparsity=sparsity, distribution=distribution)
        amounts = None
    else:
        if distribution is not None:
            sparsity = _distribute(distribution, kernels, scope, rate, sparsity)
        name, share = one_of(rate, sparsity)
        shares = shares_of(name, share, kernels, scope)
        amounts = {
            path: {name: value, "keep_sparser": keep_sparser} for path, value in shares.items()
        }
    pruned = {}
    for contest in _contests(criterion, kernels, scope, seed, structure):
        pruned |= contest.prune(amounts and amounts[contest.paths[0]])
    return _in_order(weights, pruned)


def update_many(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    *,
    sparsities: Sequence[Share],
    scope: str | None = None,
    seed: int = 0,
    structure: structures.Identifier | None = None,
) -> Iterator[dict[str, np.ndarray]]:
    """The masks of `update` for each of many sparsities, from one ranking.

    Every one is what `update(criterion, weights, sparsity=..., scope=scope, seed=seed)` returns for
    these same weights, ties included: they do not build on each other, and need no order. Weights
    are scored and sorted once; each mask then costs a comparison per weight.

    Args:
        criterion: as for `update`.
        weights: as for `update`.
        sparsities: shares of all weights that are pruned afterwards: numbers or mappings.
        scope: as for `update`.
        seed: as for `update`.
        structure: as for `update`, but for those that fix the sparsity themselves.

    Returns:
        An iterator over dicts from path to bool mask, one for each sparsity. Masks are made when
        they are asked for.

    Raises:
        ValueError: what `update` refuses.
    """
    structure = None if structure is None else structures.get(structure)
    criterion, scope, kernels = _admit(criterion, weights, scope, seed, structure)
    if structure is not None and structure.kept is not None:
        _refuse_amounts(structure, sparsities=sparsities)
    shares = [shares_of("sparsity", share, kernels, scope) for share in sparsities]
    contests = list(_contests(criterion, kernels, scope, seed, structure))

    def masks() -> Iterator[dict[str, np.ndarray]]:
        for share in shares:
            pruned: dict[str, np.ndarray] = {}
            for contest in contests:
                pruned |= contest.prune({"sparsity": share[contest.paths[0]]}, again=True)
            yield _in_order(weights, pruned)

    return masks()


def _admit(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    scope: str | None,
    seed: int,
    structure: structures.Structure | None,
) -> tuple[criteria.Criterion, str, dict[str, Weights]]:
    """The criterion, the scope, and the checked kernels to which the structure applies."""
    criterion = criteria.get(criterion)
    if structure is not None and structure.kept is not None:
        _refuse_amounts(structure, scope=scope)
        # Who competes is settled; what may still matter is which weights are scored together.
        scope = "global" if criterion.scope == "global" else "layer"
    else:
        scope = resolve_scope(criterion, scope)
    if structure is not None and scope == "output":
        raise ValueError(
            f"{structure} makes tiles of whole layers compete, which contradicts "
            f'scope="output" (criterion {criterion.name!r}). '
            + ("Use N:M, or another criterion." if criterion.scope else 'Use "layer" or "global".')
        )
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
    if not weights:
        raise ValueError("There are no weights to prune: the mapping of weights is empty.")
    kernels = {
        path: _prepare(criterion, path, kernel)
        for path, kernel in weights.items()
        if structure is None or structure.applies(kernel.layout)
    }
    if not kernels:
        raise ValueError(f"{structure} applies to none of the weights {list(weights)}.")
    return criterion, scope, kernels


def _refuse_amounts(structure: structures.Structure, **arguments: object) -> None:
    given = {name: value for name, value in arguments.items() if value is not None}
    if given:
        raise ValueError(
            f"{structure} says itself how many weights stay, and which compete. Leave out: {given}"
        )


def _distribute(
    distribution: distributions.Identifier,
    kernels: Mapping[str, Weights],
    scope: str,
    rate: Share | None,
    sparsity: Share | None,
) -> dict[str, float]:
    if rate is not None or isinstance(sparsity, Mapping | None) or scope != "layer":
        raise ValueError(
            "A `distribution` shares one `sparsity` of all kernels together out among them: give a "
            f'number, no `rate`, and the scope "layer". Received: distribution={distribution!r}, '
            f"rate={rate!r}, sparsity={sparsity!r}, scope={scope!r}"
        )
    check_share("sparsity", sparsity)
    shapes = {path: kernel.mask.shape for path, kernel in kernels.items()}
    return distributions.get(distribution)(shapes, sparsity)


def _in_order(
    weights: Mapping[str, Weights], pruned: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    return {
        path: pruned[path] if path in pruned else np.array(kernel.mask, dtype=bool)
        for path, kernel in weights.items()
    }


# --- Contests -------------------------------------------------------------------------------------


def _contests(
    criterion: criteria.Criterion,
    kernels: Mapping[str, Weights],
    scope: str,
    seed: int,
    structure: structures.Structure | None,
) -> "Iterator[_Contest | _OutputContests]":
    if scope == "global":
        together = {path: kernels[path] for path in sorted(kernels)}
        rng = _generator(seed, "")
        yield _Contest(criterion, together, rng, "the model as a whole", structure)
        return
    for path, kernel in kernels.items():
        rng = _generator(seed, path)
        if scope == "output":
            yield _OutputContests(criterion, path, kernel, rng)
        else:
            yield _Contest(criterion, {path: kernel}, rng, repr(path), structure)


class _Contest:
    """Kernels whose weights, or tiles, compete with each other.

    They are scored when the first one has to go. `prune` may be called more than once with
    `again=True`: then the scores are kept and sorted, and every call starts from the same masks and
    from the same state of the generator.
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
            self._alive = _join([kernel.mask for kernel in self._kernels])
        else:
            self._members = [self._cut(kernel.mask, kernel) for kernel in self._kernels]
            self._alive = np.concatenate([tiles.any(axis=1) for tiles in self._members])

    def prune(
        self, amount: Mapping[str, Any] | None, *, again: bool = False
    ) -> dict[str, np.ndarray]:
        """The new mask of each kernel."""
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
        assert reached == alive - drop, f"{reached} {unit} alive in {self._where}, not {alive}"
        return dict(zip(self.paths, self._spread(kept), strict=True))

    def _drop(self, drop: int) -> np.ndarray:
        return drop_lowest(self._scores(drop), self._alive, drop, self._rng)

    def _drop_again(self, drop: int, alive: int) -> np.ndarray:
        scores, ordered, rng = self._ranking
        return _drop_up_to(ordered[drop - 1], scores, self._alive, alive - drop, copy.deepcopy(rng))

    @functools.cached_property
    def _ranking(self) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
        scores = self._scores()
        _check_drop(scores, self._alive, 0)
        ordered = np.sort(scores[self._alive])
        if np.isnan(ordered[-1]):
            raise ValueError(_NAN)
        return scores, ordered, self._rng

    def _scores(self, drop: int | None = None) -> np.ndarray:
        """One score per weight or tile; with `drop` such that the right ones are dropped."""
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
            return _score_in_chunks(self._criterion, self._kernels, self._rng)
        masks = [kernel.mask for kernel in self._kernels]
        mask = self._alive if self._structure is None else _join(masks)
        return _score(self._criterion, self._kernels, mask, self._rng, drop, self._where)

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
        """The masks of the kernels, of the flags of the weights or tiles that are kept."""
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
                raise ValueError(f"Criterion {self._criterion.name!r} on {self._where}: {_NAN}")
            # The last key counts first: the dead, then the lowest, then chance.
            chance = self._rng.random(scores.shape, dtype=np.float32)
            order = np.lexsort((chance, scores, tiles), axis=-1)
            best = np.zeros_like(tiles)
            np.put_along_axis(best, order[:, -self._structure.kept :], True, axis=-1)
            yield self._paste(tiles & best, kernel)


class _OutputContests:
    """A contest for each output of one kernel."""

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
        records = {name: rows(array) for name, array in _records(kernel).items()}
        self._contests = [
            _Contest(
                criterion,
                {path: Weights(mask=mask[i], **{name: a[i] for name, a in records.items()})},
                # Of its own, so that what one output draws does not depend on the others.
                unit_rng,
                f"{path!r}, output {i}",
            )
            for i, unit_rng in enumerate(rng.spawn(units))
        ]

    def prune(self, amount: Mapping[str, Any], *, again: bool = False) -> dict[str, np.ndarray]:
        """The new mask of the kernel."""
        (path,) = self.paths
        rows = [contest.prune(amount, again=again)[path] for contest in self._contests]
        pruned = np.array(rows, dtype=bool).reshape(self._shape)
        return {path: np.ascontiguousarray(np.moveaxis(pruned, self._first, self._axes))}


def _score(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    mask: np.ndarray,
    rng: np.random.Generator,
    drop: int | None,
    where: str,
) -> np.ndarray:
    # A function of its own so that the joined records are freed before the ranking copies scores.
    records = {
        name: _join([getattr(kernel, name) for kernel in kernels]) for name in _records(kernels[0])
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
            + " ".join(_HOW_TO_RECORD[name] for name in missing)
        ) from error


def _score_in_chunks(
    criterion: criteria.Criterion, kernels: Sequence[Weights], rng: np.random.Generator
) -> np.ndarray:
    """Scores without a copy of the records: straight into one array, some weights at a time."""
    arrays = [array for kernel in kernels for array in _records(kernel).values()]
    scores = np.empty(
        sum(kernel.mask.size for kernel in kernels), np.result_type(np.float32, *arrays)
    )
    done = 0
    for kernel in kernels:
        mask = _join([kernel.mask])
        records = {name: _join([array]) for name, array in _records(kernel).items()}
        for start in range(0, mask.size, _CHUNK):
            chunk = slice(start, start + _CHUNK)
            part = {name: array[chunk] for name, array in records.items()}
            group = criteria.Group(mask=mask[chunk], rng=rng, **part)
            scores[done : done + group.mask.size] = criterion(group)
            done += group.mask.size
    return scores


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One read-only 1-D array of all elements, without a copy where there is nothing to join."""
    flat = [array.reshape(-1) for array in arrays]
    joined = flat[0].view() if len(flat) == 1 else np.concatenate(flat)
    joined.flags.writeable = False
    return joined


def _records(kernel: Weights) -> dict[str, np.ndarray]:
    arrays = {name: getattr(kernel, name) for name in _ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def _prepare(criterion: criteria.Criterion, path: str, kernel: Weights) -> Weights:
    """The kernel with the records that the criterion reads, checked and at least float32."""
    mask = np.asarray(kernel.mask, dtype=bool)
    records = {}
    for name in criterion.needs | criterion.optional:
        array = getattr(kernel, name)
        if array is None:
            if name in criterion.evidence:
                raise ValueError(
                    f"Criterion {criterion.name!r} needs the {name} of {path!r}, which only "
                    "`LotteryTicketPruner.update_masks` of a masked model works out."
                )
            if name in criterion.needs:
                raise ValueError(
                    f"Criterion {criterion.name!r} needs the {name} weights of {path!r}, which "
                    f"have not been recorded. {_HOW_TO_RECORD[name]}"
                )
            continue
        array = np.asarray(array)
        if array.shape != mask.shape:
            raise ValueError(
                f"The {_called(name)} of {path!r} have shape {array.shape}, its mask {mask.shape}. "
                "Both must be recorded from the same model."
            )
        # Differences of half-precision weights would round or overflow.
        array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
        if not np.isfinite(array).all():
            raise ValueError(
                f"The {_called(name)} of {path!r} contain NaN or infinity, which cannot be "
                "ranked. Did the training diverge?"
            )
        records[name] = array
    kept = dict.fromkeys(_ARRAYS) | records
    return dataclasses.replace(kernel, mask=mask, **kept)


def _called(name: str) -> str:
    return f"{name} weights" if name in criteria.RECORDS else f"{name} values"


def _generator(seed: int, path: str) -> np.random.Generator:
    # Not hash(): that one differs between processes.
    digest = hashlib.sha256(path.encode()).digest()
    return np.random.default_rng(np.random.SeedSequence([int(seed), int.from_bytes(digest, "big")]))


def resolve_scope(criterion: criteria.Criterion, scope: str | None) -> str:
    """Who competes: what is asked for, else what the criterion insists on, else `"layer"`.

    Raises:
        ValueError: no scope has this name, or the criterion insists on another.
    """
    if scope is None:
        return criterion.scope or "layer"
    if scope not in criteria.SCOPES:
        raise ValueError(f"`scope` must be one of {criteria.SCOPES}. Received: scope={scope!r}")
    if criterion.scope not in (None, scope):
        raise ValueError(
            f"Criterion {criterion.name!r} works with scope={criterion.scope!r} alone. "
            f"Received: scope={scope!r}"
        )
    return scope
