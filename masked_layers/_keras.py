"""Everything this library needs from Keras beyond its public API, in one place.

Each function says why the public API does not do; `tests/masked_layers/test_keras.py` checks each
of them against the installed Keras, so that a move upstream is noticed there and not by a user.
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
# Two threads in `same_draws` would take what the other has put there for Keras' own.
_drawing = threading.RLock()


def is_functional(layer: keras.layers.Layer) -> bool:
    """True for models defined by a graph of layers, subclasses included."""
    return isinstance(layer, Functional)


def is_plain_container(layer: keras.layers.Layer) -> bool:
    """True where the layer's own config holds the full config of every layer inside it."""
    plain = (
        Functional,
        keras.Sequential,
        keras.layers.TimeDistributed,
        keras.layers.RNN,
        keras.layers.StackedRNNCells,
    )
    return type(layer) in plain


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the layers that `layer` tracks itself.

    `Layer` has no public list of its children (only `Model.layers` exists).
    """
    return list(layer._layers)


def order_sublayers(layer: keras.layers.Layer, order: list[keras.layers.Layer]) -> None:
    """Makes `layer` track layers of its own in another order; others keep their places.

    The order of `weights` and `variables` is that of the layers, and that of layers in a set is
    left to chance: a copy has another one than its original. Keras has no public way to change it.
    """
    wanted = {id(child) for child in order}
    places = [i for i, child in enumerate(layer._layers) if id(child) in wanted]
    for i, child in zip(places, order, strict=True):
        layer._layers[i] = child


@contextlib.contextmanager
def unlocked(layer: keras.layers.Layer) -> Iterator[None]:
    """Allows new state on a built layer.

    Keras locks a layer once it is built; there is no public way to add a child layer later, which
    is what masking a built layer means. `Layer.enable_lora` does the same inside Keras.
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
    """Removes the child layer `name` from `layer` altogether.

    `del layer.name` removes the attribute but leaves the child among the tracked layers.
    """
    child = getattr(layer, name)
    layer._tracker.untrack(child)
    with unlocked(layer):
        delattr(layer, name)


def untrack_variable(layer: keras.layers.Layer, name: str) -> None:
    """Removes the variable `name` from the state of `layer`, and leaves the attribute.

    `add_weight` has no inverse; Keras' quantization and LoRA untrack variables in the same way.
    """
    layer._untrack_variable(getattr(layer, name))


def is_training() -> bool:
    """True inside a call in training mode.

    A layer gets the mode as an argument of its `call`; an attribute that is read there, as a kernel
    is, can learn it only from the context of the call, which has no public name.
    """
    context = global_state.get_global_attribute("current_call_ctx")
    return bool(getattr(context, "training", None))


def is_calling() -> bool:
    """True inside the call of any layer, which has no public name either."""
    return global_state.get_global_attribute("current_call_ctx") is not None


@contextlib.contextmanager
def layer_scope(layer: keras.layers.Layer) -> Iterator[None]:
    """Gives variables created inside it paths below the path of a built layer.

    `keras.name_scope` takes one name at a time and starts from the current scope, which depends on
    what is being built around the layer at the moment.
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
    """Lays out `variable` as `like`, of the same shape: in memory on torch, over devices on JAX.

    `torch.where(mask, weight, 0)` takes the strides of its first operand, and a product with a
    row-major copy of a column-major kernel differs in the last bit. Under
    `keras.distribution.ModelParallel` the layout of a variable follows from its path, by patterns
    that are written for the weights of layers, and is kept where there is no public access.
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
    """Makes `torch.nn.Module` see the current variables of a layer and of all inside it.

    On torch, Keras lists a layer's variables as module parameters when the layer is built; masks
    attached later would be missing from `state_dict()` and from `.to(device)`.
    """
    if keras.backend.backend() == "torch":
        for inner in layer._flatten_layers():
            if hasattr(inner, "_torch_params"):
                inner._track_variables()


def serialize(layer: keras.layers.Layer) -> dict[str, Any]:
    """Returns the config of a layer or model in which shared objects are marked as shared.

    Outside `ObjectSharingScope`, which has no public name, a layer held twice comes back as two.
    """
    with ObjectSharingScope():
        return keras.saving.serialize_keras_object(layer)


def deserialize(config: dict[str, Any]) -> Any:
    """Inverse of `serialize`; `Lambda` layers are allowed, as the config never left the process."""
    with ObjectSharingScope():
        return keras.saving.deserialize_keras_object(config, safe_mode=False)


