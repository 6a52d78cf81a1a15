"""Selection says how many weights go and who competes: scores become masks, to the exact count.

Pure functions on arrays. Ranking is by partition, so that it costs little more than finding one
order statistic; weights with equal scores go in an order that the seed alone decides.
"""

import dataclasses
import hashlib
import math
import numbers
import re
from collections.abc import Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria

# 0.29 * 100 is 28.999999999999996 in floating point; 29 is meant.
_ROUNDING = 1e-6

_HOW_TO_RECORD = {
    "initial": "Record them with `pruner.set_initial_weights(model)`.",
    "final": "Record them with `pruner.set_pretrained_weights(model)` after training.",
    "current": "Pass the raw weights as `current`.",
}

Share = float | Mapping[str, float]


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """What is known of one kernel: its mask and its records, all of one shape.

    Args:
        mask: bool array, True where a weight is alive.
        output_axes: the axes that index outputs, for `scope="output"`; the last one by default.
        initial: array of the recorded initial weights (any real dtype), or None.
        final: array of the recorded final weights, or None.
        current: array of the raw weights as they are now, or None.
    """

    mask: np.ndarray
    output_axes: tuple[int, ...] = (-1,)
    initial: np.ndarray | None = None
    final: np.ndarray | None = None
    current: np.ndarray | None = None


