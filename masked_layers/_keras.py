"""Everything that this package needs from Keras beyond its public API.

The docstring of each function says why the public API is not sufficient.
`tests/masked_layers/test_keras.py` checks each of them against the installed Keras, so that a
change in Keras is noticed there and not by a user.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras

# None of these has a public name.
from keras.src.backend.common import global_state
from keras.src.backend.common.stateless_scope import get_stateless_scope, in_stateless_scope
from keras.src.backend.common.variables import AutocastScope
from keras.src.layers.layer import CallContext
from keras.src.layers.rnn.conv_lstm import ConvLSTMCell as ConvLSTMCell
from keras.src.models.functional import Functional
from keras.src.random import seed_generator
from keras.src.utils.naming import to_snake_case as to_snake_case

NAME_ARGUMENTS = (
    "Keras records no shapes of inputs where `call` takes `*args` or hands on `**kwargs`: name the "
    "arguments, as in `call(self, inputs, training=None)`,"
)

# A second thread in `same_draws` would mistake the replacement for Keras' method.
_drawing = threading.RLock()

_thread = threading.local()


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


def carries_mask(tensor: Any) -> bool:
    """Returns whether a tensor, symbolic or not, carries a mask, as the output of `Masking` does.

    Keras has no public function for the masks that it passes from layer to layer and to losses.
    """
    return getattr(tensor, "_keras_mask", None) is not None


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


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Reads variables in their own dtype inside the scope, also in a call of mixed precision.

    Keras casts a variable whenever it is read in a call, and has no public way to read its value.
    """
    with AutocastScope(None):
        yield


def is_calling() -> bool:
    """Returns whether the code runs inside a call of any layer; the context is not public."""
    return global_state.get_global_attribute("current_call_ctx") is not None


@contextlib.contextmanager
def inference_scope() -> Iterator[None]:
    """Calls layers in the scope in inference, also where Keras calls them without `training`.

    Its exporters do, and then layers that train by default switch those after them to training. A
    call passes its mode on in a context that has no public name.
    """
    outer = global_state.get_global_attribute("current_call_ctx")
    context = CallContext(entry_layer=None)
    context.set_value("training", False)
    global_state.set_global_attribute("current_call_ctx", context)
    try:
        yield
    finally:
        global_state.set_global_attribute("current_call_ctx", outer)


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
    else:
        match_devices(variable, like)


def match_devices(variable: keras.Variable, like: keras.Variable) -> None:
    """Spreads `variable` over devices as `like`, under `keras.distribution` on JAX.

    A layout is chosen when a variable is created, by its path and the current distribution. The
    variables of a copy have other paths, and the copy may be made outside the scope.

    Args:
        variable: Variable to lay out.
        like: Variable of the same shape.
    """
    layout = getattr(like, "_layout", None)
    if layout is None and keras.backend.backend() == "jax" and like._value is None:
        # It is made later, as all variables of a ticket: its layout is chosen then.
        distribution = keras.distribution.distribution()
        layout = None if distribution is None else distribution.get_variable_layout(like)
    if layout is not None and layout is not variable._layout:
        variable._layout = layout
        if variable._value is not None:
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


class _Numbers:
    """Stands for the module `random` in Keras."""

    def __getattr__(self, name: str) -> Any:
        return getattr(getattr(_thread, "numbers", random), name)


@contextlib.contextmanager
def drawn_apart() -> Iterator[None]:
    """Lets the block make objects that draw their seeds without advancing the global generator.

    The seeds are those that they would draw otherwise. It is for objects whose values are replaced.
    Keras draws a seed for every layer that is made without one, from Python's global generator, and
    has no other source. To restore the state of this generator afterwards would repeat seeds that
    another thread has drawn in the meantime, so that two of its layers would start with equal
    weights. Other threads draw as before.
    """
    if not isinstance(seed_generator.python_random, _Numbers):
        seed_generator.python_random = _Numbers()
    outer = getattr(_thread, "numbers", None)
    numbers = random.Random()
    numbers.setstate(random.getstate() if outer is None else outer.getstate())
    _thread.numbers = numbers
    try:
        yield
    finally:
        if outer is None:
            del _thread.numbers
        else:
            _thread.numbers = outer


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


