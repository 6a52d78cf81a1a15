"""Counts the bytes that are stored of a model, for budgets of bytes."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import selection
from masked_layers import serving


def stored_size(
    model: keras.Model, request: selection.Request, *, reconstruct: bool = False
) -> selection.StoredSize | None:
    """Returns the bytes of a model by masks, or None if a request has no budget of bytes.

    They are those of all weights in the sparse SavedModel, without its graph: the current values,
    encoded as `export_sparse_saved_model` does.

    Args:
        model: The masked model.
        request: The pruning request.
        reconstruct: Whether the weights are changed afterwards.

    Raises:
        ValueError: If there is a budget of bytes, and the weights are changed afterwards.
    """
    if "bytes" not in (request.budget or {}):
        return None
    if reconstruct:
        raise ValueError(
            "A budget of bytes counts the current values, and `reconstruct=True` replaces them "
            "afterwards, so that more bytes may be stored. Pass a `sparsity` with `reconstruct`, "
            f"or the budget alone. Received: budget={request.budget!r}, reconstruct=True"
        )
    values = serving.effective_values(model)
    before = ml.get_masks(model)

    def of(masks: Mapping[str, np.ndarray]) -> int:
        pruned = {path: before[path] & ~np.asarray(mask, bool) for path, mask in masks.items()}
        return serving.stored_nbytes(
            {
                path: np.where(pruned[path], np.zeros((), array.dtype), array)
                if path in pruned
                else array
                for path, array in values.items()
            }
        )

    return selection.StoredSize(sum(array.nbytes for array in values.values()), of)