@contextlib.contextmanager
def custom_object_scope(custom_objects: dict[str, Any]) -> Iterator[None]:
    """Lets Keras find these objects first, and those of an outer scope after them.

    In the scope that Keras has, whatever was registered under a name last goes before them: after
    the definition of a class is run again, as in a notebook, a copy would be of the new class. And
    it hides the outer scope, which only a private name reads.
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


class _Names(collections.abc.MutableMapping):
    """The names that Keras serializes classes and functions by, each with a name of its own.

    It stands in for the dict from object to registered name. What is not of Keras is registered
    under a new name the moment Keras asks for it, unless its registered name leads to it already.
    """

    def __init__(self, registered: dict[Any, str]) -> None:
        self.registered = registered
        self.objects = keras.saving.get_custom_objects()
        self.made: dict[int, tuple[Any, str]] = {}
        self.kept: list[Any] = []
        self.kept_classes: set[type] = set()

    def __contains__(self, obj: Any) -> bool:
        return obj in self.registered or obj in self.kept_classes or _has_own_name(obj)

    def __getitem__(self, obj: Any) -> str:
        if isinstance(obj, type) and obj in self.kept_classes:
            return self.name(self)
        name = self.registered.get(obj)
        known = name is not None and keras.saving.get_registered_object(name) is obj
        return name if known or not _has_own_name(obj) else self.name(obj)

    def __setitem__(self, obj: Any, name: str) -> None:
        self.registered[obj] = name

    def __delitem__(self, obj: Any) -> None:
        del self.registered[obj]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.registered)

    def __len__(self) -> int:
        return len(self.registered)

    def name(self, obj: Any) -> str:
        """Returns a name under which Keras finds this very object."""
        if id(obj) not in self.made:
            # No string in a config looks like it: one that does would be replaced by the object.
            name = f"masked_layers>{getattr(obj, '__name__', 'kept')} {len(self.made)}"
            self.made[id(obj)] = (obj, name)
            self.objects[name] = obj
        return self.made[id(obj)][1]

    def keep(self, obj: Any) -> dict[str, int]:
        """Returns a config of which `from_config` makes the object itself."""
        self.kept_classes.add(type(obj))
        self.kept.append(obj)
        return {"index": len(self.kept) - 1}

    def from_config(self, config: dict[str, int]) -> Any:
        return self.kept[config["index"]]

    def forget(self) -> None:
        """Takes the names back."""
        for _, name in self.made.values():
            del self.objects[name]


def _is_of_a_user(obj: Any) -> bool:
    """True for classes and functions that are neither of Keras nor of this package."""
    package = (getattr(obj, "__module__", None) or "").partition(".")[0]
    return package not in ("keras", "masked_layers", "")


def _has_own_name(obj: Any) -> bool:
    """True for what must be told apart from others of its name."""
    # Not the class of all functions: Keras writes it beside its own, and looks those up by name.
    return obj is not types.FunctionType and _is_of_a_user(obj)


def _is_kept(obj: Any) -> bool:
    """True for an object without variables of which a config would not make the same one.

    Those are callables without a config (a `partial`, a method, a compiled function) and objects of
    a user's class that has a constructor of its own and the `get_config` of Keras.
    """
    cls = type(obj)
    if isinstance(obj, type | types.FunctionType) or not _is_of_a_user(cls):
        return False
    if not hasattr(cls, "get_config"):
        # A method of a layer would go on reading the weights of the layer that it was taken from.
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
    """Lets configs made and read inside it stand for the very classes and functions in use.

    Keras writes their names, unless they are registered: two closures of one factory, or two
    classes of one name, become one, and it finds none that is not registered. Names are looked up
    in a dict that has no public name, and objects without a name have no hook at all.
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
    """True while Keras writes a config beside which the state goes: to a `.keras` file, a pickle.

    It marks shared objects then, as `serialize` here does. `clone_model`, `to_json` and `.h5` files
    have nothing but the config for state that is not among the weights. No public name tells.
    """
    return global_state.get_global_attribute("shared_objects/id_to_config_map") is not None


