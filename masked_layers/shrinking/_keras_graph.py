"""Access to the graph of a Functional model, for which Keras has no public API.

`tests/masked_layers/shrinking/test_keras_graph.py` checks every name used here against the
installed Keras.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import keras

# The layers of `keras.applications.convnext`, which have no public names.
from keras.src.applications.convnext import LayerScale as LayerScale
from keras.src.applications.convnext import StochasticDepth as StochasticDepth
from keras.src.ops import nn as nn_operations
from keras.src.ops import numpy as numpy_operations

from masked_layers.paths import walk

# The graph of a Functional model also contains operations that are not layers, whose classes have
# no public names: `x + y` on symbolic tensors adds an `Add` operation.
ADD = numpy_operations.Add
SUBTRACT = numpy_operations.Subtract
MULTIPLY = numpy_operations.Multiply
DIVIDE = numpy_operations.TrueDivide
MAXIMUM = numpy_operations.Maximum
MINIMUM = numpy_operations.Minimum
CONCATENATE = numpy_operations.Concatenate
GET_ITEM = numpy_operations.GetItem
ONES_LIKE = numpy_operations.OnesLike
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

    `get_config()` returns the graph too, but it serializes every layer and fails if one of them
    cannot be serialized.
    """
    for depth in sorted(model._nodes_by_depth, reverse=True):
        for node in model._nodes_by_depth[depth]:
            if not node.is_input:
                arguments = node.arguments
                yield node.operation, arguments.args, arguments.kwargs, node.outputs


def is_tensor(value: Any) -> bool:
    """Returns True for a symbolic tensor."""
    return isinstance(value, keras.KerasTensor)


def tensors_in(arguments: Any) -> list[keras.KerasTensor]:
    """Returns the symbolic tensors in nested arguments, in the order of `keras.tree.flatten`."""
    return [x for x in keras.tree.flatten(arguments) if is_tensor(x)]


@contextlib.contextmanager
def calls_forgotten(layer: keras.Layer) -> Iterator[None]:
    """Discards Keras' records of symbolic calls in the scope, for layers inside `layer`.

    Keras keeps a record of every symbolic call in the layer, and reads `layer.output` there. Graphs
    that were made in the scope stay whole, as they have these records too.
    """
    parts = [part for _, part in walk(layer)]
    before = [(len(part._inbound_nodes), len(part._outbound_nodes)) for part in parts]
    try:
        yield
    finally:
        for part, (inbound, outbound) in zip(parts, before, strict=True):
            del part._inbound_nodes[inbound:], part._outbound_nodes[outbound:]
