"""Observes calls and loads of a model, which Keras' public API does not support.

`tests/masked_layers/test_keras.py` checks each function against the installed Keras.
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
    """Scope that reports every variable whose value is read in it."""

    def __init__(self, read: Callable[[keras.Variable], None]) -> None:
        super().__init__(initialize_variables=False)
        self.read = read

    def get_current_value(self, variable: keras.Variable) -> Any:
        self.read(variable)
        return super().get_current_value(variable)


def watch(call: Callable[[Any], Any], inputs: Any, read: Callable[[keras.Variable], None]) -> None:
    """Calls a function on symbolic tensors and reports every variable whose value it reads.

    Nothing is computed and no variable changes. `Layer.compute_output_spec` would not call the
    layers inside a functional model, and the backend's function has no public name.

    Args:
        call: A built model, or a function that calls one.
        inputs: Structure of `KerasTensor`s with known shapes.
        read: Function of a variable, called while the code that reads it is on the stack.
    """

    def watched(inputs: Any) -> Any:
        with _Watched(read):
            return call(inputs)

    backend.compute_output_spec(watched, inputs)


def callers() -> Iterator[types.FrameType]:
    """Yields the frames on the stack above the caller, beginning with the innermost."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        yield frame
        frame = frame.f_back


def load_under_way() -> Any:
    """Returns an object that exists as long as the load of a file that led to this call, or None.

    The object is the weights store, which Keras passes to all layers. Nothing else shows where a
    load begins and ends.
    """
    for frame in callers():
        if frame.f_code is saving_lib._load_state.__code__:
            return frame.f_locals["weights_store"]
    return None


def forget_traces(layer: keras.layers.Layer) -> None:
    """Makes methods of a layer under `@tf.function` or `@jax.jit` compile again.

    The versions compiled before read weights as the layer did then. Keras does not manage these
    functions, and TensorFlow has no public way to clear their cache.
    """
    for owner in (layer, *type(layer).__mro__):
        if (getattr(owner, "__module__", None) or "").partition(".")[0] == "keras":
            continue
        for name, value in list(vars(owner).items()):
            if hasattr(value, "_function_cache"):
                getattr(layer, name)._function_cache.clear()
            # Only of JAX functions, since a user's layer may have a cache too.
            elif callable(value) and hasattr(value, "clear_cache") and hasattr(value, "lower"):
                value.clear_cache()


def variables_in_graph(model: keras.Model) -> dict[int, str]:
    """Returns the names of operations of functional graphs that take a variable as an argument.

    On TensorFlow, the config of such a graph contains the value in place of the variable. Only the
    nodes of an operation, which are private, have its arguments.

    Returns:
        A dict from the id of each such variable to the name of the first operation that takes it.
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
