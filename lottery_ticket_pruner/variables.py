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


def viewed(variable: keras.Variable) -> np.ndarray:
    """Returns the value as a read-only array, without a copy if it is in the processor's memory.

    It is the value at the time of the call. Only on torch it changes when a value is assigned. It
    must therefore not be used after that, or kept.
    """
    tensor = variable.value
    if keras.backend.standardize_dtype(variable.dtype) == "bfloat16":
        return read(variable)
    if keras.backend.backend() == "torch":
        array = tensor.detach().cpu().numpy()
    elif keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        # NumPy's own conversion copies it.
        array = np.asarray(memoryview(tf.convert_to_tensor(tensor)))
    else:
        array = np.asarray(tensor)
    array = array.view()
    array.flags.writeable = False
    return array


def widened(array: np.ndarray) -> np.ndarray:
    """Returns the array, with bfloat16 converted to float32, because NumPy has no bfloat16."""
    return array.astype("float32") if array.dtype.name == "bfloat16" else array
