"""Untrained supermasks: what masks alone know, for many criteria and sparsities at a time."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any

import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import criteria as criteria_module
from lottery_ticket_pruner import notices, treatments
from lottery_ticket_pruner.overrides import freeze_at_zero, rescaling, state_restored
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.training import Arrays, Examples, engine_of

_logger = logging.getLogger(__name__)

# What masked weights are set to, from the recorded initial ones.
WEIGHTS = {
    "initial": lambda initial: initial,
    "signed_constant": treatments.signed_constant,
}


def evaluate_grid(
    pruner: LotteryTicketPruner,
    x: Arrays,
    y: Arrays,
    *,
    criteria: Iterable[criteria_module.Identifier],
    sparsities: Sequence[float],
    weights: Sequence[str] = ("initial", "signed_constant"),
    dwr: Sequence[bool] = (False, True),
    scope: str | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Evaluates every mask of a grid over weights that were never trained.

    Each row is what `evaluate_supermask` says after `reset_masks` and `update_masks(criterion,
    sparsity=..., scope=scope, seed=seed)`, to rounding. But weights are ranked once per criterion,
    the data is put on the device once, and one compiled evaluation serves all rows: masks and
    rescaled weights are values that it reads. The model is left exactly as it was.

    Args:
        pruner: The pruner of a compiled masked model, with the records that the criteria read.
        x: Inputs, the examples along the first axis; or a list or dict of such arrays.
        y: Targets, likewise.
        criteria: Whatever `criteria.get` takes.
        sparsities: Shares of all weights that are pruned.
        weights: What the masks are laid over: `"initial"` (w0) or `"signed_constant"`, which is
            sign(w0) times the standard deviation of w0, per masked weight. All other weights are
            the recorded initial ones.
        dwr: Whether masked weights are multiplied by size / ones(mask); both by default.
        scope: Who competes, as for `update_masks`.
        seed: For random scores and ties.

    Returns:
        One dict per cell, criteria outermost, then sparsities, weights and dwr: `"criterion"` (its
        name), `"sparsity"`, `"weights"`, `"dwr"`, `"loss"` and the compiled metrics by name.

    Raises:
        ValueError: If the model is not masked or not compiled, a record is missing, or an argument
            is wrong. Nothing was evaluated then.

    Reference:
        - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 4 and 5
    """
    model = pruner.model
    if not is_masked(model) or not model.compiled:
        raise ValueError(
            f"`evaluate_grid` needs a compiled masked model. Received {model.name!r}: make it by "
            "`masked_layers.convert_to_masked(model)`, compile it, and make the pruner for it."
        )
    criteria = criteria if isinstance(criteria, str) else list(criteria)
    if isinstance(criteria, str) or isinstance(sparsities, Real) or isinstance(dwr, bool):
        raise ValueError(
            "`criteria`, `sparsities` and `dwr` must be lists. Received: "
            f"criteria={criteria!r}, sparsities={sparsities!r}, dwr={dwr!r}"
        )
    if not (criteria and len(sparsities) and len(weights) and len(dwr)):
        raise ValueError(
            "There is nothing to evaluate: give at least one of each. Received: "
            f"criteria={criteria!r}, sparsities={sparsities!r}, weights={weights!r}, dwr={dwr!r}"
        )
    unknown = [name for name in weights if name not in WEIGHTS]
    if unknown:
        raise ValueError(f"`weights` must be out of {list(WEIGHTS)}. Received: {unknown}")
    # All at once: criteria may read the weights as they are before the first evaluation.
    rankings = [
        (criterion.name, pruner.masks_at(criterion, sparsities=sparsities, scope=scope, seed=seed))
        for criterion in map(criteria_module.get, criteria)
    ]
    refs = ml.masked_refs(model)
    initial = pruner.initial_weights
    values = {
        name: {ref.path: WEIGHTS[name](initial[ref.path]) for ref in refs} for name in weights
    }
    data = Examples.of(x, y)
    rows = []
    emptied: dict[str, list[str]] = {}
    flags = dict.fromkeys([ref.mask for ref in refs], False)
    with state_restored(model), rescaling(model, flags), notices.rehearsal():
        for variable, value in zip(model.weights, initial.values(), strict=True):
            variable.assign(value)
        freeze_at_zero(model)
        held: Any = None
        for name, ranking in rankings:
            for sparsity, masks in zip(sparsities, ranking, strict=True):
                ml.set_masks(model, masks)
                for path in (path for path, mask in masks.items() if not mask.any()):
                    emptied.setdefault(path, []).append(f"{name} at {sparsity}")
                for start, rescale in itertools.product(weights, dwr):
                    if rescale or held != start:
                        for ref in refs:
                            value = values[start][ref.path]
                            factor = _factor(masks[ref.path]) if rescale else None
                            ref.variable.assign(value if factor is None else value * factor)
                        held = None if rescale else start
                    cell = {"criterion": name, "sparsity": sparsity, "weights": start}
                    metrics = engine_of(model).evaluate(data)
                    rows.append({**cell, "dwr": bool(rescale), **metrics})
    # Said once and not warned of: how far masks can go is what such a grid asks.
    for path, masks in emptied.items():
        _logger.warning("Nothing is left of %r in the masks of %s.", path, ", ".join(masks))
    return rows


def _factor(mask: np.ndarray) -> np.float32:
    """The factor of `Mask.rescale`, which here is in the weight: that needs no other program."""
    ones = np.count_nonzero(mask)
    return np.float32(mask.size / ones if ones else 0.0)
