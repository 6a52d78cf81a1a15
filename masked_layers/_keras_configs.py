"""Private parts of Keras for configs: shared objects, and objects that have no name there.

`tests/masked_layers/test_keras.py` checks each function against the installed Keras.
"""

from __future__ import annotations

import collections.abc
import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras

# None of these has a public name.
from keras.src.backend.common import global_state
from keras.src.saving import object_registration, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.object_registration import get_registered_name as get_registered_name
from keras.src.saving.serialization_lib import ObjectSharingScope

Schedule = keras.optimizers.schedules.LearningRateSchedule
_WITHOUT_VARIABLES = (
    Schedule,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.losses.Loss,
)


def serialize(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the config of a layer or model in which shared objects are marked as shared.

    Outside `ObjectSharingScope`, which has no public name, a shared layer would be restored as two.
    """
    with ObjectSharingScope():
        return keras.saving.serialize_keras_object(layer)


def deserialize(config: dict[str, Any], *, safe_mode: bool = False) -> Any:
    """Recreates an object from the config that `serialize` returned.

    Args:
        config: The config.
        safe_mode: Whether to refuse `Lambda` layers, which contain code. They are allowed in a
            config that never left the process.
    """
    with ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, safe_mode=safe_mode)


@contextlib.contextmanager
def variables_made_last(*, keep: bool = True) -> Iterator[None]:
    """Creates variables without values in the scope, which get them at its end.

    If the scope ends with an error, no memory is allocated for them. Keras creates such variables
    in a `StatelessScope`; the list of them has no public name.

    Args:
        keep: Whether the variables are used after the scope. Otherwise they never get values.
    """
    waiting = "uninitialized_variables"
    earlier = global_state.get_global_attribute(waiting, [])
    global_state.set_global_attribute(waiting, [])
    try:
        with keras.StatelessScope(initialize_variables=False):
            yield
        if keep:
            with keras.StatelessScope():  # Its end initializes them.
                pass
    finally:
        global_state.set_global_attribute(waiting, earlier)


@contextlib.contextmanager
def custom_object_scope(custom_objects: dict[str, Any]) -> Iterator[None]:
    """Makes Keras find these objects first, and those of an outer scope after them.

    In Keras' own scope, the latest registration under a name takes precedence: if a class is
    defined again, as in a notebook, a copy would be of the new class. Keras' scope also hides an
    outer scope, which can be read only through a private name.
    """
    registered = keras.saving.get_custom_objects()
    hidden = {name: registered[name] for name in custom_objects if name in registered}
    registered.update({name: custom_objects[name] for name in hidden})
    outer = global_state.get_global_attribute("custom_objects_scope_dict", {})
    try:
        with keras.saving.custom_object_scope({**outer, **custom_objects}):
            yield
    finally:
        registered.update(hidden)


class _Names(collections.abc.MutableMapping[Any, str]):
    """Mapping from classes and functions to the unique names under which Keras serializes them.

    It replaces Keras' dict from objects to registered names. A custom object is registered under a
    new name when Keras asks for its name, unless its registered name already leads to it.
    """

    def __init__(self, registered: dict[Any, str]) -> None:
        self.registered = registered
        self.objects = keras.saving.get_custom_objects()
        self.made: dict[int, tuple[Any, str]] = {}
        self.kept: list[Any] = []
        self.kept_classes: set[type] = set()

    def __contains__(self, obj: object) -> bool:
        return obj in self.registered or obj in self.kept_classes or _has_own_name(obj)

    def __getitem__(self, obj: object) -> str:
        if isinstance(obj, type) and obj in self.kept_classes:
            return self.name(self)
        name = self.registered.get(obj)
        known = name is not None and keras.saving.get_registered_object(name) is obj
        return self.registered[obj] if known or not _has_own_name(obj) else self.name(obj)

    def __setitem__(self, obj: object, name: str) -> None:
        self.registered[obj] = name

    def __delitem__(self, obj: object) -> None:
        del self.registered[obj]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.registered)

    def __len__(self) -> int:
        return len(self.registered)

    def name(self, obj: object) -> str:
        """Returns a name under which Keras finds exactly this object."""
        if id(obj) not in self.made:
            # An equal string in a config would be replaced by the object, so it must be unusual.
            name = f"masked_layers>{getattr(obj, '__name__', 'kept')} {len(self.made)}"
            self.made[id(obj)] = (obj, name)
            self.objects[name] = obj
        return self.made[id(obj)][1]

    def keep(self, obj: object) -> dict[str, int]:
        """Returns a config for which `from_config` returns the object itself."""
        self.kept_classes.add(type(obj))
        self.kept.append(obj)
        return {"index": len(self.kept) - 1}

    def from_config(self, config: dict[str, int]) -> Any:
        return self.kept[config["index"]]

    def forget(self) -> None:
        """Unregisters the names."""
        for _, name in self.made.values():
            del self.objects[name]


def _is_of_a_user(obj: object) -> bool:
    """Returns whether a class or function is from outside Keras and this package."""
    package = (getattr(obj, "__module__", None) or "").partition(".")[0]
    return package not in ("keras", "masked_layers", "")


def _has_own_name(obj: object) -> bool:
    """Returns whether an object needs a unique name."""
    # Not the type of all functions, which Keras writes next to its own functions and looks up by
    # name.
    return obj is not types.FunctionType and _is_of_a_user(obj)


def _is_kept(obj: object) -> bool:
    """Returns whether an object without variables cannot be recreated from a config.

    This is true for callables without a config (a `partial`, a method, a compiled function) and for
    objects of custom classes that define a constructor but inherit Keras' `get_config`.
    """
    cls = type(obj)
    if isinstance(obj, type | types.FunctionType) or not _is_of_a_user(cls):
        return False
    if not hasattr(cls, "get_config"):
        # A method of a layer would still read the weights of the layer that it was taken from.
        return callable(obj) and not isinstance(getattr(obj, "__self__", None), KerasSaveable)
    if not isinstance(obj, _WITHOUT_VARIABLES):
        return False
    maker, describer = (
        next(base for base in cls.__mro__ if name in vars(base))
        for name in ("__init__", "get_config")
    )
    return describer is Schedule or cls.__mro__.index(maker) < cls.__mro__.index(describer)


@contextlib.contextmanager
def identity_scope() -> Iterator[None]:
    """Makes configs written and read in the scope refer to the very classes and functions in use.

    Keras writes the names of unregistered classes and functions. It then confuses two closures from
    one factory, or two classes with the same name, and does not find unregistered ones. Names are
    looked up in a dict that has no public name, and there is no hook for objects without a name.
    """
    names = _Names(object_registration.GLOBAL_CUSTOM_NAMES)
    place, config_of = _hook(names)
    plain = getattr(serialization_lib, place)
    object_registration.GLOBAL_CUSTOM_NAMES = names
    setattr(serialization_lib, place, config_of)
    try:
        yield
    finally:
        object_registration.GLOBAL_CUSTOM_NAMES = names.registered
        setattr(serialization_lib, place, plain)
        names.forget()


def _hook(names: _Names) -> tuple[str, Callable[[Any], Any]]:
    """Returns the name of the function of Keras that describes objects, and another one for it."""
    if hasattr(serialization_lib, "_get_class_or_fn_config"):  # before Keras 3.16
        plain = serialization_lib._get_class_or_fn_config

        def config_of(obj: Any) -> Any:
            if _is_kept(obj):
                return names.keep(obj)
            config = plain(obj)
            names.kept_classes.discard(type(obj))
            return config

        return "_get_class_or_fn_config", config_of
    serialize = serialization_lib.serialize_keras_object

    def serialized(obj: Any) -> Any:
        if _is_kept(obj):
            return serialization_lib.serialize_with_public_class(type(obj), names.keep(obj))
        names.kept_classes.discard(type(obj))
        return serialize(obj)

    return "serialize_keras_object", serialized


def state_goes_apart() -> bool:
    """Returns whether Keras saves the state next to the config: in a `.keras` file or a pickle.

    In these cases it marks shared objects, as `serialize` here does, which only a private name
    shows. `clone_model`, `to_json` and `.h5` files have only the config for state that is not in
    the weights.
    """
    return global_state.get_global_attribute("shared_objects/id_to_config_map") is not None
