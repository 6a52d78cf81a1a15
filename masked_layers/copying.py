"""Makes exact copies of models: config, values, optimizer and assets."""

from __future__ import annotations

import contextlib
import itertools
import types
import warnings
from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras, _keras_configs, _keras_trace
from masked_layers.files import temporary_folder
from masked_layers.inspection import weight_refs
from masked_layers.keras_files import reason_of
from masked_layers.layers import MaskedLayer
from masked_layers.notices import warn_outside
from masked_layers.paths import children, plain_class, walk

Layer: TypeAlias = keras.layers.Layer

# Modules in which Keras looks up the strings in its configs.
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

    The copy shares no variable with `model`. It shares functions, and custom objects without
    variables that cannot be recreated from a config: schedules and losses without a `get_config`,
    partials, compiled functions.

    Args:
        model: A built model.
        dtype: Float dtype for the computation and the weights of the copy. If given, the copy is
            not compiled. Default: the dtypes of `model`.

    Raises:
        ValueError: If the model cannot be recreated from its config.
    """
    _keras.sync(model)
    taken = _keras_trace.variables_in_graph(model)
    for variable in model.variables:
        if id(variable) in taken:
            raise ValueError(
                f"'{model.name}' cannot be copied: its operation '{taken[id(variable)]}' takes the "
                f"variable '{variable.path}' as an argument, which would be a constant in a copy. "
                "Move the operation into a custom layer that contains the layer of the variable."
            )
    names = in_use_by_name(model)
    # Layers that are not built yet draw their weights later, and every copy others.
    whole = all(layer.built for _, layer in walk(model))
    apart = _keras.drawn_apart() if whole else contextlib.nullcontext()
    with as_in_use(model), apart:
        try:
            try:
                copy, compile_config = _made_again(model, dtype)
            except Exception:
                # A custom `from_config` may look up a function or class by a name that the custom
                # `get_config` wrote.
                with _keras_configs.custom_object_scope(names):
                    copy, compile_config = _made_again(model, dtype)
        except Exception as error:
            if isinstance(error, RecursionError) and (cyclic := _with_cyclic_config(model)):
                raise ValueError(
                    f"'{model.name}' cannot be copied: the config of {cyclic} contains a dict or "
                    "list that contains itself. Return plain values from `get_config()`, or pass "
                    "`inplace=True` to change the model itself."
                ) from error
            remedy = "Give it a `get_config()` and `from_config()`,"
            if _keras.hides_inputs(model):
                remedy = _keras.NAME_ARGUMENTS
            raise ValueError(
                f"'{model.name}' ({plain_class(model).__name__}) cannot be copied, because Keras "
                f"cannot recreate it from its config: {reason_of(error)} {remedy} or pass "
                "`inplace=True` to change the model itself."
            ) from error
        _order_like(model, copy)
        _copy_state(model, copy)
        _keras.copy_called(model, copy)
        if compile_config:  # An empty one would compile with defaults.
            try:
                copy.compile_from_config(compile_config)
            except Exception as error:
                raise ValueError(
                    f"'{model.name}' cannot be copied, because its copy cannot be compiled in the "
                    f"same way: {error}\nPass `inplace=True` to change the model itself."
                ) from error
            _copy_optimizer(model, copy)
            # Losses and metrics are created in the scope of the copy, the others as in the model.
            for old, new in zip(model.metrics_variables, copy.metrics_variables, strict=False):
                if old.shape == new.shape:
                    _keras.match_devices(new, old)
    return copy


def _made_again(model: keras.Model, dtype: str | None) -> tuple[keras.Model, Any]:
    """Returns an uncompiled model made from the config of `model`, and its compile config."""
    config = _keras_configs.serialize(model)
    compile_config = config.pop("compile_config", None)
    optimizer = getattr(model, "optimizer", None)
    if compile_config and optimizer is not None and "optimizer" not in compile_config:
        # Keras removes it from the config of a model that is saved as `.h5`.
        optimizer = keras.saving.serialize_keras_object(optimizer)
        compile_config = {**compile_config, "optimizer": optimizer}
    if dtype is not None:
        config, compile_config = _with_dtype(config, dtype), None
    with warnings.catch_warnings():
        # From subclassed models with several arguments, which `_build_as_in` builds.
        warnings.filterwarnings("ignore", "Model .* had a build config", UserWarning)
        return _keras_configs.deserialize(config), compile_config


def _with_cyclic_config(model: keras.Model) -> str:
    """Returns the names of layers with a cyclic config, or an empty string."""
    found = []
    for path, layer in walk(model):
        # The `get_config` of a layer that contains them may not terminate.
        with contextlib.suppress(Exception):
            if _is_cyclic(layer.get_config(), frozenset()):
                found.append(f"'{path or layer.name}' ({plain_class(layer).__name__})")
    return ", ".join(found)


def _is_cyclic(value: object, around: frozenset[int]) -> bool:
    if not isinstance(value, (dict, list, tuple)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    around_it = around | {id(value)}
    return id(value) in around or any(_is_cyclic(item, around_it) for item in inside)


def _with_dtype(config: object, dtype: str) -> Any:
    """Returns the config of a layer, including inner layers, with another float dtype."""
    if isinstance(config, dict):
        return {
            key: dtype if key == "dtype" and _is_float(value) else _with_dtype(value, dtype)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_dtype(value, dtype) for value in config)
    return config


def _is_float(dtype: object) -> bool:
    if isinstance(dtype, dict):  # a policy
        dtype = dtype.get("config", {}).get("name")
    return isinstance(dtype, str) and "float" in dtype


@contextlib.contextmanager
def as_in_use(model: keras.Model) -> Iterator[None]:
    """Makes the configs of a model's objects refer to the very classes and functions in use.

    By default, Keras looks up the class or function that is registered under the same name. It
    writes a lambda as code, with a warning, and the code loses the modules that it refers to.
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
        with _keras_configs.identity_scope():
            yield
    finally:
        for function in lambdas:
            function.__name__ = "<lambda>"


