"""Finds kept weights without effect: those that lie on no path from an input to an output."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.inspection import SparsityReport, get_masks, masked_refs, sparsity_report
from masked_layers.shrinking.channels import Channels, Edit, Flow
from masked_layers.shrinking.following import follow, variable_of


def effective_masks(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns the masks of a model without kept weights that have no effect.

    A weight is effective if it lies on a path of kept weights from an input of the model to an
    output. Biases do not start a path, because a unit that reads no input has a constant output.
    The masks of layers whose channels cannot be followed (listed under `shrink`) are returned
    unchanged. If additions join layers, or a constant enters a zero-padded convolution, some
    weights without effect may count as effective.

    Args:
        model: A built, masked Sequential or Functional model.

    Returns:
        A dict from path to a new bool array of the weight's shape, True where it is kept and
        effective.

    Raises:
        ValueError: If the model has no masked weights, is neither Sequential nor Functional,
            overrides `call`, or is not built.
    """
    _keras.sync(model)
    paths = {id(ref.variable): ref.path for ref in masked_refs(model)}
    masks = get_masks(model)
    flow = follow(model)
    flow.settle()
    for operation, edit in flow.edits.values():
        for name, axes in edit.slices.items():
            path = paths.get(id(variable_of(operation, name)))
            if path is None:
                continue
            for axis, channels in axes.items():
                np.moveaxis(masks[path], axis, 0)[~_connected(flow, edit, channels)] = False
    return masks


def _connected(flow: Flow, edit: Edit, channels: Channels) -> np.ndarray:
    """Returns which channels lie on a path from an input to an output, as a bool array."""
    connected = flow.alive(channels)
    connected &= [root not in flow.forced for root in flow.roots(channels.slots).tolist()]
    for reader in edit.readers:
        if channels is reader.source:
            connected &= ~reader.fixed
    return connected


def effective_sparsity(model: keras.Model) -> SparsityReport:
    """Counts the kept and pruned weights of a masked model, and how many kept ones are effective.

    Args:
        model: A built, masked Sequential or Functional model.

    Returns:
        The report of `sparsity_report`, with the number of effective weights in each row. A weight
        is effective if it lies on a path of kept weights from an input of the model to an output;
        `effective_masks` returns the masks of these weights.

    Raises:
        ValueError: If the model has no masked weights, is neither Sequential nor Functional,
            overrides `call`, or is not built.

    Example:
    ```python
    report = masked_layers.effective_sparsity(model)
    report.sparsity, report.effective_sparsity
    ```
    """
    masks = effective_masks(model)
    report = sparsity_report(model)
    rows = [
        dataclasses.replace(row, effective=int(np.count_nonzero(masks[row.path]))) for row in report
    ]
    return dataclasses.replace(report, rows=tuple(rows))
