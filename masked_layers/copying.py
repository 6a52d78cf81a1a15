"""An exact copy of a model: its config, values, optimizer and assets."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
import types
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras, _keras_trace
from masked_layers.inspection import weight_refs
from masked_layers.layers import MaskedLayer
from masked_layers.paths import children, plain_class, walk

Layer: TypeAlias = keras.layers.Layer

# Where Keras looks up the strings of its configs.
_NAMESPACES = (
    keras.activations,
    keras.constraints,
    keras.initializers,
    keras.losses,
    keras.metrics,
    keras.optimizers,
    keras.regularizers,
)


def copy_model(model: keras.Model, *, dtype: str | None = None) -> keras.Model:
    """Returns a model with the same layers, values, compilation and optimizer state.

    No variable is shared with `model`. Functions are, and the user's objects without variables of
    which a config would not make the same ones: schedules and losses without a `get_config`,
    partials, compiled functions.

    Args:
        model: The model.
        dtype: The float type that the copy is to compute and keep its weights in, whatever the
            model does. The copy is not compiled then.

    Raises:
        ValueError: If the model cannot be made again from its config.
    """
    _keras.sync(model)
    taken = _keras_trace.variables_in_graph(model)
    for variable in model.variables:
        if id(variable) in taken:
            raise ValueError(
                f"'{model.name}' cannot be copied: its operation '{taken[id(variable)]}' takes the "
                f"variable '{variable.path}' itself, and in a copy that would be a constant. Put "
                "the operation into a layer that holds the one whose variable it takes."
            )
    names = in_use_by_name(model)
    with as_in_use(model):
        try:
            try:
                copy, compile_config = _made_again(model, dtype)
            except Exception:
                # A `from_config` may look a function or class up by a name that it wrote itself.
                with _keras.custom_object_scope(names):
                    copy, compile_config = _made_again(model, dtype)
        except Exception as error:
            if isinstance(error, RecursionError) and (cyclic := _with_cyclic_config(model)):
                raise ValueError(
                    f"'{model.name}' cannot be copied: the config of {cyclic} holds itself, a dict "
                    "or list in it. Give it a `get_config()` of plain values, or pass "
                    "`inplace=True` to change the model itself."
                ) from error
            raise ValueError(
                f"'{model.name}' ({plain_class(model).__name__}) cannot be copied, because Keras "
                f"cannot make it again from its config: {error}\nGive it a `get_config()` and "
                "`from_config()`, or pass `inplace=True` to change the model itself."
            ) from error
        _order_like(model, copy)
        _copy_state(model, copy)
        _keras.copy_called(model, copy)
        if compile_config:  # An empty one would compile with defaults.
            try:
                copy.compile_from_config(compile_config)
            except Exception as error:
                raise ValueError(
                    f"'{model.name}' cannot be copied as it is compiled: {error}\nPass "
                    "`inplace=True` to change the model itself."
                ) from error
            _copy_optimizer(model, copy)
    return copy


def _made_again(model: keras.Model, dtype: str | None) -> tuple[keras.Model, Any]:
    """Returns a model made from the config of a model, not compiled, and how it was compiled."""
    config = _keras.serialize(model)
    compile_config = config.pop("compile_config", None)
    optimizer = getattr(model, "optimizer", None)
    if compile_config and optimizer is not None and "optimizer" not in compile_config:
        # Keras takes it out of the config of a model that it saves as `.h5`.
        optimizer = keras.saving.serialize_keras_object(optimizer)
        compile_config = {**compile_config, "optimizer": optimizer}
    if dtype is not None:
        config, compile_config = _with_dtype(config, dtype), None
    with warnings.catch_warnings():
        # A subclassed model that takes several arguments: see `_build_as_in`.
        warnings.filterwarnings("ignore", "Model .* had a build config", UserWarning)
        return _keras.deserialize(config), compile_config


def _with_cyclic_config(model: keras.Model) -> str:
    """Returns the layers of which the config leads back to itself, none as an empty string."""
    found = []
    for path, layer in walk(model):
        # That of a layer around them may not come to an end.
        with contextlib.suppress(Exception):
            if _is_cyclic(layer.get_config(), frozenset()):
                found.append(f"'{path or layer.name}' ({plain_class(layer).__name__})")
    return ", ".join(found)


def _is_cyclic(value: Any, around: frozenset[int]) -> bool:
    if not isinstance(value, (dict, list, tuple)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    around_it = around | {id(value)}
    return id(value) in around or any(_is_cyclic(item, around_it) for item in inside)


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config of a layer with another float type, all layers inside it included."""
    if isinstance(config, dict):
        return {
            key: dtype if key == "dtype" and _is_float(value) else _with_dtype(value, dtype)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_dtype(value, dtype) for value in config)
    return config


