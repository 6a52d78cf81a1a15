"""Everything that this package needs from Keras beyond its public API.

The docstring of each function says why the public API is not sufficient.
`tests/masked_layers/test_keras.py` checks each of them against the installed Keras, so that a
change in Keras is noticed there and not by a user.
"""

from __future__ import annotations

import collections.abc
import contextlib
import functools
import itertools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import keras

# None of these has a public name.
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell
from keras.src.models.functional import Functional
from keras.src.saving import object_registration, serialization_lib
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.saving.object_registration import get_registered_name as get_registered_name
from keras.src.saving.serialization_lib import ObjectSharingScope
from keras.src.utils.naming import to_snake_case as to_snake_case

Schedule = keras.optimizers.schedules.LearningRateSchedule
_WITHOUT_VARIABLES = (
    Schedule,
    keras.initializers.Initializer,
    keras.regularizers.Regularizer,
    keras.constraints.Constraint,
    keras.losses.Loss,
)
# A second thread in `same_draws` would mistake the replacement for Keras' method.
_drawing = threading.RLock()


def is_functional(layer: keras.layers.Layer) -> bool:
    """Returns whether a layer is a model defined by a graph of layers, including subclasses."""
    return isinstance(layer, Functional)


def is_plain_container(layer: keras.layers.Layer) -> bool:
    """Returns whether the layer's config contains the full configs of all its inner layers."""
    plain = (
        Functional,
        keras.Sequential,
        keras.layers.TimeDistributed,
        keras.layers.RNN,
        keras.layers.StackedRNNCells,
    )
    return type(layer) in plain


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that `layer` tracks directly.

    `Layer` has no public list of its children (only `Model.layers` exists).
    """
    return list(layer._layers)


def order_sublayers(layer: keras.layers.Layer, order: list[keras.layers.Layer]) -> None:
    """Changes the order in which `layer` tracks some of its layers; others keep their places.

    `weights` and `variables` follow this order. Layers in a set have no fixed order, so a copy can
    differ from its original. Keras has no public way to change the order.
    """
    wanted = {id(child) for child in order}
    places = [i for i, child in enumerate(layer._layers) if id(child) in wanted]
    for i, child in zip(places, order, strict=True):
        layer._layers[i] = child


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Allows adding state to a built layer.

    Keras locks a layer once it is built. There is no public way to add a child layer later, which
    masking a built layer requires. `Layer.enable_lora` does the same inside Keras.
    """
    tracker = layer._tracker
    locked = tracker.locked
    tracker.unlock()
    try:
        yield
    finally:
        if locked:
            tracker.lock()


def untrack(layer: keras.layers.Layer, name: str) -> None:
    """Removes the child layer `name` from `layer` completely.

    `del layer.name` removes the attribute but leaves the child among the tracked layers.
    """
    child = getattr(layer, name)
    layer._tracker.untrack(child)
    with unlocked(layer):
        delattr(layer, name)


def untrack_variable(layer: keras.layers.Layer, name: str) -> None:
    """Removes the variable `name` from the state of `layer` but keeps the attribute.

    `add_weight` has no inverse. Keras' quantization and LoRA untrack variables in the same way.
    """
    layer._untrack_variable(getattr(layer, name))


def is_training() -> bool:
    """Returns whether the code runs inside a call in training mode.

    A layer gets the mode as an argument of its `call`. An attribute that is read in the call, such
    as a kernel, can find it only in the call context, which has no public name.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return bool(getattr(context, "training", None))


def is_calling() -> bool:
    """Returns whether the code runs inside a call of any layer; the context is not public."""
    return global_state.get_global_attribute("current_call_ctx") is not None


@contextlib.contextmanager
def layer_scope(layer: keras.layers.Layer) -> Iterator[None]:
    """Gives variables created in the scope paths below the path of a built layer.

    `keras.name_scope` takes one name at a time and starts from the current scope, which depends on
    the layers that are being built at the moment.
    """
    outer = global_state.get_global_attribute("name_scope_stack")
    global_state.set_global_attribute("name_scope_stack", [])
    try:
        with contextlib.ExitStack() as stack:
            for name in (layer.path or layer.name).split("/"):
                stack.enter_context(keras.name_scope(name))
            yield
    finally:
        global_state.set_global_attribute("name_scope_stack", outer)


def match_layout(variable: keras.Variable, like: keras.Variable) -> None:
    """Gives `variable` the layout of `like`: in memory on torch, over devices on JAX.

    `torch.where(mask, weight, 0)` uses the strides of its first operand, and a product with a
    row-major copy of a column-major kernel differs in the last bit. Under
    `keras.distribution.ModelParallel` the layout of a variable is chosen by patterns for its path,
    which are written for the weights of layers, and it is stored in a private attribute.

    Args:
        variable: Variable to lay out.
        like: Variable of the same shape.
    """
    if keras.backend.backend() == "torch":
        import torch

        with torch.no_grad():
            ordered = torch.empty_like(like.value, dtype=variable.value.dtype)
            variable.value.data = ordered.copy_(variable.value.data)
    elif getattr(like, "_layout", None) is not None:
        variable._layout = like._layout
        variable.assign(variable.value)


def refresh_parameters(layer: keras.layers.Layer) -> None:
    """Registers the current variables of a layer and its inner layers with `torch.nn.Module`.

    On torch, Keras lists a layer's variables as module parameters when the layer is built; masks
    attached later would be missing from `state_dict()` and from `.to(device)`.
    """
    if keras.backend.backend() == "torch":
        for inner in layer._flatten_layers():
            if hasattr(inner, "_torch_params"):
                inner._track_variables()


def serialize(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the config of a layer or model in which shared objects are marked as shared.

    Outside `ObjectSharingScope`, which has no public name, a shared layer would be restored as two.
    """
    with ObjectSharingScope():
        return keras.saving.serialize_keras_object(layer)


