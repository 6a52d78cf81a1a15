"""Converts pruned models of TensorFlow Model Optimization to Keras 3, and imports the package.

Its schedules need no conversion: `lottery_ticket_pruner.schedules.get` accepts them. Importing this
module imports neither that package nor TensorFlow, and it works on every backend.
"""

from __future__ import annotations

import importlib
import inspect
import os
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import keras
import numpy as np

import masked_layers as ml

_SWITCH = "TF_USE_LEGACY_KERAS"
_WRAPPER = "PruneLowMagnitude"

# Arguments of Keras 2 that can be left out for Keras 3. Other unknown arguments are errors, unless
# they are switched off (False, None).
_IDLE: dict[str, tuple[Any, ...]] = {
    "groups": (1,),  # in layers that do not support more
    "batch_input_shape": (...,),
    "input_length": (...,),
    "implementation": (...,),  # how recurrent layers compute, not what
    "kernel_initializer": (...,),  # of separable convolutions, which have no kernel
    "query_shape": (...,),
    "key_shape": (...,),
    "value_shape": (...,),
    "trainable": (...,),  # of layers without weights
}
_RENAMED = {
    ("InputLayer", "batch_input_shape"): "batch_shape",
    ("LeakyReLU", "alpha"): "negative_slope",
}
_OF_EVERY_LAYER = {"name", "trainable", "dtype", "activity_regularizer"}
_CONTAINERS = {"Sequential", "Functional", "Model"}


def import_tfmot() -> ModuleType:
    """Imports `tensorflow_model_optimization` without side effects on the process.

    The package sets `TF_USE_LEGACY_KERAS=1` for the process and its children. If `tf.keras` has not
    been accessed yet, this turns it into Keras 2. Therefore this function accesses `tf.keras` first
    and restores the environment variable afterwards.

    Raises:
        ImportError: If the package is not installed.
    """
    before = os.environ.get(_SWITCH)
    try:
        import tensorflow as tf

        _ = tf.keras.__version__
        return importlib.import_module("tensorflow_model_optimization")
    except ImportError as error:
        raise ImportError(
            "TensorFlow Model Optimization cannot be imported. Install it: "
            "`pip install 'lottery-ticket-pruner[tfmot]'`."
        ) from error
    finally:
        if before is None:
            os.environ.pop(_SWITCH, None)
        else:
            os.environ[_SWITCH] = before


def from_tfmot(model: Any, custom_objects: Mapping[str, Any] | None = None) -> keras.Model:
    """Converts a pruned `tf_keras` model to a masked Keras 3 model with the same outputs.

    Weights wrapped by `prune_low_magnitude` get its masks. In a model without wrappers, as returned
    by `strip_pruning`, every maskable weight gets a mask, and zeros count as pruned.

    The result is not compiled, because the original optimizer belongs to Keras 2.

    Args:
        model: A built sequential or functional model of `tf_keras`.
        custom_objects: Keras 3 classes and functions by name, for everything that is not part of
            Keras. They must accept the configurations, and have the weights, of the objects with
            the same names in `model`.

    Returns:
        A new masked model. Its layers have their names without the wrappers.

    Raises:
        TypeError: If `model` is not a `tf_keras` model.
        ValueError: If the model is subclassed or not built, or if it has layers, arguments or
            weights that Keras 3 does not have. The message names all of these layers.
    """
    modules = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "tf_keras" not in modules:
        raise TypeError(
            "Expected a model of `tf_keras`. Received: "
            f"{type(model).__module__}.{type(model).__qualname__}. A model of Keras 3 needs no "
            "conversion: see `masked_layers.convert_to_masked`."
        )
    if not {"Sequential", "Functional"} & {base.__name__ for base in type(model).__mro__[:-1]}:
        raise ValueError(
            f"{model.name!r} is a subclassed model, whose code is for Keras 2. Only sequential and "
            "functional models can be converted. Rewrite the class for Keras 3 and `set_weights`."
        )
    if not model.built:
        raise ValueError(f"{model.name!r} is not built. Call it on a batch, or `build` it, first.")
    translation = _Translation(dict(custom_objects or {}))
    config = translation.model(model)
    translation.check(model.name)
    cls = keras.Sequential if _is_sequential(model) else keras.Model
    with keras.utils.custom_object_scope(translation.custom_objects):
        plain = cls.from_config(config)
    pairs = _Pairs()
    pairs.add(model, plain)
    pairs.check(model.name)
    for source, target in pairs.variables:
        target.assign(source.numpy())
    return _masked(plain, pairs)