def _order_like(source: keras.Model, target: keras.Model) -> None:
    """Gives the variables of a copy the order of the original ones if layers are in sets."""
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
            # If the two do not match, the error below names the difference.
            if plain_class(old) is plain_class(new):
                with contextlib.suppress(Exception):
                    _build_as_in(old, new)
    for old, new in zip(weight_refs(source), weight_refs(target), strict=False):
        if old.mask is not None and new.mask is not None and old.mask.frozen is not None:
            new.mask.freeze(keras.ops.convert_to_numpy(old.mask.frozen))
    if difference := _first_difference(source.variables, target.variables):
        raise ValueError(
            f"The copy of '{source.name}' made from its config has other variables than the "
            f"model itself: {difference}. Its `get_config()` does not describe it fully, or it is "
            "not built. Build it by calling it on a batch, correct `get_config()`, or pass "
            "`inplace=True` to change the model itself."
        )
    for (_, old), (_, new) in pairs:
        if new.name != old.name:  # An automatic name inside a composite layer.
            new.name = old.name
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(source.variables, target.variables, strict=True):
        _keras.match_devices(new, old)
        # Through the host, because on JAX the assigned variable would share the other's buffer.
        new.assign(np.array(keras.ops.convert_to_numpy(old)))
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(weight_refs(source), weight_refs(target), strict=True):
        if old.mask is not None and new.mask is not None:
            new.mask.rescale = old.mask.rescale
            new.mask.quantization = old.mask.quantization
    for (_, old), (_, new) in pairs:
        copy_assets(old, new)


def _build_as_in(source: Layer, target: Layer) -> None:
    """Builds an inner layer that was not built together with its model.

    For a subclassed model without a `build` method, Keras records only the shape of the first
    argument, so a model with several arguments cannot be built as a whole. Its layers can.
    """
    if not source.built or target.built:
        return
    if not _keras.own_variables(source):
        target.built = True
    elif config := source.get_build_config():
        target.build_from_config(config)


def _enable_lora_as_in(source: Layer, target: Layer) -> None:
    """Enables LoRA as in the original layer, since configs of outer layers do not contain it."""
    if getattr(source, "lora_enabled", False) and not getattr(target, "lora_enabled", True):
        target.enable_lora(source.lora_rank, lora_alpha=source.lora_alpha)


def _first_difference(before: list[keras.Variable], after: list[keras.Variable]) -> str:
    """Describes the first difference in number or shape of two lists of variables; "" if none."""
    for old, new in itertools.zip_longest(before, after):
        if old is None:
            return f"'{new.path}' of shape {tuple(new.shape)} exists only in the copy"
        if new is None:
            return f"'{old.path}' of shape {tuple(old.shape)} is missing in the copy"
        if tuple(old.shape) != tuple(new.shape):
            return (
                f"'{old.path}' has shape {tuple(old.shape)}, but in its place the copy has "
                f"'{new.path}' of shape {tuple(new.shape)}"
            )
    return ""


