"""Finds and resets compiled functions that became stale because a model changed in place."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import re
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers._keras_trace import forget_traces, load_under_way
from masked_layers._tensorflow import forget_gradients, gradient_names
from masked_layers.notices import warn_outside

Layer: TypeAlias = keras.layers.Layer

_BESIDE = "_masked_layers_compiled"
# For each load in progress, the ids of layers whose compiled functions were already reset.
_LOADED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def kept_beside(model: Layer) -> dict[str, Any]:
    """Returns a dict, stored with the model, of functions compiled outside of it, by name.

    Other modules use it to keep compiled functions that read the model's weights.
    `forget_functions` empties it.
    """
    if _BESIDE not in vars(model):
        # Bypasses Keras' tracking, which would search it for variables.
        object.__setattr__(model, _BESIDE, {})
    return vars(model)[_BESIDE]


def forget_functions(model: Layer, *, around: bool = True) -> list[weakref.ref[Any]]:
    """Makes `fit`, `evaluate`, `predict`, `generate`, ... of a model compile again when called.

    Keras and task models based on it compile functions in `make_train_function`,
    `make_generate_function`, ... and store them in `train_function`, `generate_function`, ... These
    attributes are reset. Methods of layers under `@tf.function` or `@jax.jit` are also compiled
    again.

    Args:
        model: A model or layer. All layers inside it are included.
        around: Whether to include every other existing model that contains one of its layers. A
            layer does not know which models contain it, so they are searched for among the objects
            that Python's garbage collector tracks. Pass False for a model that was just made.

    Returns:
        References to TensorFlow functions that read a variable of the model, for `warn_of_traces`.
    """
    if not around:
        _forget(_keras.flatten(model))
        return []
    layers = _around(model)
    with _released(model.variables) as traces:
        _forget(layers.values())
    return traces


def forget_while_loading(layer: Layer) -> None:
    """Resets compiled functions like `forget_functions`, but once for all layers of a file.

    A search through all existing objects for each layer would take longer than the loading.

    Args:
        layer: A layer that has just loaded a state that changes its computation.
    """
    load = load_under_way()
    if load is not None and id(layer) in _LOADED.get(load, ()):
        return
    models = _alive(keras.Model)
    # The other layers loaded from the file are in the models that contain this layer.
    inside = {id(layer): layer} | _in_those_with({id(layer): layer}, models)
    layers = inside | _in_those_with(inside, models)
    variables = {id(v): v for other in inside.values() for v in other.variables}
    with _released(variables.values()):
        _forget(layers.values())
    if load is not None:
        _LOADED.setdefault(load, set()).update(layers)


def remake_function(model: keras.Model, kind: str) -> None:
    """Replaces a compiled function of the model with a new one, which is traced again.

    Args:
        model: A compiled model.
        kind: `"train"`, `"test"` or `"predict"`.
    """
    step = getattr(model, f"{kind}_step")
    # `jax.jit` looks up earlier traces by equality, and the bound method equals the one of the
    # function to be replaced. Without a new object the old trace would be used again.
    with _keras.replaced(model, f"{kind}_step", lambda *args, **kwargs: step(*args, **kwargs)):
        getattr(model, f"make_{kind}_function")(force=True)


def remake_functions(model: Layer, *, around: bool = True) -> None:
    """Replaces the compiled functions of a model with new ones, which are traced again.

    Unlike `forget_functions`, it can be called during `fit`, which then continues with the new
    function: `fit` looks up its function for each batch, so the function must never be missing.

    Args:
        model: A model or layer whose computation has changed.
        around: Whether to include every other existing model that contains one of its layers.
    """
    layers = _around(model) if around else {id(model): model}
    kept = [
        (layer, kind)
        for layer in layers.values()
        for kind in ("train", "test", "predict")
        if isinstance(layer, keras.Model) and getattr(layer, f"{kind}_function", None) is not None
    ]
    if around:
        with _released(model.variables) as traces:
            _forget(layers.values())
    else:
        traces = []
    for layer, kind in kept:
        remake_function(layer, kind)
    warn_of_traces(model, model.weights, traces)


def _around(model: Layer) -> dict[int, Layer]:
    """Returns all layers of a model and of the existing models that contain one of them, by id."""
    inside = {id(layer): layer for layer in _keras.flatten(model)}
    return inside | _in_those_with(inside, _alive(keras.Model))


def _in_those_with(inside: Mapping[int, Layer], models: Iterable[keras.Model]) -> dict[int, Layer]:
    """Returns all layers of the models that contain one of the given layers, by their ids."""
    found: dict[int, Layer] = {}
    for model in models:
        try:
            held = {id(layer): layer for layer in _keras.flatten(model)}
        except AttributeError:  # It is still being made.
            continue
        if held.keys() & inside.keys():
            found |= held
    return found


def _forget(layers: Iterable[Layer]) -> None:
    names: dict[type, list[str]] = {}
    for layer in layers:
        cls = type(layer)
        if cls not in names:
            names[cls] = _kept_by_makers(cls)
        for name in names[cls]:
            if vars(layer).get(name) is not None:
                # On TensorFlow it would otherwise be kept alive by the tracking for checkpoints.
                delattr(layer, name)
                setattr(layer, name, None)
        vars(layer).pop(_BESIDE, None)
        forget_traces(layer)


def _kept_by_makers(cls: type) -> list[str]:
    """Returns the attributes in which `make_..._function` methods of a class store functions.

    Only a method that reads the attribute makes the function again when the attribute is None.
    """
    found = []
    for maker in filter(None, (re.fullmatch("make_(.+_function)", name) for name in dir(cls))):
        methods = [vars(base)[maker[0]] for base in cls.__mro__ if maker[0] in vars(base)]
        codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
        if any(code is not None and maker[1] in code.co_names for code in codes):
            found.append(maker[1])
    return found


@contextlib.contextmanager
def _released(variables: Iterable[keras.Variable]) -> Iterator[list[weakref.ref[Any]]]:
    """Frees memory that TensorFlow would keep for functions that are deleted inside the scope.

    Keras' optimizers sum gradients with `all_reduce`, which registers a gradient function for each
    traced training step. That gradient function refers to the graph of the step and keeps it alive.

    Args:
        variables: Variables that the functions read.

    Yields:
        References to the functions.
    """
    traces = _traces(variables)
    named = _names_of_gradients(traces)
    references = [weakref.ref(trace) for trace in traces]
    del traces
    yield references
    if any(names for _, names in named):
        gc.collect()
        forget_gradients(name for trace, names in named if trace() is None for name in names)


def warn_of_traces(
    model: Layer, variables: Collection[keras.Variable], traces: Sequence[weakref.ref[Any]]
) -> None:
    """Warns about existing `tf.function`s that read one of these variables and are now stale.

    On JAX and torch a function is traced again automatically when the state of a model or the class
    of a layer changes.

    Args:
        model: The model that has changed.
        variables: Weights that the model now reads differently.
        traces: The return value of `forget_functions`.
    """
    if any(trace() is not None for trace in traces):
        gc.collect()  # Deletes functions without references.
    alive = [trace for trace in (reference() for reference in traces) if trace is not None]
    if names := sorted({trace.graph.name for trace in _readers(variables, alive)}):
        warn_outside(
            f"'{model.name}' has changed, but functions compiled before the change read its "
            f"weights and still compute the earlier model: {names}. Create them again with "
            "`tf.function(...)` before you use them. Functions that Keras creates, such as "
            "`train_function`, are compiled again automatically.",
            *("masked_layers", "lottery_ticket_pruner"),  # The pruner changes models too.
        )


def _traces(variables: Iterable[keras.Variable]) -> list[Any]:
    """Returns the traces of existing `tf.function`s that read one of the variables."""
    if keras.backend.backend() != "tensorflow":
        return []
    import tensorflow as tf

    return _readers(variables, _alive(tf.types.experimental.ConcreteFunction))


def _readers(variables: Iterable[keras.Variable], traces: Sequence[Any]) -> list[Any]:
    if not traces:
        return []
    values = [variable.value for variable in variables]
    parts = [part for value in values for part in getattr(value, "values", (value,))]
    wanted = {id(part.handle) for part in parts}
    # `trace.variables` raises an error if one of the variables no longer exists.
    return [
        trace
        for trace in traces
        if any(id(handle) in wanted for handle in trace.graph.external_captures)
    ]


def _names_of_gradients(traces: list[Any]) -> list[tuple[weakref.ref[Any], list[str]]]:
    """Returns the gradients registered in each trace, and in loops and branches inside it."""
    if not traces:
        return []
    import tensorflow as tf

    owned = {id(trace.graph) for trace in _alive(tf.types.experimental.ConcreteFunction)}
    graphs: dict[int, list[Any]] = {id(trace.graph): [] for trace in traces}
    for graph in _alive(type(traces[0].graph)):
        outer = graph
        while outer is not None and id(outer) not in owned:
            outer = getattr(outer, "outer_graph", None)
        if id(outer) in graphs:
            graphs[id(outer)].append(graph)
    return [(weakref.ref(trace), gradient_names(graphs[id(trace.graph)])) for trace in traces]


def _alive(cls: type) -> list[Any]:
    """Returns the instances of a class that Python's garbage collector tracks.

    There can be millions of objects, so no Python code is run for each of them.
    """
    objects = gc.get_objects()
    wanted = {kind for kind in set(map(type, objects)) if issubclass(kind, cls)}
    return list(itertools.compress(objects, map(wanted.__contains__, map(type, objects))))