def _is_sequential(model: object) -> bool:
    return "Sequential" in {base.__name__ for base in type(model).__mro__}


def _masked(plain: keras.Model, pairs: _Pairs) -> keras.Model:
    refs = ml.weight_refs(plain)
    if pairs.masks:
        targets = {id(source): id(target) for source, target in pairs.variables}
        paths = {id(ref.variable): ref.path for ref in refs}
        masks = {paths[targets[source]]: mask for source, mask in pairs.masks.items()}
    else:
        masks = {ref.path: keras.ops.convert_to_numpy(ref.variable) != 0 for ref in refs}
    holders = {id(ref.layer) for ref in refs if ref.path in masks}
    masked = ml.convert_to_masked(plain, include=lambda layer: id(layer) in holders)
    ml.set_masks(masked, masks)
    return masked


class _Translation:
    """Translates configurations of Keras 2 to Keras 3, and collects what cannot be translated."""

    def __init__(self, custom_objects: dict[str, Any]) -> None:
        self.custom_objects = custom_objects
        self._problems: list[str] = []

    def check(self, name: str) -> None:
        if self._problems:
            raise ValueError(
                f"{name!r} cannot be converted to a Keras 3 model:\n- "
                + "\n- ".join(self._problems)
                + "\nReplace these layers, or pass a Keras 3 class of the same name in "
                "`custom_objects`."
            )

    def model(self, model: Any) -> dict[str, Any]:
        """Returns the configuration of a model, with layer names as without wrappers."""
        config = _plain(model.get_config())
        layers = {layer.name: layer for layer in model.layers}
        renamed = {name: _unwrapped(layer).name for name, layer in layers.items()}
        config["layers"] = [
            self._entry(entry, layers.get(entry["config"]["name"])) for entry in config["layers"]
        ]
        if not _is_sequential(model):
            for entry in config["layers"]:
                entry["name"] = renamed.get(entry["name"], entry["name"])
                entry["inbound_nodes"] = [_node(n, renamed) for n in entry["inbound_nodes"]]
            for key in ("input_layers", "output_layers"):
                config[key] = _with_names(config[key], renamed)
        return config

    def _entry(self, entry: dict[str, Any], layer: Any) -> dict[str, Any]:
        names = ("name", "inbound_nodes")
        graph: dict[str, Any] = {key: entry[key] for key in names if key in entry}
        if entry["class_name"] == _WRAPPER:
            entry, layer = entry["config"]["layer"], _unwrapped(layer)
        if entry["class_name"] in _CONTAINERS and layer is not None:
            config = self.model(layer)
            name = "Sequential" if _is_sequential(layer) else "Functional"
            return {"module": "keras", "class_name": name, "config": config, **graph}
        return self._layer(entry, layer) | graph

    def _layer(self, entry: dict[str, Any], layer: Any) -> dict[str, Any]:
        name = entry["class_name"].rpartition(">")[2]
        config = dict(entry["config"])
        where = f"{config.get('name', '?')} ({name})"
        if name == "SyncBatchNormalization":
            name, config["synchronized"] = "BatchNormalization", True
        if name == "Lambda":
            self._lambda(config, layer, where)
        if name == "BatchNormalization" and isinstance(config.get("axis"), list):
            (config["axis"],) = config["axis"]
        own = self.custom_objects.get(name)
        cls = own or getattr(keras.layers, name, None)
        if cls is None:
            self._problems.append(f"{where}: Keras 3 does not have this layer")
            return entry
        if own is None:
            config = self._arguments(cls, name, config, where)
        for key, value in config.items():
            if key in ("layer", "backward_layer", "cell") and value:
                config[key] = self._entry(value, getattr(layer, key, None))
            elif key == "cells":
                config[key] = [self._entry(cell, None) for cell in value]
        module = {"registered_name": name} if own else {"module": "keras.layers"}
        return (
            {"module": None, "registered_name": None, "class_name": name}
            | module
            | {"config": config}
        )

    def _arguments(
        self, cls: type[keras.layers.Layer], name: str, config: dict[str, Any], where: str
    ) -> dict[str, Any]:
        parameters = inspect.signature(cls.__init__).parameters
        known = set(parameters)
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            known |= _OF_EVERY_LAYER
        arguments = {}
        for key, value in config.items():
            key = _RENAMED.get((name, key), key)
            if key == "dtype" and isinstance(value, dict):
                value = value["config"]["name"]
            if key in known:
                arguments[key] = value
            elif not (value is None or value is False or _is_idle(key, value)):
                self._problems.append(f"{where}: Keras 3 has no argument {key}={value!r} for it")
        return arguments

    def _lambda(self, config: dict[str, Any], layer: Any, where: str) -> None:
        """Replaces the serialized code of a Lambda layer by its function."""
        if layer is None:
            self._problems.append(f"{where}: a function inside another layer")
            return
        name = f"tfmot_function_of_{layer.name}"
        self.custom_objects[name] = layer.function
        config["function"] = {
            "module": "builtins",
            "class_name": "function",
            "config": name,
            "registered_name": "function",
        }
        for key in ("function_type", "module", "output_shape_type", "output_shape_module"):
            config.pop(key, None)