def _is_float(dtype: Any) -> bool:
    if isinstance(dtype, dict):  # a policy
        dtype = dtype.get("config", {}).get("name")
    return isinstance(dtype, str) and "float" in dtype


@contextlib.contextmanager
def as_in_use(model: keras.Model) -> Iterator[None]:
    """Lets configs of what a model is made of stand for the classes and functions that it uses.

    By Keras' own rules they stand for what has the same name, if it is registered; a lambda is
    written as code that does not know the modules it refers to, with a warning.
    """
    functions = [
        value
        for value in held_by(model, _keras.compile_arguments(model))
        if isinstance(value, types.FunctionType)
    ]
    lambdas = [function for function in functions if function.__name__ == "<lambda>"]
    try:
        for function in lambdas:
            function.__name__ = "lambda"
        with _keras.identity_scope():
            yield
    finally:
        for function in lambdas:
            function.__name__ = "<lambda>"


def _order_like(source: keras.Model, target: keras.Model) -> None:
    """Gives the variables of a copy the order of the original's, where layers are in sets."""
    for (_, old), (_, new) in zip(walk(source), walk(target), strict=False):
        pairs = {id(a): b for (_, a), (_, b) in zip(children(old), children(new), strict=False)}
        _keras.order_sublayers(
            new, [pairs[id(child)] for child in _keras.sublayers(old) if id(child) in pairs]
        )


def _copy_state(source: keras.Model, target: keras.Model) -> None:
    pairs = list(zip(walk(source), walk(target), strict=False))
    for (_, old), (_, new) in pairs:
        _enable_lora_as_in(old, new)
    if _first_difference(source.variables, target.variables):
        for (_, old), (_, new) in reversed(pairs):
            # Where the two do not go together, the difference between them is said below.
            if plain_class(old) is plain_class(new):
                with contextlib.suppress(Exception):
                    _build_as_in(old, new)
    for old, new in zip(weight_refs(source), weight_refs(target), strict=False):
        if old.mask is not None and new.mask is not None and old.mask.frozen is not None:
            new.mask.freeze(keras.ops.convert_to_numpy(old.mask.frozen))
    if difference := _first_difference(source.variables, target.variables):
        raise ValueError(
            f"The copy of '{source.name}' that its config makes has other variables than the "
            f"model itself: {difference}. Its `get_config()` does not describe it fully, or it is "
            "not built. Build it by calling it on a batch, mend `get_config()`, or pass "
            "`inplace=True` to change the model itself."
        )
    for (_, old), (_, new) in pairs:
        if new.name != old.name:  # An automatic name inside a composite layer.
            new.name = old.name
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(source.variables, target.variables, strict=True):
        # Through the host: on JAX an assigned variable shares its buffer with the other one.
        new.assign(np.array(keras.ops.convert_to_numpy(old)))
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(weight_refs(source), weight_refs(target), strict=True):
        if old.mask is not None:
            new.mask.rescale = old.mask.rescale
    for (_, old), (_, new) in pairs:
        copy_assets(old, new)


def _build_as_in(source: Layer, target: Layer) -> None:
    """Builds a layer that the copy of the layer around it has left out.

    Of a subclassed model without a `build`, Keras notes the shape of the first argument alone, so
    that one with more of them cannot be built as a whole. Those inside it can.
    """
    if not source.built or target.built:
        return
    if not _keras.own_variables(source):
        target.built = True
    elif config := source.get_build_config():
        target.build_from_config(config)


def _enable_lora_as_in(source: Layer, target: Layer) -> None:
    """Gives a layer the LoRA that its like has: the config of a layer around it does not say so."""
    if getattr(source, "lora_enabled", False) and not getattr(target, "lora_enabled", True):
        target.enable_lora(source.lora_rank, lora_alpha=source.lora_alpha)


