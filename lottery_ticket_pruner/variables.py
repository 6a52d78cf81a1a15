"""Variables of a model: the scope in which they are created, and their values as arrays."""

from __future__ import annotations

import contextlib
from typing import Any

import keras
import numpy as np


def variable_scope(model: keras.Model) -> contextlib.AbstractContextManager[Any]:
    """Returns the scope for creating variables that the model's own functions read."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def read(variable: keras.Variable) -> np.ndarray:
    """Returns a copy of the value that shares no memory with it. bfloat16 becomes float32."""
    return widened(np.array(variable.numpy()))


def widened(array: np.ndarray) -> np.ndarray:
    """Returns the array, with bfloat16 converted to float32, because NumPy has no bfloat16."""
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