def _is_idle(key: str, value: object) -> bool:
    harmless = _IDLE.get(key, ())
    return harmless == (...,) or value in harmless


def _unwrapped(layer: Any) -> Any:
    return layer.layer if type(layer).__name__ == _WRAPPER else layer


def _is_reference(value: object) -> bool:
    """Returns True for a reference to a tensor in a graph: a layer name and two indices."""
    return (
        isinstance(value, list)
        and len(value) in (3, 4)
        and isinstance(value[0], str)
        and all(type(index) is int for index in value[1:3])
    )


def _with_names(value: Any, renamed: Mapping[str, str]) -> Any:
    """Returns references with renamed layers."""
    if _is_reference(value):
        return [renamed.get(value[0], value[0]), *value[1:]]
    if isinstance(value, list):
        return [_with_names(item, renamed) for item in value]
    if isinstance(value, dict):
        return {key: _with_names(item, renamed) for key, item in value.items()}
    return value


def _node(node: Any, renamed: Mapping[str, str]) -> dict[str, Any]:
    """Converts the call of a layer from the format of Keras 2 to that of Keras 3.

    Keras 2 stores the first argument as a reference, or a list or dict of references. Each of them
    may contain all further arguments as a fourth element.
    """
    arguments: dict[str, Any] = {}

    def tensors(value: Any) -> Any:
        if _is_reference(value):
            if len(value) == 4:
                arguments.update(value[3])
            history = [renamed.get(value[0], value[0]), *value[1:3]]
            config = {"shape": [], "dtype": "float32", "keras_history": history}
            return {"class_name": "__keras_tensor__", "config": config}
        if isinstance(value, list):
            return [tensors(item) for item in value]
        if isinstance(value, dict):
            return {key: tensors(item) for key, item in value.items()}
        return value

    first = tensors(node)
    if isinstance(first, list) and len(first) == 1:
        (first,) = first
    return {"args": [first], "kwargs": tensors(arguments)}


def _plain(value: object) -> Any:
    """Converts containers and scalars of Keras 2 to plain Python lists, dicts and values."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic) or (isinstance(value, np.ndarray) and value.ndim == 0):
        return value.item()
    return value


class _Pairs:
    """Pairs of variables of a Keras 2 and a Keras 3 model, and the masks of tfmot."""

    def __init__(self) -> None:
        self.variables: list[tuple[Any, keras.Variable]] = []
        self.masks: dict[int, np.ndarray] = {}
        self._problems: list[str] = []

    def check(self, name: str) -> None:
        if self._problems:
            raise ValueError(
                f"The weights of {name!r} do not fit the layers of Keras 3:\n- "
                + "\n- ".join(self._problems)
            )

    def add(self, source: Any, target: keras.layers.Layer) -> None:
        if type(source).__name__ == _WRAPPER:
            for variable, mask, _ in source.pruning_vars:
                self.masks[id(variable)] = mask.numpy().astype(bool)
            source = source.layer
        inner = self._inside(source, target)
        if inner is not None:
            for one, other in inner:
                self.add(one, other)
            return
        shapes = [tuple(variable.shape) for variable in source.weights]
        expected = [tuple(variable.shape) for variable in target.weights]
        if shapes != expected:
            self._problems.append(
                f"{source.name} ({type(source).__name__}): {shapes} in Keras 2, {expected} in 3"
            )
            return
        self.variables += zip(source.weights, target.weights, strict=True)

    def _inside(self, source: Any, target: keras.layers.Layer) -> list[tuple[Any, Any]] | None:
        """Returns pairs of inner layers, if the order of all weights may differ."""
        if isinstance(target, keras.Model):
            own = {layer.name: layer for layer in target.layers}
            return [(layer, own[_unwrapped(layer).name]) for layer in source.layers]
        if isinstance(target, keras.layers.Bidirectional):
            return [
                (source.forward_layer, target.forward_layer),
                (source.backward_layer, target.backward_layer),
            ]
        if isinstance(target, keras.layers.Wrapper):
            return [(source.layer, target.layer)]
        return None
