"""The call of a model that `predict` makes."""

from __future__ import annotations

import inspect
from typing import Any

import keras


def inferred(model: keras.Model, *arguments: Any) -> Any:
    """Returns the outputs of a model in inference, as `predict` computes them.

    Without `training=False`, layers that train by default (`Resizing`, `RandomFlip`) would do so,
    and switch the layers called after them to training, too.
    """
    if "training" in inspect.signature(model.call).parameters:
        return model(*arguments, training=False)
    return model(*arguments)
