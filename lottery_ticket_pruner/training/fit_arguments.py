"""Arguments of `fit` that become arrays: a validation split, and weights of classes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import keras
import numpy as np

from lottery_ticket_pruner import checks
from lottery_ticket_pruner.training.dataset import ArrayDataset


def split_off(data: ArrayDataset, share: float) -> tuple[ArrayDataset, ArrayDataset]:
    """Splits off the last examples for validation, as `Model.fit` does before it shuffles.

    Args:
        data: The examples.
        share: Share of them to split off.

    Returns:
        The examples to train on, and those to evaluate on.

    Raises:
        ValueError: If the share is not between 0 and 1, or leaves no examples in a part.
    """
    if not checks.is_number(share) or not 0 < share < 1:
        raise ValueError(f"`validation_split` must be between 0 and 1. Received: {share!r}.")
    count = math.floor(len(data) * (1 - share))
    if not 0 < count < len(data):
        raise ValueError(
            f"validation_split={share} leaves {count} of {len(data)} examples to train on and "
            f"{len(data) - count} to evaluate on. Both need at least one."
        )
    return ArrayDataset(data.take(slice(count))), ArrayDataset(data.take(slice(count, None)))


def weighted(data: ArrayDataset, class_weight: Mapping[int, float]) -> ArrayDataset:
    """Weights every example by its class, as `Model.fit` does.

    Args:
        data: Examples with one array of targets: class indices, or one-hot rows.
        class_weight: Weights by class. That of other classes is 1.

    Raises:
        ValueError: If it is not such a dict, or the examples have sample weights, no targets,
            several of them, or targets of another shape.
    """
    if not isinstance(class_weight, Mapping) or not all(
        checks.is_integer(number) and checks.is_number(weight)
        for number, weight in class_weight.items()
    ):
        raise ValueError(
            "`class_weight` must be a dict from class indices to numbers. "
            f"Received: {class_weight!r}."
        )
    if len(data.host) > 2:
        raise ValueError("Pass `class_weight` or `sample_weight`, not both.")
    classes = data.host[1] if len(data.host) > 1 else None
    if not isinstance(classes, np.ndarray) or classes.ndim not in (1, 2):
        shape = classes.shape if isinstance(classes, np.ndarray) else type(classes).__name__
        raise ValueError(
            "`class_weight` needs one array of targets: class indices, or a one-hot row for each "
            f"example. Received: {shape}."
        )
    if classes.ndim == 2:
        classes = classes.argmax(1) if classes.shape[1] != 1 else classes[:, 0]
    classes = np.round(classes).astype("int64")
    weights = np.ones(len(classes), keras.config.floatx())
    for number, weight in class_weight.items():
        weights[classes == number] = weight
    return ArrayDataset((*data.host, weights))