def copy_assets(source: Layer, target: Layer) -> None:
    """Copies the state of a layer outside its variables: vocabularies, adapted statistics."""
    if hasattr(source, "save_assets"):
        with temporary_folder() as folder:
            source.save_assets(str(folder))
            target.load_assets(str(folder))
    if hasattr(target, "finalize_state") and target.built:
        target.finalize_state()
        if isinstance(source, keras.layers.Normalization):
            _keep_statistics(source, target)


def _keep_statistics(
    source: keras.layers.Normalization, target: keras.layers.Normalization
) -> None:
    """Lets a copy normalize by what its original normalizes by.

    Keras derives these tensors from the variables when the layer is built, adapted or loaded, but
    not when `set_weights` changes the variables.
    """
    names = ("mean", "variance")
    dtype = source.compute_dtype  # A copy in another dtype rounds them otherwise.
    held, derived = (
        [
            np.array(keras.ops.convert_to_numpy(keras.ops.cast(getattr(layer, name), dtype)))
            for name in names
        ]
        for layer in (source, target)
    )
    if [value.tobytes() for value in held] == [value.tobytes() for value in derived]:
        return
    for name, value in zip(names, held, strict=True):
        setattr(target, name, keras.ops.convert_to_tensor(value, target.compute_dtype))
    warn_outside(
        f"'{source.name}' (Normalization) normalizes by an earlier mean and variance than those of "
        "its variables, and so does its copy. Once saved and loaded, it will use those of its "
        "variables; call its `finalize_state()` to use them now.",
        "masked_layers",
        "lottery_ticket_pruner",
    )


def _copy_optimizer(source: keras.Model, target: keras.Model) -> None:
    old, new = getattr(source, "optimizer", None), getattr(target, "optimizer", None)
    if old is None or new is None:
        return
    _keras.exclude_like(old, new, zip(source.variables, target.variables, strict=False))
    if not old.built:
        return
    if not new.built:
        new.build(target.trainable_variables)
    theirs = new.variables
    if not _keras.optimized_variables(old):
        # It is from an `.h5` file and has no slots; those of the copy keep their initial values.
        theirs = theirs[: len(old.variables)]
    if difference := _first_difference(old.variables, theirs):
        raise ValueError(
            f"The optimizer state of '{source.name}' does not fit the copy: {difference}. "
            "Compile the model again first with `model.compile(...)`."
        )
    for a, b in zip(old.variables, theirs, strict=True):
        _keras.match_devices(b, a)
        b.assign(np.array(keras.ops.convert_to_numpy(a)))


def held_by(model: keras.Model, *others: Any) -> Iterator[Any]:
    """Yields the functions, classes and objects with a config that a model refers to, each once.

    Args:
        model: A model.
        *others: Other objects to search.
    """
    seen: dict[int, Any] = {}  # Keeps the values alive, so that their ids are not reused.

    def inside(value: object) -> Iterator[Any]:
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
    """Returns the custom functions and classes of a model by name, for custom object scopes.

    This is for a custom `from_config` that looks up functions and classes by name itself. A name is
    left out if two objects share it or if Keras uses it too, because one object would then replace
    the other. In a general scope, the functions would also replace equal strings in configs.
    """
    found: dict[str, Any] = {}
    twice = set()
    for value in held_by(model, _keras.compile_arguments(model)):
        named = value if isinstance(value, types.FunctionType | type) else plain_class(value)
        if named.__module__.partition(".")[0] not in ("keras", "masked_layers"):
            name = _keras_configs.get_registered_name(named)
            if found.setdefault(name, named) is not named:
                twice.add(name)
    return {
        name: value for name, value in found.items() if name not in twice and not _is_of_keras(name)
    }


def _is_of_keras(name: str) -> bool:
    # Not with functions such as `keras.losses.get`, which would create an object of a custom class.
    return any(hasattr(module, name) for module in _NAMESPACES)


def renew_optimizer(model: keras.Model) -> None:
    """Replaces the optimizer with an unbuilt one, because other variables are trainable now."""
    old = getattr(model, "optimizer", None)
    if old is not None:
        with as_in_use(model):
            vars(model)["optimizer"] = type(old).from_config(old.get_config())
        _keras.exclude_like(old, model.optimizer, ((x, x) for x in model.variables))


def compile_with(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Compiles a compiled model again with another optimizer and otherwise the same arguments."""
    with as_in_use(model):
        config = model.get_compile_config()
        config["optimizer"] = keras.saving.serialize_keras_object(optimizer)
        model.compile_from_config(config)
    _keras.exclude_like(optimizer, model.optimizer, ((x, x) for x in model.variables))
