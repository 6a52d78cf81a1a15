"""The sources of evidence: for each kind that a criterion may need, the function that finds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.evidence.activations import input_norms
from lottery_ticket_pruner.evidence.flow import SynapticFlow
from lottery_ticket_pruner.evidence.gradients import hessian_gradients, loss_gradients
from lottery_ticket_pruner.overrides import masks_replaced
from lottery_ticket_pruner.training import arrays_of

Source = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def measurement(
    model: keras.Model, criterion: criteria.Criterion, data: Any = None
) -> Callable[[Mapping[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Returns a function that finds all that a criterion needs beside the records.

    Args:
        model: Masked model. It is left as it was.
        criterion: Criterion that is going to rank the weights.
        data: `(x, y)` or `(x, y, sample_weight)`, or `x` where no targets are needed.

    Returns:
        A function from masks by path to a dict: for each kind of evidence arrays by path, as they
        are under these masks.

    Raises:
        ValueError: If there are no data of the kind that the criterion needs.
    """
    sources = {name: _SOURCES[name](criterion, model, data) for name in criterion.evidence}

    def measure(masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        return {name: source(masks) for name, source in sources.items()}

    return measure


def _of_loss(function: Callable) -> Callable[..., Source]:
    """Returns the source of what a function of model, inputs and targets finds."""

    def source(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
        x, y, sample_weight = _unpack(data)
        if x is None or y is None:
            raise ValueError(
                f"Criterion {criterion.name!r} differentiates the model's loss, for which it needs "
                "inputs and targets: `update_masks(..., data=(x, y))`. "
                f"Received: data={'None' if data is None else 'without targets'}"
            )

        def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            with masks_replaced(model, masks):
                return function(model, x, y, sample_weight=sample_weight)

        return find

    return source


def _of_inputs(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
    x = _unpack(data)[0]
    if x is None:
        raise ValueError(
            f"Criterion {criterion.name!r} measures what enters each layer, for which it needs "
            "inputs: `update_masks(..., data=x)`. Received: data=None"
        )

    def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with masks_replaced(model, masks):
            return input_norms(model, x)

    return find


def _of_flow(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
    return SynapticFlow(model, _unpack(data)[0])


_SOURCES: dict[str, Callable[..., Source]] = {
    "gradient": _of_loss(loss_gradients),
    "hessian_gradient": _of_loss(hessian_gradients),
    "flow": _of_flow,
    "input_norm": _of_inputs,
}


def differentiates(criterion: criteria.Criterion) -> bool:
    """Returns whether a criterion needs targets, to differentiate the loss."""
    return bool({"gradient", "hessian_gradient"} & set(criterion.evidence))


def _unpack(data: Any) -> tuple[Any, Any, Any]:
    """Returns `(x, y, sample_weight)` of Keras' data; a list is several inputs, not a pair."""
    parts = data if isinstance(data, tuple) else arrays_of(data)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "`data` must be x, (x, y) or (x, y, sample_weight). "
            f"Received a tuple of {len(parts)} parts."
        )
    return (*parts, None, None)[:3]
