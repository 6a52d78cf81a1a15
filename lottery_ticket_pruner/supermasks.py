"""Evaluates masks over untrained weights, for many criteria and sparsities at a time."""

import itertools
import logging
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import criteria as criteria_module
from lottery_ticket_pruner import notices, treatments
from lottery_ticket_pruner.checks import is_number
from lottery_ticket_pruner.overrides import freeze_at_zero, rescaling, state_restored
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.training import ArrayDataset, Arrays, engine_of

_logger = logging.getLogger(__name__)

# Values of masked weights, as functions of the recorded initial weights.
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

    Each row equals the result of `evaluate_supermask` after `reset_masks` and
    `update_masks(criterion, sparsity=..., scope=scope, seed=seed)`, up to rounding. It is faster,
    because weights are ranked once per criterion, the data is put on the device once, and a single
    compiled evaluation reads the masks and rescaled weights of all rows. The model is left
    unchanged.

    Args:
        pruner: The pruner of a compiled masked model, with the records that the criteria read.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        y: Targets, in one of the same forms.
        criteria: Identifiers for `criteria.get`.
        sparsities: Shares of all weights that are pruned.
        weights: Values of the masked weights: `"initial"` (w0) or `"signed_constant"`, which is
            sign(w0) times the standard deviation of w0, per masked weight. All other weights have
            their recorded initial values.
        dwr: Whether masked weights are multiplied by size / ones(mask). Both by default.
        scope: Weights that are ranked together: `"layer"`, `"global"` or `"output"`.
        seed: Seed for random scores and ties.

    Returns:
        One dict per cell, ordered by criterion, sparsity, weights and dwr: `"criterion"` (its
        name), `"sparsity"`, `"weights"`, `"dwr"`, `"loss"` and the compiled metrics by name.

    Raises:
        ValueError: If the model is not masked or not compiled, a record is missing, or an argument
            is not valid. In that case nothing is evaluated.

    Reference:
        - [Zhou et al., arXiv 1905.01067](https://arxiv.org/abs/1905.01067), sections 4 and 5
    """
    model = pruner.model
    if not is_masked(model) or not model.compiled:
        raise ValueError(
            f"`evaluate_grid` needs a compiled masked model. Received {model.name!r}: create it by "
            "`masked_layers.convert_to_masked(model)`, compile it, and create the pruner for it."
        )
    criteria = criteria if isinstance(criteria, str) else list(criteria)
    if any((isinstance(criteria, str), is_number(sparsities), isinstance(dwr, bool))):
        raise ValueError(
            "`criteria`, `sparsities` and `dwr` must be lists. Received: "
            f"criteria={criteria!r}, sparsities={sparsities!r}, dwr={dwr!r}"
        )
    if not (criteria and len(sparsities) and len(weights) and len(dwr)):
        raise ValueError(
            "There is nothing to evaluate: pass at least one of each. Received: "
            f"criteria={criteria!r}, sparsities={sparsities!r}, weights={weights!r}, dwr={dwr!r}"
        )
    unknown = [name for name in weights if name not in WEIGHTS]
    if unknown:
        raise ValueError(f"`weights` must contain only {list(WEIGHTS)}. Received: {unknown}")
    # All at once, because criteria may read the weights as they are before the first evaluation.
    rankings = [
        (criterion.name, pruner.masks_at(criterion, sparsities=sparsities, scope=scope, seed=seed))
        for criterion in map(criteria_module.get, criteria)
    ]
    refs = ml.masked_refs(model)
    initial = pruner.initial_weights
    values = {
        name: {ref.path: WEIGHTS[name](initial[ref.path]) for ref in refs} for name in weights
    }
    data = ArrayDataset.of(x, y)
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
    # Logged once instead of warned about, because the grid explores how far masks can go.
    for path, cells in emptied.items():
        _logger.warning("Nothing is left of %r in the masks of %s.", path, ", ".join(cells))
    return rows


def _factor(mask: np.ndarray) -> np.float32:
    """Returns the factor of `Mask.rescale`, applied to the weights so that one program suffices."""
    ones = np.count_nonzero(mask)
    return np.float32(mask.size / ones if ones else 0.0)
