"""The graph of a Functional model, which `shrinking` needs and Keras' public API lacks.

`_keras` for the rest. `tests/masked_layers/shrinking/test_keras_graph.py` checks each name against
the installed Keras.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
from keras.src.ops import nn as nn_operations
from keras.src.ops import numpy as numpy_operations

# The graph of a Functional model also holds operations that are not layers: `x + y` on symbolic
# tensors is an `Add` operation. Their classes have no public names.
ADD = numpy_operations.Add
SUBTRACT = numpy_operations.Subtract
MULTIPLY = numpy_operations.Multiply
DIVIDE = numpy_operations.TrueDivide
MAXIMUM = numpy_operations.Maximum
MINIMUM = numpy_operations.Minimum
CONCATENATE = numpy_operations.Concatenate
ELEMENTWISE_OPERATIONS = (
    type(keras.activations.relu(keras.Input((1,)))._keras_history.operation),
    nn_operations.Elu,
    nn_operations.Gelu,
    nn_operations.HardSigmoid,
    nn_operations.HardSilu,
    nn_operations.LeakyRelu,
    nn_operations.Relu,
    nn_operations.Relu6,
    nn_operations.Selu,
    nn_operations.Sigmoid,
    nn_operations.Silu,
    numpy_operations.Tanh,
)


# operation, args, kwargs, outputs
GraphCall = tuple[Any, tuple[Any, ...], dict[str, Any], list[keras.KerasTensor]]


def graph_calls(model: keras.Model) -> Iterator[GraphCall]:
    """Yields (operation, args, kwargs, outputs) of every call in a Functional model, in order.

    The public way to the graph is `get_config()`, which serializes every layer and fails where one
    cannot be.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                arguments = node.arguments
                yield node.operation, arguments.args, arguments.kwargs, node.outputs


def carries_mask(tensor: keras.KerasTensor) -> bool:
    """True where Keras passes a mask along with a symbolic tensor, as after `Masking`."""
    return getattr(tensor, "_keras_mask", None) is not None