def cond(condition: Any, first: Callable[[], Any], second: Callable[[], Any]) -> Any:
    """Returns `first()` if a bool tensor is true, otherwise `second()`; see `keras.ops.cond`.

    Outside of a traced function, `ops.cond` on JAX would compile both branches at every call.
    """
    if keras.backend.backend() == "jax":
        import jax

        if not isinstance(condition, jax.core.Tracer):
            return first() if condition else second()
    return keras.ops.cond(condition, first, second)


def optimized_variables(optimizer: keras.Optimizer) -> list[keras.Variable]:
    """Returns the variables that a built optimizer updates, in its order, from a private list."""
    return list(optimizer._trainable_variables)


def exclude_like(
    old: keras.Optimizer,
    new: keras.Optimizer,
    variables: Iterable[tuple[keras.Variable, keras.Variable]],
) -> None:
    """Excludes from weight decay in one optimizer what `exclude_from_weight_decay` did in another.

    An optimizer's config does not include this, and no public attribute returns it.

    Args:
        old: The optimizer that was configured.
        new: An optimizer of the same class, built or not.
        variables: Pairs of a variable of `old` and the corresponding one of `new`.
    """
    excluded = getattr(old, "_exclude_from_weight_decay", None)
    if excluded is not None:
        pairs = list(variables)
        new._exclude_from_weight_decay = {
            new._var_key(theirs) for ours, theirs in pairs if old._var_key(ours) in excluded
        }
        new._exclude_from_weight_decay_pattern = old._exclude_from_weight_decay_pattern
        new._exclude_from_weight_decay_cache = {}
        variables = pairs
    if getattr(old, "inner_optimizer", None) is not None:
        exclude_like(old.inner_optimizer, new.inner_optimizer, variables)


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


def check_strategy(model: keras.Model, function: str = "convert_to_masked") -> None:
    """Checks that a model made under a TensorFlow distribution strategy is used in its scope.

    Variables created outside the scope would silently be plain variables that are not mirrored.

    Args:
        model: The model.
        function: Name of the function that would create them.

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
                f"same scope: `with strategy.scope(): masked = {function}(model)`."
            )


def export_signature(model: keras.Model, input_signature: Any = None) -> Any:
    """Returns the `tf.TensorSpec`s that `Model.export` uses for its serving function.

    The conversion of the four kinds of specs that Keras accepts has no public name. TensorFlow must
    be installed.
    """
    from keras.src.export import export_utils

    if input_signature is None:
        input_signature = export_specs(model)
    return keras.tree.map_structure(export_utils.make_tf_tensor_spec, input_signature)


def export_specs(model: keras.Model) -> Any:
    """Returns a `keras.InputSpec` for every input, in the structure of the arguments of `call`.

    The structure of a model's inputs has no public name.

    Raises:
        ValueError: If Keras knows no shapes.
    """
    from keras.src.export import export_utils

    # Being built is enough: a copy of a subclassed model knows its shapes before a call.
    called = model._called
    model._called = True
    try:
        return export_utils.get_input_signature(model)
    except ValueError as error:
        if not hides_inputs(model):
            raise
        raise ValueError(
            f"The shapes of the inputs of '{model.name}' are not known. {NAME_ARGUMENTS} or pass "
            "an `input_signature` to `export_sparse_saved_model`."
        ) from error
    finally:
        model._called = called


def hides_inputs(model: keras.Model) -> bool:
    """Returns whether Keras has no shapes of inputs because `call` takes any arguments."""
    if not model.built or getattr(model, "inputs", None):  # Those of a graph are known.
        return False
    if not takes_any_arguments(model):
        return False
    return not any((model.get_build_config() or {}).values())


def takes_any_arguments(layer: keras.layers.Layer) -> bool:
    """Returns whether `call` of a layer takes `*args` or `**kwargs`."""
    kinds = {parameter.kind for parameter in inspect.signature(layer.call).parameters.values()}
    return bool(kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD})


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

    Keras before 3.16 binds the method of the layer's original class to the layer, so the method of
    a class that the layer is given later would not be called. Later versions call that one.
    """
    if "quantize" in vars(layer):
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