def _first_difference(before: list[keras.Variable], after: list[keras.Variable]) -> str:
    """Says where two lists of variables part in number or shape; empty where they do not."""
    for old, new in itertools.zip_longest(before, after):
        if old is None:
            return f"'{new.path}' of shape {tuple(new.shape)} is there only in the copy"
        if new is None:
            return f"'{old.path}' of shape {tuple(old.shape)} is missing in the copy"
        if tuple(old.shape) != tuple(new.shape):
            return (
                f"'{old.path}' has the shape {tuple(old.shape)}, and in its place the copy has "
                f"'{new.path}' of shape {tuple(new.shape)}"
            )
    return ""


def copy_assets(source: Layer, target: Layer) -> None:
    """Copies what a layer keeps beside its variables: vocabularies, adapted statistics."""
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)
    if hasattr(target, "finalize_state") and target.built:
        target.finalize_state()


def _copy_optimizer(source: keras.Model, target: keras.Model) -> None:
    old, new = getattr(source, "optimizer", None), getattr(target, "optimizer", None)
    if old is None or new is None or not old.built:
        return
    if not new.built:
        new.build(target.trainable_variables)
    theirs = new.variables
    if not _keras.optimized_variables(old):
        # From an `.h5` file, without slots: those of the copy start as they do.
        theirs = theirs[: len(old.variables)]
    if difference := _first_difference(old.variables, theirs):
        raise ValueError(
            f"The state of the optimizer of '{source.name}' does not fit the copy: {difference}. "
            "Compile the model again first, as in `model.compile(...)`."
        )
    for a, b in zip(old.variables, theirs, strict=True):
        b.assign(np.array(keras.ops.convert_to_numpy(a)))


def held_by(model: keras.Model, *others: Any) -> Iterator[Any]:
    """Yields the functions, classes and objects with a config that a model holds, each once.

    Args:
        model: The model.
        *others: What else to look into.
    """
    seen: dict[int, Any] = {}  # The values too, lest another one gets the id of one of them.

    def inside(value: Any) -> Iterator[Any]:
        if id(value) in seen or isinstance(value, keras.Variable):
            return
        if isinstance(value, (list, tuple, dict)):
            seen[id(value)] = value
            for item in value.values() if isinstance(value, dict) else value:
                yield from inside(item)
            return
        if not isinstance(value, types.FunctionType) and not hasattr(value, "get_config"):
            return
        seen[id(value)] = value
        yield value
        if not isinstance(value, types.FunctionType | type | Layer):  # Layers: see below.
            yield from inside(list(getattr(value, "__dict__", {}).values()))

    for _, layer in walk(model):
        yield from inside(layer)
        if isinstance(layer, MaskedLayer):
            yield from inside([layer._masking.mask, layer._masking.initializer])
        for key, value in vars(layer).items():
            # Keras wraps some methods of a layer, which then stand among its attributes.
            if key not in ("_layers", "_modules") and not callable(getattr(type(layer), key, None)):
                yield from inside(value)
    yield from inside(others)


def in_use_by_name(model: keras.Model) -> dict[str, Any]:
    """Returns what a model uses by its name, for a `from_config` that looks it up there itself.

    Names that two of them have, or Keras has, are left out: one would stand in for the other. So
    would a function for any string in a config that is its name: not for general use.
    """
    found: dict[str, Any] = {}
    twice = set()
    for value in held_by(model, _keras.compile_arguments(model)):
        named = value if isinstance(value, types.FunctionType | type) else plain_class(value)
        if named.__module__.partition(".")[0] not in ("keras", "masked_layers"):
            name = _keras.get_registered_name(named)
            if found.setdefault(name, named) is not named:
                twice.add(name)
    return {
        name: value for name, value in found.items() if name not in twice and not _is_of_keras(name)
    }


def _is_of_keras(name: str) -> bool:
    # Not by `keras.losses.get` and its like: they would make an object of a user's class.
    return any(hasattr(module, name) for module in _NAMESPACES)


def renew_optimizer(model: keras.Model) -> None:
    """Gives a compiled model an optimizer that is not built: other variables are trainable now."""
    old = getattr(model, "optimizer", None)
    if old is not None:
        with as_in_use(model):
            vars(model)["optimizer"] = type(old).from_config(old.get_config())


def compile_with(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Compiles a compiled model again as it is, with another optimizer."""
    with as_in_use(model):
        config = model.get_compile_config()
        config["optimizer"] = keras.saving.serialize_keras_object(optimizer)
        model.compile_from_config(config)
