"""Functions that measure each kind of evidence."""

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
from lottery_ticket_pruner.training import to_arrays

Source = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def measurement(
    model: keras.Model, criterion: criteria.Criterion, data: object = None
) -> Callable[[Mapping[str, np.ndarray]], dict[str, dict[str, np.ndarray]]]:
    """Returns a function that measures the evidence that a criterion needs.

    Args:
        model: A masked model. It is left unchanged.
        criterion: Criterion that ranks the weights.
        data: `(x, y)` or `(x, y, sample_weight)`, or `x` if no targets are needed.

    Returns:
        A function from masks by path to a dict with, for each kind of evidence, arrays by path
        under these masks.

    Raises:
        ValueError: If data that the criterion needs is missing.
    """
    sources = {name: _SOURCES[name](criterion, model, data) for name in criterion.evidence}

    def measure(masks: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
        return {name: source(masks) for name, source in sources.items()}

    return measure


def _of_loss(function: Callable[..., dict[str, np.ndarray]]) -> Callable[..., Source]:
    """Returns a source of evidence from a function of model, inputs and targets."""

    def source(criterion: criteria.Criterion, model: keras.Model, data: object) -> Source:
        x, y, sample_weight = unpacked(data)
        if x is None or y is None:
            raise ValueError(
                f"Criterion {criterion.name!r} differentiates the loss of the model and needs "
                "inputs and targets: `update_masks(..., data=(x, y))`. "
                f"Received: data={'None' if data is None else 'without targets'}"
            )

        def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            with masks_replaced(model, masks):
                return function(model, x, y, sample_weight=sample_weight)

        return find

    return source


def _of_inputs(criterion: criteria.Criterion, model: keras.Model, data: object) -> Source:
    x = unpacked(data)[0]
    if x is None:
        raise ValueError(
            f"Criterion {criterion.name!r} measures the inputs of each layer and needs "
            "inputs: `update_masks(..., data=x)`. Received: data=None"
        )

    def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with masks_replaced(model, masks):
            return input_norms(model, x)

    return find


def _of_flow(criterion: criteria.Criterion, model: keras.Model, data: object) -> Source:
    return SynapticFlow(model, unpacked(data)[0])


_SOURCES: dict[str, Callable[..., Source]] = {
    "gradient": _of_loss(loss_gradients),
    "hessian_gradient": _of_loss(hessian_gradients),
    "flow": _of_flow,
    "input_norm": _of_inputs,
}


def differentiates(criterion: criteria.Criterion) -> bool:
    """Returns whether a criterion differentiates the loss, and therefore needs targets."""
    return bool({"gradient", "hessian_gradient"} & set(criterion.evidence))


def unpacked(data: object) -> tuple[Any, Any, Any]:
    """Returns `(x, y, sample_weight)`, with None for what `data` lacks.

    As in Keras, a list is several inputs, not a pair. A data set is read.

    Raises:
        ValueError: If `data` is a tuple of another length, or `to_arrays` refuses it.
    """
    parts = data if isinstance(data, tuple) else to_arrays(data)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "`data` must be x, (x, y) or (x, y, sample_weight). "
            f"Received a tuple of {len(parts)} parts."
        )
    return (*parts, None, None)[:3]
