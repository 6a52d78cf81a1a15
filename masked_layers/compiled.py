"""Functions compiled before a model changed, which would go on computing what it was then."""

from __future__ import annotations

import contextlib
import gc
import inspect
import itertools
import re
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras

from masked_layers import _keras
from masked_layers._keras_trace import forget_traces, load_under_way
from masked_layers._tensorflow import forget_gradients, gradient_names
from masked_layers.notices import warn_outside

Layer = keras.layers.Layer

_BESIDE = "_masked_layers_compiled"
# For each load of a file that is under way, the ids of layers that nothing compiled is left of.
_LOADED: weakref.WeakKeyDictionary[Any, set[int]] = weakref.WeakKeyDictionary()


def kept_beside(model: Layer) -> dict[str, Any]:
    """Returns what was compiled beside a model, by a name, until `forget_functions` empties it.

    For what is compiled elsewhere and reads the model's weights, to be kept for its next use.
    """
    if _BESIDE not in vars(model):
        # Past Keras' tracking, which would look for variables in it.
        object.__setattr__(model, _BESIDE, {})
    return vars(model)[_BESIDE]


def forget_functions(model: Layer, *, around: bool = True) -> list[weakref.ref]:
    """Makes `fit`, `evaluate`, `predict`, `generate`, ... of a model compile again when called.

    Keras and tasks made with it compile a function in `make_train_function`,
    `make_generate_function`, ... and keep it in `train_function`, `generate_function`, ... Methods
    of layers under `@tf.function` or `@jax.jit` are compiled again, too.

    Args:
        model: A model or layer, with all inside it.
        around: Whether to do the same to every other model that is alive and holds one of its
            layers. A layer does not know what holds it: what Python's garbage collector tracks is
            looked over. False for a model that was made just now, which nothing was compiled with.

    Returns:
        The functions of TensorFlow that read a variable of the model, for `warn_of_traces`.
    """
    if not around:
        _forget(_keras.flatten(model))
        return []
    layers = _around(model)
    with _released(model.variables) as traces:
        _forget(layers.values())
    return traces


def forget_while_loading(layer: Layer) -> None:
    """Does what `forget_functions` does, but once for all layers that one file is loaded into.

    Looking over all that is alive for each of them would take longer than the loading.

    Args:
        layer: A layer that has just loaded another kind of state.
    """
    load = load_under_way()
    if load is not None and id(layer) in _LOADED.get(load, ()):
        return
    models = _alive(keras.Model)
    # What else is loaded is in the models that hold this layer, if in any.
    inside = {id(layer): layer} | _in_those_with({id(layer): layer}, models)
    layers = inside | _in_those_with(inside, models)
    variables = {id(v): v for other in inside.values() for v in other.variables}
    with _released(variables.values()):
        _forget(layers.values())
    if load is not None:
        _LOADED.setdefault(load, set()).update(layers)


def remake_function(model: keras.Model, kind: str) -> None:
    """Replaces a compiled function of the model by a new one, which is traced again.

    Args:
        model: A compiled model.
        kind: `"train"`, `"test"` or `"predict"`.
    """
    step = getattr(model, f"{kind}_step")
    # `jax.jit` finds earlier traces by equality, and the bound method is equal to that of the
    # function to be replaced: without a new identity the old trace would be used again.
    with _keras.replaced(model, f"{kind}_step", lambda *args, **kwargs: step(*args, **kwargs)):
        getattr(model, f"make_{kind}_function")(force=True)


def remake_functions(model: Layer, *, around: bool = True) -> None:
    """Replaces the compiled functions of a model by new ones, which are traced again.

    Unlike `forget_functions` it may be called in the middle of `fit`, which goes on with the new
    function: each batch looks it up, and none may be missing.

    Args:
        model: A model or layer that computes something else than before.
        around: Whether to do the same to every other model that is alive and holds one of its
            layers.
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
    """Returns, by id, the layers of a model and of every model alive that holds one of them."""
    inside = {id(layer): layer for layer in _keras.flatten(model)}
    return inside | _in_those_with(inside, _alive(keras.Model))


def _in_those_with(inside: Mapping[int, Layer], models: Iterable[keras.Model]) -> dict[int, Layer]:
    """Returns the layers of those models that hold one of these layers, by their ids."""
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
                # On TensorFlow it would stay alive, tracked for checkpoints.
                delattr(layer, name)
                setattr(layer, name, None)
        vars(layer).pop(_BESIDE, None)
        forget_traces(layer)


def _kept_by_makers(cls: type) -> list[str]:
    """Returns the attributes in which the methods of a class keep the functions that they make.

    Only a method that looks at the attribute makes the function again where that is None.
    """
    found = []
    for maker in filter(None, (re.fullmatch("make_(.+_function)", name) for name in dir(cls))):
        methods = [vars(base)[maker[0]] for base in cls.__mro__ if maker[0] in vars(base)]
        codes = [getattr(inspect.unwrap(method), "__code__", None) for method in methods]
        if any(code is not None and maker[1] in code.co_names for code in codes):
            found.append(maker[1])
    return found


@contextlib.contextmanager
def _released(variables: Iterable[keras.Variable]) -> Iterator[list[weakref.ref]]:
    """Frees what TensorFlow would hold forever of functions that die while it is open.

    An optimizer of Keras sums gradients by `all_reduce`, which registers a gradient of its own in
    each training step that is traced. It refers to the graph of the step.

    Args:
        variables: What the functions read.

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
    model: Layer, variables: Collection[keras.Variable], traces: Sequence[weakref.ref]
) -> None:
    """Warns of `tf.function`s that are alive, read one of these variables, and stay as they are.

    On JAX and torch a function is traced again by itself where the state of a model or the class
    of a layer is another one.

    Args:
        model: The model that has changed.
        variables: Weights that it reads in another way than before.
        traces: What `forget_functions` returned.
    """
    if any(trace() is not None for trace in traces):
        gc.collect()  # Those that nothing holds any more.
    alive = [trace for trace in (reference() for reference in traces) if trace is not None]
    if names := sorted({trace.graph.name for trace in _readers(variables, alive)}):
        warn_outside(
            f"'{model.name}' has changed, and functions compiled before that read its weights go "
            f"on computing what it was: {names}. Make them again by `tf.function(...)` before you "
            "use them. Those that Keras makes, such as `train_function`, make themselves again.",
            *("masked_layers", "lottery_ticket_pruner"),  # A pruner changes models, too.
        )


def _traces(variables: Iterable[keras.Variable]) -> list[Any]:
    """Returns the traces of `tf.function`s that are alive and read one of the variables."""
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
    # The `variables` of a trace are an error where one of them is no longer alive.
    return [
        trace
        for trace in traces
        if any(id(handle) in wanted for handle in trace.graph.external_captures)
    ]


def _names_of_gradients(traces: list[Any]) -> list[tuple[weakref.ref, list[str]]]:
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

    There can be millions of objects: no Python code runs for each.
    """
    objects = gc.get_objects()
    wanted = {kind for kind in set(map(type, objects)) if issubclass(kind, cls)}
    return list(itertools.compress(objects, map(wanted.__contains__, map(type, objects))))
