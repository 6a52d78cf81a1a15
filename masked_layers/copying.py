"""An exact copy of a model: its config, values, optimizer and assets."""

from __future__ import annotations

import contextlib
import operator
import tempfile
import types
from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.inspection import weight_refs
from masked_layers.layers import MaskedLayer
from masked_layers.paths import plain_class, walk

Layer: TypeAlias = keras.layers.Layer


def copy_model(model: keras.Model, *, dtype: str | None = None) -> keras.Model:
    """Returns a model with the same layers, values, compilation and optimizer state.

    Nothing is shared with `model`.

    Args:
        model: The model.
        dtype: The float type that the copy is to compute and keep its weights in, whatever the
            model does. The copy is not compiled then.

    Raises:
        ValueError: If the model cannot be made again from its config.
    """
    _keras.sync(model)
    custom = custom_objects_of(model)
    try:
        with _lambdas_by_name(model, custom):
            config = _keras.serialize(model)
        compile_config = config.pop("compile_config", None)
        if dtype is not None:
            config, compile_config = _with_dtype(config, dtype), None
        with _keras.custom_object_scope(custom):
            copy = _keras.deserialize(config, custom)
    except Exception as error:
        raise ValueError(
            f"'{model.name}' ({plain_class(model).__name__}) cannot be copied, because Keras "
            f"cannot make it again from its config: {error}\nGive it a `get_config()` and "
            "`from_config()`, or pass `inplace=True` to change the model itself."
        ) from error
    _copy_state(model, copy)
    _keras.copy_called(model, copy)
    if compile_config:  # An empty one would compile with defaults.
        try:
            with _keras.custom_object_scope(custom):
                copy.compile_from_config(compile_config)
        except Exception as error:
            raise ValueError(
                f"'{model.name}' cannot be copied as it is compiled: {error}\nCompile it with "
                "named functions in place of lambdas, or pass `inplace=True` to change the model "
                "itself."
            ) from error
        _copy_optimizer(model, copy)
    return copy


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
def _lambdas_by_name(model: keras.Model, custom: dict[str, Any]) -> Iterator[None]:
    """Lets `Lambda` layers be serialized by the name of a custom object while it is open.

    Keras serializes the code of a lambda without the module it refers to: in a copy made of it,
    `lambda x: ops.tanh(x)` does not know `ops`.
    """
    named = {}
    for _, layer in walk(model):
        function = layer.function if isinstance(layer, keras.layers.Lambda) else None
        if getattr(function, "__name__", None) == "<lambda>":
            named[layer] = function
    try:
        for index, (layer, function) in enumerate(named.items()):
            name = f"<lambda {index}>"
            layer.function = types.FunctionType(
                function.__code__, {}, name, None, function.__closure__
            )
            custom[name] = function
        yield
    finally:
        for layer, function in named.items():
            layer.function = function


def _copy_state(source: keras.Model, target: keras.Model) -> None:
    pairs = list(zip(walk(source), walk(target), strict=False))
    for old, new in zip(weight_refs(source), weight_refs(target), strict=False):
        if old.mask is not None and new.mask is not None and old.mask.frozen is not None:
            new.mask.freeze(keras.ops.convert_to_numpy(old.mask.frozen))
    before, after = ([tuple(v.shape) for v in model.variables] for model in (source, target))
    if before != after:
        raise ValueError(
            f"The copy of '{source.name}' that its config makes has other variables "
            f"({len(after)}) than the model itself ({len(before)}): its `get_config()` does not "
            "describe it fully, or it is not built. Build it by calling it on a batch, mend "
            "`get_config()`, or pass `inplace=True` to change the model itself."
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
    shapes = [[tuple(v.shape) for v in o.variables] for o in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The state of the optimizer of '{source.name}' does not fit the copy: "
            f"{len(shapes[0])} variables before, {len(shapes[1])} after. Compile the model anew "
            "before it is converted."
        )
    for a, b in zip(old.variables, new.variables, strict=True):
        b.assign(np.array(keras.ops.convert_to_numpy(a)))


def _same(a: Any, b: Any) -> bool:
    """True for one object, and for functions made anew by the same code from the same objects."""
    if a is b or not all(isinstance(value, types.FunctionType) for value in (a, b)):
        return a is b
    made_of = [
        (*(f.__defaults__ or ()), *(cell.cell_contents for cell in f.__closure__ or ()))
        for f in (a, b)
    ]
    return a.__code__ is b.__code__ and all(map(operator.is_, *made_of))


def custom_objects_of(model: keras.Model) -> dict[str, Any]:
    """Returns the classes and functions in use that Keras could not find by name by itself.

    Classes of Keras are left out: one named like an op of Keras would stand in for it.

    Raises:
        ValueError: If two different ones have the same name.
    """
    found: dict[str, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, dict):
            for item in value.values():
                add(item)
        elif isinstance(value, types.FunctionType):
            if value.__name__ != "<lambda>":
                add_named(value)
        elif hasattr(value, "get_config"):
            add_named(plain_class(value))

    def add_named(value: Any) -> None:
        ours = value.__module__.partition(".")[0] in ("keras", "masked_layers")
        if not ours:
            name = _keras.get_registered_name(value)
            if not _same(found.setdefault(name, value), value):
                raise ValueError(
                    f"'{model.name}' cannot be copied: it uses {found[name]!r} and {value!r}, and "
                    f"Keras knows both as '{name}'. Rename one, or pass `inplace=True` to change "
                    "the model itself."
                )

    for _, layer in walk(model):
        add(layer)
        if isinstance(layer, MaskedLayer):
            add([layer._masking.mask, layer._masking.initializer])
        for key, value in vars(layer).items():
            # Keras wraps some methods of a layer, which then stand among its attributes.
            if key not in ("_layers", "_modules") and not callable(getattr(type(layer), key, None)):
                add(value)
    add(_keras.compile_arguments(model))
    return found


def renew_optimizer(model: keras.Model) -> None:
    """Gives a compiled model an optimizer that is not built: other variables are trainable now."""
    old = getattr(model, "optimizer", None)
    if old is not None:
        vars(model)["optimizer"] = type(old).from_config(old.get_config())


def compile_with(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Compiles a compiled model anew as it is, but for its optimizer."""
    config = model.get_compile_config()
    config["optimizer"] = keras.saving.serialize_keras_object(optimizer)
    with _keras.custom_object_scope(custom_objects_of(model)):
        model.compile_from_config(config)