def drop_count(
    size: int,
    alive: int,
    *,
    rate: float | None = None,
    sparsity: float | None = None,
    where: str = "the weights",
) -> int:
    """The exact number of alive weights to drop now.

    Args:
        size: number of weights, dead ones included.
        alive: number of weights not yet pruned.
        rate: share of the alive weights to drop: `floor(rate * alive + 1e-6)`.
        sparsity: share of all weights that are pruned afterwards:
            `floor(sparsity * size + 1e-6)` less those that are dead already.
        where: what the error message calls these weights.

    Raises:
        ValueError: not exactly one of `rate` and `sparsity`, one outside [0, 1), or a `sparsity`
            below the present one.
    """
    name, share = _one_of(rate, sparsity)
    _check_share(name, share)
    if name == "rate":
        return math.floor(float(share) * alive + _ROUNDING)
    drop = math.floor(float(share) * size + _ROUNDING) - (size - alive)
    if drop < 0:
        raise ValueError(
            f"A sparsity of {share} was asked for, but {where} is already sparser: "
            f"{size - alive} of {size} weights are pruned, and pruned weights do not come back. "
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
    if scores.shape != mask.shape:
        raise ValueError(f"scores of shape {scores.shape} for a mask of shape {mask.shape}.")
    alive = int(np.count_nonzero(mask))
    if not 0 <= drop <= alive:
        raise ValueError(f"`drop` must be in [0, {alive}], the number alive. Received: {drop}")
    if drop == 0:
        return mask.copy()
    competing = scores.copy() if alive == mask.size else scores[mask]
    lowest = competing.min()
    if np.isnan(lowest):
        raise ValueError("NaN among the scores of alive weights; scores must be numbers.")
    # Many equal scores (flipped weights, weights that never moved) slow a partition down tenfold,
    # and in practice they are the lowest ones.
    if drop <= np.count_nonzero(competing == lowest):
        threshold = lowest
    else:
        competing.partition(drop - 1)
        threshold = competing[drop - 1]
    del competing  # as large as the scores: not wanted beside the arrays below
    kept = scores > threshold
    kept &= mask
    spared = alive - drop - int(np.count_nonzero(kept))
    if spared:
        tied = scores == threshold
        tied &= mask
        # Shuffled flags, not shuffled indices: a byte per tied weight instead of eight.
        lucky = np.zeros(int(np.count_nonzero(tied)), dtype=bool)
        lucky[:spared] = True
        rng.shuffle(lucky)
        kept[tied] = lucky
    return kept


def update(
    criterion: criteria.Identifier,
    weights: Mapping[str, Weights],
    *,
    rate: Share | None = None,
    sparsity: Share | None = None,
    scope: str | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """New masks for all kernels, each scope at its exact count, by what the criterion ranks lowest.

    The result depends on the arrays, paths and seed, not on the order of the mapping; under
    `"layer"` and `"output"` a kernel's mask does not depend on the other kernels either.

    Args:
        criterion: whatever `criteria.get` takes.
        weights: the kernels by path. Nothing in them is changed.
        rate: share of the alive weights to drop now, in [0, 1). Or a mapping from a pattern to a
            share: the first one that `re.search` finds in the path holds, the key `"default"`
            holds for the rest. A pattern that is found in no path is an error.
        sparsity: share of all weights that are pruned afterwards, likewise. Exactly one of the two.
        scope: who competes: `"layer"` (each kernel alone), `"global"` (all weights together) or
            `"output"` (each output unit of each kernel alone). By default `"layer"`, or the scope
            that the criterion insists on.
        seed: non-negative integer for random scores and for the order of ties.

    Returns:
        A dict from path to a new bool mask, in the order of `weights`.

    Raises:
        ValueError: shares, scope or criterion that make no sense; no kernels; a record that is
            missing, has another shape than its mask or holds a NaN or an infinity; a sparsity
            already exceeded. The message names the path.
    """
    criterion = criteria.get(criterion)
    scope = resolve_scope(criterion, scope)
    name, share = _one_of(rate, sparsity)
    if isinstance(seed, bool) or not isinstance(seed, numbers.Integral) or seed < 0:
        raise ValueError(f"`seed` must be a non-negative integer. Received: seed={seed!r}")
    if not weights:
        raise ValueError("There are no weights to prune: the mapping of weights is empty.")
    shares = _shares(name, share, weights, scope)
    kernels = {path: _prepare(criterion, path, kernel) for path, kernel in weights.items()}

    if scope == "global":
        paths = sorted(kernels)
        group = (criterion, [kernels[path] for path in paths], {name: share})
        joined = _prune_together(*group, _generator(seed, ""), "the model as a whole")
        ends = np.cumsum([kernels[path].mask.size for path in paths])
        masks = dict(zip(paths, np.split(joined, ends[:-1]), strict=True))
        return {path: masks[path].reshape(kernels[path].mask.shape) for path in weights}
    prune = _prune_outputs if scope == "output" else _prune_alone
    return {
        path: prune(criterion, kernel, {name: shares[path]}, _generator(seed, path), repr(path))
        for path, kernel in kernels.items()
    }


def _prune_alone(
    criterion: criteria.Criterion,
    kernel: Weights,
    amount: dict[str, float],
    rng: np.random.Generator,
    where: str,
) -> np.ndarray:
    return _prune_together(criterion, [kernel], amount, rng, where).reshape(kernel.mask.shape)


def _prune_outputs(
    criterion: criteria.Criterion,
    kernel: Weights,
    amount: dict[str, float],
    rng: np.random.Generator,
    where: str,
) -> np.ndarray:
    first = range(len(kernel.output_axes))
    moved_shape = np.moveaxis(kernel.mask, kernel.output_axes, first).shape
    units, inputs = math.prod(moved_shape[: len(first)]), math.prod(moved_shape[len(first) :])

    def rows(array: np.ndarray) -> np.ndarray:
        return np.moveaxis(array, kernel.output_axes, first).reshape(units, inputs)

    mask = rows(kernel.mask)
    records = {record: rows(array) for record, array in _records(kernel).items()}
    pruned = np.empty_like(mask)
    for unit in range(units):
        row = Weights(mask=mask[unit], **{name: array[unit] for name, array in records.items()})
        pruned[unit] = _prune_together(criterion, [row], amount, rng, f"{where}, output {unit}")
    return np.ascontiguousarray(np.moveaxis(pruned.reshape(moved_shape), first, kernel.output_axes))


def _prune_together(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    amount: dict[str, float],
    rng: np.random.Generator,
    where: str,
) -> np.ndarray:
    """The new mask, as one 1-D array, of kernels that form one competition group."""
    mask = _join([kernel.mask for kernel in kernels])
    alive = int(np.count_nonzero(mask))
    drop = drop_count(mask.size, alive, where=where, **amount)
    if drop == 0:
        return mask.copy()
    scores = _scores(criterion, kernels, mask, rng, where)
    try:
        pruned = drop_lowest(scores, mask, drop, rng)
    except ValueError as error:
        raise ValueError(f"Criterion {criterion.name!r} on {where}: {error}") from error
    reached = int(np.count_nonzero(pruned))
    assert reached == alive - drop, f"{reached} alive in {where}, {alive - drop} expected"
    return pruned


def _scores(
    criterion: criteria.Criterion,
    kernels: Sequence[Weights],
    mask: np.ndarray,
    rng: np.random.Generator,
    where: str,
) -> np.ndarray:
    # A function of its own so that the joined records are freed before the ranking copies scores.
    records = {
        name: _join([getattr(kernel, name) for kernel in kernels]) for name in _records(kernels[0])
    }
    group = criteria.Group(mask=mask, rng=rng, **records)
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


def _join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One read-only 1-D array of all elements, without a copy where there is nothing to join."""
    flat = [array.reshape(-1) for array in arrays]
    joined = flat[0].view() if len(flat) == 1 else np.concatenate(flat)
    joined.flags.writeable = False
    return joined


def _records(kernel: Weights) -> dict[str, np.ndarray]:
    arrays = {name: getattr(kernel, name) for name in criteria.RECORDS}
    return {name: array for name, array in arrays.items() if array is not None}


def _prepare(criterion: criteria.Criterion, path: str, kernel: Weights) -> Weights:
    """The kernel with the records that the criterion reads, checked and at least float32."""
    mask = np.asarray(kernel.mask, dtype=bool)
    records = {}
    for name in criterion.needs | criterion.optional:
        array = getattr(kernel, name)
        if array is None:
            if name in criterion.needs:
                raise ValueError(
                    f"Criterion {criterion.name!r} needs the {name} weights of {path!r}, which "
                    f"have not been recorded. {_HOW_TO_RECORD[name]}"
                )
            continue
        array = np.asarray(array)
        if array.shape != mask.shape:
            raise ValueError(
                f"The {name} weights of {path!r} have shape {array.shape}, its mask {mask.shape}. "
                "Both must be recorded from the same model."
            )
        # Differences of half-precision weights would round or overflow.
        array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
        if not np.isfinite(array).all():
            raise ValueError(
                f"The {name} weights of {path!r} contain NaN or infinity, which cannot be ranked. "
                "Did the training diverge?"
            )
        records[name] = array
    return Weights(mask=mask, output_axes=kernel.output_axes, **records)


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


def _one_of(rate: Share | None, sparsity: Share | None) -> tuple[str, Share]:
    if (rate is None) == (sparsity is None):
        raise ValueError(
            "Give exactly one of `rate` (share of the alive weights to drop now) and `sparsity` "
            "(share of all weights that are pruned afterwards). "
            f"Received: rate={rate!r}, sparsity={sparsity!r}"
        )
    return ("rate", rate) if sparsity is None else ("sparsity", sparsity)


def _check_share(name: str, share: float) -> None:
    if not isinstance(share, numbers.Real) or not 0 <= share < 1:
        raise ValueError(
            f"`{name}` must be a number in [0, 1). Received: {name}={share!r} "
            f"of type {type(share).__name__}"
        )


def _shares(name: str, share: Share, paths: Sequence[str], scope: str) -> dict[str, float]:
    """The share that holds for each path."""
    if not isinstance(share, Mapping):
        _check_share(name, share)
        return dict.fromkeys(paths, share)
    if scope == "global":
        raise ValueError(
            f'`{name}` per layer contradicts scope="global", where all layers share one threshold. '
            f"Give one number, or another scope. Received: {name}={share!r}"
        )
    for value in share.values():
        _check_share(name, value)
    patterns = {}
    for key in share:
        if key == "default":
            continue
        try:
            patterns[key] = re.compile(key)
        except (re.error, TypeError) as error:
            raise ValueError(f"`{name}` has the key {key!r}, no pattern: {error}") from error
        if not any(patterns[key].search(path) for path in paths):
            raise ValueError(
                f"The pattern {key!r} of `{name}` is found in no path. The paths: {list(paths)}"
            )
    shares = {}
    for path in paths:
        key = next((key for key, found in patterns.items() if found.search(path)), "default")
        if key not in share:
            raise ValueError(
                f'`{name}` has neither a pattern that matches {path!r} nor a "default". '
                f"Received: {name}={share!r}"
            )
        shares[path] = share[key]
    return shares