def deserialize(config: dict[str, Any]) -> Any:
    """Recreates an object from the config that `serialize` returned.

    `Lambda` layers are allowed, because the config never left the process.
    """
    with ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, safe_mode=False)


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
    plain_config = serialization_lib._get_class_or_fn_config

    def config_of(obj: Any) -> Any:
        if _is_kept(obj):
            return names.keep(obj)
        config = plain_config(obj)
        names.kept_classes.discard(type(obj))
        return config

    object_registration.GLOBAL_CUSTOM_NAMES = names
    serialization_lib._get_class_or_fn_config = config_of
    try:
        yield
    finally:
        object_registration.GLOBAL_CUSTOM_NAMES = names.registered
        serialization_lib._get_class_or_fn_config = plain_config
        names.forget()


def state_goes_apart() -> bool:
    """Returns whether Keras saves the state next to the config: in a `.keras` file or a pickle.

    In these cases it marks shared objects, as `serialize` here does, which only a private name
    shows. `clone_model`, `to_json` and `.h5` files have only the config for state that is not in
    the weights.
    """
    return global_state.get_global_attribute("shared_objects/id_to_config_map") is not None


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Makes Keras' seed generators return the same seeds each time, in the order of the calls.

    A copy may lack the state of a generator that its layer does not track, and there is no hook for
    the method that returns seeds. Other threads get their usual seeds.
    """
    generator, thread, count = keras.random.SeedGenerator, threading.get_ident(), itertools.count()
    with _drawing:
        real = generator.next

        def next_seed(self: keras.random.SeedGenerator, ordered: bool = True) -> Any:
            if threading.get_ident() != thread:
                return real(self, ordered)
            return keras.ops.convert_to_tensor([0, next(count)], self.state.dtype)

        generator.next = next_seed
        try:
            yield
        finally:
            generator.next = real


def own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    """Returns the layer's own weights; `Layer.weights` also has those of inner layers."""
    return list(layer._trainable_variables + layer._non_trainable_variables)


def sync(model: keras.layers.Layer) -> None:
    """Writes the state of a running JAX training loop back to the model's variables.

    On JAX, `fit` works on a separate copy of the state. Without this call, a value that is assigned
    in `on_train_batch_end` is lost, and a value that is read there is outdated. On other backends
    nothing happens.

    Args:
        model: A Keras model, which may be training.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def is_withdrawn(variable: keras.Variable) -> bool:
    """Returns whether Keras has removed the value of a variable during a JAX `fit`.

    On JAX, `fit` passes the state to its compiled step and empties the variables in the meantime.
    Inside the step they have values only in the scope of the forward pass.
    """
    return (
        keras.backend.backend() == "jax"
        and variable._value is None
        and variable._initializer is None  # Otherwise it is new and not initialized yet.
        and in_stateless_scope()
        and get_stateless_scope().get_current_value(variable) is None
    )


def is_lent(variable: keras.Variable) -> bool:
    """Returns whether a variable on JAX has a value that was passed to the current scope."""
    return (
        keras.backend.backend() == "jax"
        and in_stateless_scope()
        and get_stateless_scope().get_current_value(variable) is not None
    )


def optimized_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the variables that a built optimizer updates, in its order, from a private list."""
    return list(optimizer._trainable_variables)


def watch_slots(
    optimizer: keras.Optimizer, note: Callable[[keras.Variable, keras.Variable], None]
) -> None:
    """Calls `note(variable, slot)` for each slot that an optimizer creates from now on.

    Slots are the variables that an optimizer keeps for each trained variable, such as its momentum.
    An optimizer does not say which slot belongs to which variable, and slot names are not unique.

    Args:
        optimizer: An optimizer that is not built yet. Optimizers inside it are watched as well.
        note: The function to call.
    """
    add = optimizer.add_variable_from_reference

    def add_and_note(
        reference_variable: keras.Variable, *args: Any, **kwargs: Any
    ) -> keras.Variable:
        slot = add(reference_variable, *args, **kwargs)
        note(reference_variable, slot)
        return slot

    object.__setattr__(optimizer, "add_variable_from_reference", add_and_note)
    inner = getattr(optimizer, "inner_optimizer", None)  # of LossScaleOptimizer
    for each in getattr(optimizer, "optimizers", [inner] if inner else []):  # of MultiOptimizer
        watch_slots(each, note)