@contextlib.contextmanager
def same_draws() -> Iterator[None]:
    """Lets every generator of Keras give the same seeds each time, in the order of the calls.

    A copy need not have the state of a generator that its layer does not track, and layers ask a
    generator for seeds by a method of its class, without a hook. Other threads get seeds as ever.
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
    """Returns the weights that the layer holds itself; `Layer.weights` adds those inside it."""
    return list(layer._trainable_variables + layer._non_trainable_variables)


def sync(model: keras.layers.Layer) -> None:
    """Brings the state of a JAX training loop that is under way back into the variables.

    `fit` on JAX works on its own copy of the state. Without this a value assigned in
    `on_train_batch_end` is lost, and one read there is stale.
    """
    if hasattr(model, "jax_state_sync"):
        model.jax_state_sync()


def is_withdrawn(variable: keras.Variable) -> bool:
    """True where Keras has taken the value out of a variable for the time of a JAX `fit`.

    `fit` on JAX hands the state to its compiled step and empties the variables meanwhile; inside
    the step they have values only in the scope of the forward pass.
    """
    return (
        keras.backend.backend() == "jax"
        and variable._value is None
        and variable._initializer is None  # Otherwise it is a new one, not initialized yet.
        and in_stateless_scope()
        and get_stateless_scope().get_current_value(variable) is None
    )


def is_lent(variable: keras.Variable) -> bool:
    """True where the value of a variable on JAX is one that the current scope was given for it."""
    return (
        keras.backend.backend() == "jax"
        and in_stateless_scope()
        and get_stateless_scope().get_current_value(variable) is not None
    )


def optimized_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the variables that a built optimizer is for, in its order: a private list."""
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
    """Returns what `compile` was given: optimizer, losses and metrics as the user passed them.

    The config that the public `get_compile_config` returns has names in place of the objects.
    """
    config = getattr(model, "_compile_config", None)
    return [] if config is None else list(config.config.values())


def check_strategy(model: keras.Model) -> None:
    """Refuses a model made under a TensorFlow distribution strategy outside of its scope.

    Variables created there would be plain ones, silently, and would not be mirrored.

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
                f"'{model.name}' was made under a `tf.distribute` strategy. Convert it in the same "
                "scope: `with strategy.scope(): masked = convert_to_masked(model)`."
            )


def export_signature(model: keras.Model, input_signature: Any = None) -> Any:
    """Returns the `tf.TensorSpec`s that `Model.export` gives to its serving function.

    The structure of a model's inputs and the conversion of the four kinds of specs that Keras takes
    have no public name. TensorFlow must be installed.
    """
    from keras.src.export import export_utils

    if input_signature is None:
        # Built is enough: a copy of a subclassed model knows its shapes before its first call.
        called = model._called
        model._called = True
        try:
            input_signature = export_utils.get_input_signature(model)
        finally:
            model._called = called
    return keras.tree.map_structure(export_utils.make_tf_tensor_spec, input_signature)


def copy_called(source: keras.Model, target: keras.Model) -> None:
    """Lets a copy be exported where the original can be.

    Keras' exporters refuse a model that was never called, and it keeps that in a private flag.
    """
    target._called = source._called


def input_specs(model: keras.Model) -> Any:
    """Returns a symbolic tensor for each input, in the structure that the model takes.

    The structure has no public name, nor have the inputs of a subclassed model: its one input has
    the shape that it was built with.

    Raises:
        ValueError: If Keras does not know.
    """
    if getattr(model, "inputs", None):
        structure = getattr(model, "_inputs_struct", model.inputs[0])
        return keras.tree.map_structure(
            lambda tensor: keras.KerasTensor(tensor.shape, tensor.dtype), structure
        )
    shape = (model.get_build_config() or {}).get("input_shape")
    if shape is None:
        raise ValueError(f"The shapes of the inputs of '{model.name}' are not known.")
    return keras.KerasTensor(shape, model.compute_dtype)


def call_when_built(
    layer: keras.layers.Layer, built: Callable[[], None], restored: Callable[[], None]
) -> None:
    """Calls a function whenever a layer has been built, by whichever of two ways.

    Keras has no hook behind them. A `build` of a new class of the layer would not be called: the
    one of the class that the layer was made with is bound to it.

    Args:
        layer: A layer that is not built yet.
        built: Called at the end of `build`.
        restored: Called at the end of `build_from_config`. A model without a `build` of its own is
            built by running it there: `build` is not called, and the model is `built` only later.
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
    """Gives a layer another `quantize` than that of the class it was made with.

    Keras binds that one to each layer that it makes, so that a method of another class, which the
    layer has been given since, would not be called.
    """
    vars(layer)["_plain_quantize"] = vars(layer)["quantize"]
    vars(layer)["quantize"] = quantize


def unbind_quantize(layer: keras.layers.Layer) -> None:
    """Takes `bind_quantize` back, if the layer has been given another method."""
    if "_plain_quantize" in vars(layer):
        vars(layer)["quantize"] = vars(layer).pop("_plain_quantize")


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a model, layer or optimizer another attribute inside the block, such as a method.

    Keras' own `__setattr__` would track the value, or take it for a change of the object. Where a
    method is replaced, the reason is that Keras has no hook at its place; the caller says which.

    Args:
        owner: The object.
        name: The attribute. The object gets one of its own where only its class has it.
        value: What it is inside the block.
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
