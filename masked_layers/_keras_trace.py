"""Watches calls and loads of a model, which Keras' public API cannot.

`tests/masked_layers/test_keras.py` checks each of these against the installed Keras.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras.src import backend
from keras.src.models.functional import Functional
from keras.src.saving import saving_lib


class _Watched(keras.StatelessScope):
    """A scope that tells of every variable whose value is read in it."""

    def __init__(self, read: Callable[[keras.Variable], None]) -> None:
        super().__init__(initialize_variables=False)
        self.read = read

    def get_current_value(self, variable: keras.Variable) -> Any:
        self.read(variable)
        return super().get_current_value(variable)


def watch(model: keras.layers.Layer, inputs: Any, read: Callable[[keras.Variable], None]) -> None:
    """Calls a model on symbolic tensors, and `read` for every variable whose value it reads.

    Nothing is computed and no variable changes. `Layer.compute_output_spec` would not call the
    layers inside a functional model; the function of the backend has no public name.

    Args:
        model: A built model.
        inputs: Structure of `KerasTensor`s whose shapes are known.
        read: Called while the reader is on the stack.
    """

    def call(inputs: Any) -> Any:
        with _Watched(read):
            return model(inputs)

    backend.compute_output_spec(call, inputs)


def callers() -> Iterator[types.FrameType]:
    """Yields the frames around the caller, the innermost first."""
    frame = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def load_under_way() -> Any:
    """Returns an object that lives as long as the load of a file does that led here, or None.

    Keras hands the store of the weights to each layer's part of the load. It has no other sign of
    where a load begins and ends.
    """
    for frame in callers():
        if frame.f_code is saving_lib._load_state.__code__:
            return frame.f_locals["weights_store"]
    return None


def forget_traces(layer: keras.layers.Layer) -> None:
    """Makes functions of a layer under `@tf.function` or `@jax.jit` compile again.

    What they compiled before reads weights as the layer read them then. Keras knows nothing of
    them, and TensorFlow has no public way to make one forget.
    """
    for owner in (layer, *type(layer).__mro__):
        if (getattr(owner, "__module__", None) or "").partition(".")[0] == "keras":
            continue
        for name, value in list(vars(owner).items()):
            if hasattr(value, "_function_cache"):
                getattr(layer, name)._function_cache.clear()
            # Of functions of JAX alone: a user's layer may have a cache, too.
            elif callable(value) and hasattr(value, "clear_cache") and hasattr(value, "lower"):
                value.clear_cache()


def variables_in_graph(model: keras.Model) -> dict[int, str]:
    """Returns the names of operations of functional graphs that take a variable as an argument.

    On TensorFlow, the config of such a graph holds the value in place of the variable. What an
    operation was called with is known to its nodes alone.

    Returns:
        Id of each such variable to the name of the first operation that takes it.
    """
    found: dict[int, str] = {}
    for layer in model._flatten_layers():
        if isinstance(layer, Functional):
            for operation in layer.operations:
                for node in operation._inbound_nodes:
                    for value in keras.tree.flatten((node.arguments.args, node.arguments.kwargs)):
                        if isinstance(value, keras.Variable):
                            found.setdefault(id(value), operation.name)
    return found