def flatten(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns a layer and all layers inside it, masks included."""
    return list(layer._flatten_layers())


def compile_arguments(model: keras.Model) -> list[Any]:
    """Returns the arguments of `compile`: optimizer, losses and metrics as the user passed them.

    The config that the public `get_compile_config` returns has names in place of the objects.
    """
    config = getattr(model, "_compile_config", None)
    return [] if config is None else list(config.config.values())


def check_strategy(model: keras.Model) -> None:
    """Checks that a model made under a TensorFlow distribution strategy is used in its scope.

    Variables created outside the scope would silently be plain variables that are not mirrored.

    Raises:
        ValueError: If a variable of the model is distributed and no strategy is in scope.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not tf.distribute.has_strategy() and any(
            isinstance(variable.value, tf.distribute.DistributedValues)
            for variable in model.variables
        ):
            raise ValueError(
                f"'{model.name}' was created under a `tf.distribute` strategy. Convert it in the "
                "same scope: `with strategy.scope(): masked = convert_to_masked(model)`."
            )


def export_signature(model: keras.Model, input_signature: Any = None) -> Any:
    """Returns the `tf.TensorSpec`s that `Model.export` uses for its serving function.

    The structure of a model's inputs and the conversion of the four kinds of specs that Keras
    accepts have no public name. TensorFlow must be installed.
    """
    from keras.src.export import export_utils

    if input_signature is None:
        # Being built is enough: a copy of a subclassed model knows its shapes before a call.
        called = model._called
        model._called = True
        try:
            input_signature = export_utils.get_input_signature(model)
        finally:
            model._called = called
    return keras.tree.map_structure(export_utils.make_tf_tensor_spec, input_signature)


def copy_called(source: keras.Model, target: keras.Model) -> None:
    """Makes a copy exportable if the original is.

    Keras' exporters refuse a model that was never called, which a private flag records.
    """
    target._called = source._called


def input_specs(model: keras.Model) -> Any:
    """Returns a symbolic tensor for each input, in the structure that the model accepts.

    Neither this structure nor the inputs of a subclassed model are public. The single input of a
    subclassed model has the shape with which the model was built.

    Raises:
        ValueError: If Keras does not know the shapes.
    """
    if getattr(model, "inputs", None):
        structure = getattr(model, "_inputs_struct", model.inputs[0])
        return keras.tree.map_structure(
            lambda tensor: keras.KerasTensor(tensor.shape, tensor.dtype), structure
        )
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ValueError(f"The input shapes of '{model.name}' are not known.")
    return keras.KerasTensor(shape, model.compute_dtype)


def call_when_built(
    layer: keras.layers.Layer, built: Callable[[], None], restored: Callable[[], None]
) -> None:
    """Calls a function after a layer is built, in either of two ways.

    Keras has no hook for this. The `build` method of a new class would not be called, because the
    method of the layer's original class is bound to the layer.

    Args:
        layer: A layer that is not built yet.
        built: Called at the end of `build`.
        restored: Called at the end of `build_from_config`, which builds a model without a `build`
            method by calling it. `build` is then not called, and `built` is set only later.
    """
    build, build_from_config = layer.build, layer.build_from_config

    @functools.wraps(build)
    def build_and_call(*args: Any, **kwargs: Any) -> None:
        build(*args, **kwargs)
        built()

    @functools.wraps(build_from_config)
    def restore_and_call(config: dict[str, Any]) -> None:
        build_from_config(config)
        restored()

    layer.build = build_and_call
    layer.build_from_config = restore_and_call


def bind_quantize(layer: keras.layers.Layer, quantize: Callable[..., None]) -> None:
    """Replaces the `quantize` method of a layer.

    Keras binds the method of the layer's original class to the layer, so the method of a class that
    the layer is given later would not be called.
    """
    vars(layer)["_plain_quantize"] = vars(layer)["quantize"]
    vars(layer)["quantize"] = quantize


def unbind_quantize(layer: keras.layers.Layer) -> None:
    """Undoes `bind_quantize`, if it was called for the layer."""
    if "_plain_quantize" in vars(layer):
        vars(layer)["quantize"] = vars(layer).pop("_plain_quantize")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Temporarily replaces an attribute, such as a method, of a model, layer or optimizer.

    Keras' `__setattr__` would track the value, or treat it as a change of the object. Methods are
    replaced where Keras has no hook; the callers give the reasons.

    Args:
        owner: The model, layer or optimizer.
        name: Name of the attribute. If only the class has it, the object gets it temporarily.
        value: Value of the attribute inside the block.
    """
    own, before = name in vars(owner), vars(owner).get(name)
    object.__setattr__(owner, name, value)
    try:
        yield
    finally:
        if own:
            object.__setattr__(owner, name, before)
        else:
            object.__delattr__(owner, name)
