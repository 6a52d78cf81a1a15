"""Warnings about pruning that was probably not intended, at most one for each update."""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lottery_ticket_pruner import schedules, selection, structures
from lottery_ticket_pruner.checks import is_number
from masked_layers.notices import warn_outside

_logger = logging.getLogger(__name__)

_OURS = ("lottery_ticket_pruner", "masked_layers")
_EMPTIED = "Nothing is left of"
_SAID: contextvars.ContextVar[set[str] | None] = contextvars.ContextVar("said", default=None)
_TRIED = contextvars.ContextVar("tried", default=False)


def warn(message: str) -> None:
    """Warns at the line outside this library that led to the call."""
    said = _SAID.get()
    if (_TRIED.get() and message.startswith(_EMPTIED)) or (said is not None and message in said):
        return
    if said is not None:
        said.add(message)
    warn_outside(message, *_OURS)


def is_emptied(before: np.ndarray, after: np.ndarray) -> bool:
    """Returns whether a mask keeps nothing now but kept something before."""
    return bool(before.any() and not after.any())


def of_emptied(paths: Iterable[str], when: str = "") -> None:
    """Warns about masks that keep nothing, if there are any.

    Args:
        paths: Paths of the masks that keep nothing.
        when: When it happened, for the message, such as `" at step 5"`.
    """
    paths = list(paths)
    if paths:
        warn(
            f"{_EMPTIED} {', '.join(map(repr, paths))}{when}: every weight there is pruned, and "
            "unless another path leads around a layer, the output no longer depends on the input. "
            'Rank weights within each layer (`scope="layer"`), divide the sparsity by '
            "`distribution`, give these layers a lower share, exclude them "
            "(`convert_to_masked(model, exclude=...)`), or prune less."
        )


def watched(
    many: Iterable[dict[str, np.ndarray]], sparsities: Iterable[selection.Share]
) -> Iterator[dict[str, np.ndarray]]:
    """Yields the given masks, and warns once about masks that keep nothing."""
    told = False
    for masks, sparsity in zip(many, sparsities, strict=True):
        emptied = [path for path, mask in masks.items() if not mask.any()]
        if emptied and not told:
            of_emptied(emptied, f" at a sparsity of {sparsity}")
            told = True
        yield masks


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Temporarily suppresses warnings about emptied masks, because they are only tried."""
    token = _TRIED.set(True)
    try:
        yield
    finally:
        _TRIED.reset(token)


@contextlib.contextmanager
def said_once() -> Iterator[set[str]]:
    """Temporarily issues each warning only the first time, such as in the rehearsal of a search.

    Python's own filter forgets what it has shown whenever a library changes the filters. Yields the
    set of what was said so far.
    """
    said: set[str] = set()
    token = _SAID.set(said)
    try:
        yield said
    finally:
        _SAID.reset(token)


def log_kept(model: str, criterion: str, masks: Mapping[str, np.ndarray]) -> None:
    """Logs how many weights of a model a criterion has kept."""
    total = sum(mask.size for mask in masks.values())
    alive = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    _logger.info(
        "Pruned %r by %s: %d of %d weights kept (%.2f %%).",
        *(model, criterion, alive, total, 100 * alive / total),
    )


def of_update(
    request: selection.Request,
    kernels: Mapping[str, selection.Weights],
    masks: Mapping[str, np.ndarray],
) -> None:
    """Warns about everything that an update of masks skipped, did not prune or pruned completely.

    Args:
        request: The pruning request. Requests with `keep_sparser` come from schedules, whose first
            amounts may be less than one weight.
        kernels: The kernels before the update, by path.
        masks: The masks after the update, by path.
    """
    structure, rate, sparsity = request.structure, request.rate, request.sparsity
    if structure is not None and not structure.coupled:
        _of_structure(structure, {path: kernel.layout for path, kernel in kernels.items()})
    amount = _largest(rate if sparsity is None else sparsity)
    # A sparsity that had been reached before is fine, but not one that left masks dense.
    if sparsity is not None and not all(kernel.mask.all() for kernel in kernels.values()):
        amount = 0.0
    same = all(np.array_equal(kernel.mask, masks[path]) for path, kernel in kernels.items())
    if same and not request.keep_sparser and amount > 0:
        unit = "weight" if structure is None else f"tile of {structure}"
        if structure is not None and structure.coupled:
            unit = f"channel in each group that is ranked together, or {structure} keeps the rest"
            remedy = "Prune more, lower `round_to`, raise `at_most`"
        else:
            unit += " in each group of weights ranked together"
            remedy = "Prune more"
        warn(
            f"Nothing was pruned: a share of {amount} is less than one {unit}. {remedy}, or rank "
            'all together (`scope="global"`).'
        )
    of_emptied(path for path, kernel in kernels.items() if is_emptied(kernel.mask, masks[path]))


def _largest(amount: object) -> float:
    """Returns the largest share of an amount, or 0 if there is none."""
    shares = amount.values() if isinstance(amount, Mapping) else (amount,)
    return max((float(share) for share in shares if is_number(share)), default=0.0)


def of_schedule_left(schedule: schedules.Schedule, step: int) -> str | None:
    """Returns a warning for a training that ends before the schedule does, or None.

    For a schedule without an end, the only check is whether it ever began.
    """
    first = schedule.begin_step
    if step < first:
        return (
            f"Nothing was pruned: the training ended at step {step}, and the schedule begins at "
            f"step {first}. Train longer, or use a `begin_step` below the number of batches "
            "trained (a step is a batch)."
        )
    if schedule.end_step is None:
        return None
    last = min(step, schedule.end_step)
    last -= (last - first) % schedule.frequency
    reached, final = schedule.sparsity(last), schedule.sparsity(schedule.end_step)
    if (reached <= final) if schedule.falls else (reached >= final):
        return None
    got = f"The schedule did not reach its final sparsity of {final:.4g}: the last mask update was "
    got += f"at step {last}, to {reached:.4g}"
    if step < schedule.end_step:
        return (
            f"{got}, and the training ended at step {step} of the {schedule.end_step} of the "
            f"schedule. Train longer, or set `end_step={last}` (a step is a batch)."
        )
    return (
        f"{got}, and the next one, {schedule.frequency} steps later, is after its `end_step` of "
        f"{schedule.end_step}. Set `end_step={last}`, or a `frequency` that divides the "
        f"{schedule.end_step - first} steps from its beginning to its end."
    )


def _of_structure(
    structure: structures.Structure, layouts: Mapping[str, structures.Layout]
) -> None:
    left = [path for path, layout in layouts.items() if not structure.applies(layout)]
    if left:
        _logger.warning("%s does not apply to %s; they are left unchanged.", structure, left)
    smaller = [
        path
        for path, layout in layouts.items()
        if path not in left and np.greater(structure.tile(layout), layout.sizes).any()
    ]
    if smaller:
        _logger.warning(
            "The tiles of %s are larger than %s: there they are cut off at the edges, so that a "
            "kernel that is smaller in all directions is a single tile.",
            structure,
            smaller,
        )
