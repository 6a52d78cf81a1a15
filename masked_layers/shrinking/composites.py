"""Traces the `call` of a composite layer, such as a transformer block, into a graph of layers."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.keras_files import reason_of
from masked_layers.paths import walk
from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import CannotFollow
from masked_layers.shrinking.rules import foreign_name, rule_of

# By "package.class": name of a method or an inner layer -> a function of it and its arguments,
# which takes its place in a symbolic call, where sizes are not known.
STAND_INS: dict[str, dict[str, Callable[..., Any]]] = {}


def is_composite(operation: Any) -> bool:
    """Returns True if an operation is a layer that contains other layers."""
    return isinstance(operation, keras.Layer) and len(list(walk(operation))) > 1


def inner_graph(layer: keras.Layer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> keras.Model:
    """Returns a Functional model of the layers inside a layer that computes what the layer does.

    Args:
        layer: A built layer, whose `call` only calls layers inside it and Keras operations.
        args: Positional arguments of a call, symbolic tensors among them.
        kwargs: Its keyword arguments.

    Returns:
        A model on the same inner layers, whose inputs are a list of the tensors among the
        arguments, in the order of `keras.tree.flatten`.

    Raises:
        CannotFollow: If the layer also computes something else, for example with its own weights.
    """
    if getattr(layer, "activity_regularizer", None) is not None:
        raise CannotFollow("it regularizes its outputs")
    dtypes = {x.dtype for x in _keras_graph.tensors_in((args, kwargs))}
    if layer.autocast and any("float" in x and x != layer.compute_dtype for x in dtypes):
        raise CannotFollow("it casts its inputs")
    graph = _traced(layer, args, dict(kwargs))
    training = graph
    if "training" in inspect.signature(layer.call).parameters:
        training = _traced(layer, args, {**kwargs, "training": True})
        if _shape(graph) != _shape(training):
            raise CannotFollow("its `call` computes something else in training")
    for (*_, inference, _), (*_, trained, _) in zip(_calls(graph), _calls(training), strict=True):
        modes = inference.get("training"), trained.get("training")
        if modes not in ((None, None), (None, True), (False, True)):
            raise CannotFollow("a layer inside it has a mode of its own, in training or not")
    known = {id(v) for operation, *_ in _calls(graph) for v in getattr(operation, "variables", ())}
    if any(id(variable) not in known for variable in layer.variables):
        raise CannotFollow("it has weights besides those of the layers that it calls")
    for operation, *_ in _calls(graph):
        if isinstance(operation, keras.Layer) and rule_of(operation) is None:
            try:
                operation.get_config()
            except Exception as error:
                raise CannotFollow(f"'{operation.name}' inside it has no config") from error
    return graph


def signature(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Returns a description of arguments, which is equal for calls with equal graphs."""
    kinds = keras.tree.map_structure(
        lambda x: (x.shape, x.dtype) if _keras_graph.is_tensor(x) else repr(x),
        (tuple(args), dict(kwargs)),
    )
    return repr(kinds)


def _traced(layer: keras.Layer, args: Sequence[Any], kwargs: dict[str, Any]) -> keras.Model:
    """Returns the graph of one call on new symbolic inputs."""
    given = keras.tree.flatten((tuple(args), kwargs))
    new = [
        keras.Input(batch_shape=x.shape, dtype=x.dtype) if _keras_graph.is_tensor(x) else x
        for x in given
    ]
    ordered = _keras_graph.tensors_in(new)
    args, kwargs = keras.tree.pack_sequence_as((tuple(args), kwargs), new)
    # A call that assigns, as that of `SpectralNormalization` in training, must change no weight.
    scope = keras.StatelessScope()
    with _keras_graph.calls_forgotten(layer), _stand_ins(layer):
        try:
            with scope:
                outputs = layer.call(*args, **kwargs)
            if not all(map(_keras_graph.is_tensor, keras.tree.flatten(outputs))):
                raise CannotFollow("its `call` returns values other than tensors")
            graph = keras.Model(ordered, outputs, name=layer.name)
        except CannotFollow:
            raise
        except Exception as error:
            reason = reason_of(error).rstrip(".")[:100]
            raise CannotFollow(
                f"its `call` cannot be followed on symbolic inputs without sizes ({reason})"
            ) from error
    for operation, call_args, call_kwargs, outputs in _calls(graph):
        if not isinstance(operation, keras.Layer) and _lacks_a_size(operation):
            raise CannotFollow(f"its `call` uses a size that is not known in '{operation.name}'")
        for value in keras.tree.flatten((call_args, call_kwargs)):
            if isinstance(value, keras.Variable) or (
                not _keras_graph.is_tensor(value) and (keras.ops.is_tensor(value) or np.ndim(value))
            ):
                raise CannotFollow(f"its `call` reads a weight or an array in '{operation.name}'")
        if any(map(_keras.carries_mask, outputs)):
            raise CannotFollow("a layer inside it makes a Keras mask")
    if scope.state_mapping:
        raise CannotFollow("its `call` changes a variable")
    return graph


def _lacks_a_size(operation: Any) -> bool:
    """Returns True if an operation keeps a shape with a None, with which it cannot be executed."""
    held = (value for value in vars(operation).values() if isinstance(value, tuple | list))
    return any(size is None for value in held for size in value)


@contextlib.contextmanager
def _stand_ins(layer: keras.Layer) -> Iterator[None]:
    """Replaces methods and inner layers in the scope, as `STAND_INS` says for the layer's class."""
    before = vars(layer).copy()
    for name, stand_in in STAND_INS.get(foreign_name(layer), {}).items():
        if getattr(layer, name, None) is not None:
            vars(layer)[name] = functools.partial(stand_in, getattr(layer, name))
    try:
        yield
    finally:
        vars(layer).clear()
        vars(layer).update(before)


def _shape(graph: keras.Model) -> list[Any]:
    """Returns a description of a graph, which is equal for two graphs that compute the same."""
    makers = {id(x): -1 - index for index, x in enumerate(graph.inputs)}
    found: list[Any] = []
    for operation, args, kwargs, outputs in _calls(graph):
        own = isinstance(operation, keras.Layer)
        inputs = [
            makers[id(x)] if _keras_graph.is_tensor(x) else repr(x)
            for x in keras.tree.flatten(
                (args, {k: v for k, v in kwargs.items() if k != "training"})
            )
        ]
        makers |= {id(x): len(found) * 100 + index for index, x in enumerate(outputs)}
        found.append((id(operation) if own else type(operation), inputs))
    return [*found, [makers[id(x)] for x in graph.outputs]]


def _calls(graph: keras.Model) -> list[_keras_graph.GraphCall]:
    return list(_keras_graph.graph_calls(graph))
