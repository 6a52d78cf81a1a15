"""Variables of a model: the scope that they are created in, and their values as arrays."""

from __future__ import annotations

import contextlib

import keras
import numpy as np


def variable_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    """The scope in which variables that the model's own functions read must be created."""
    if keras.backend.backend() == "tensorflow":
        return model.distribute_strategy.scope()
    return contextlib.nullcontext()


def read(variable: keras.Variable) -> np.ndarray:
    """A copy of a variable's value that shares no memory with it; bfloat16 becomes float32."""
    return widened(np.array(variable.numpy()))


def widened(array: np.ndarray) -> np.ndarray:
    """The array, in float32 where it is bfloat16: NumPy has no such type, nor do its files."""
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
