"""Everything that this package needs from Keras beyond its public API.

Each function says why the public API is not enough. Each is checked against the installed Keras by
`tests/lottery_ticket_pruner/test_keras.py`, so that a change in Keras is noticed there and not by a
user.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np

# None of these has a public name.
from keras.src.backend.common import dtypes

# Shared by both packages. Nothing else here comes from a private module of the other one.
from masked_layers._keras import (
    compile_arguments,
    drawn_apart,
    export_specs,
    flatten,
    input_specs,
    is_functional,
    match_layout,
    optimized_variables,
    own_variables,
    replaced,
    watch_slots,
)

__all__ = [
    "build_loss",
    "built_from",
    "compile_arguments",
    "double_precision",
    "drawn_apart",
    "export_specs",
    "flatten",
    "input_specs",
    "is_functional",
    "kept_on_error",
    "make_identity",
    "match_layout",
    "optimized_variables",
    "output_layers",
    "own_variables",
    "replaced",
    "seed_variables",
    "symbolic_build",
    "training_loss",
    "watch_slots",
    "withdrawn",
]


def make_identity(layer: keras.layers.Layer) -> None:
    """Makes a layer return its inputs. Only for layers of a copy that is not used elsewhere."""
    object.__setattr__(layer, "call", lambda inputs, mask=None: inputs)


@contextlib.contextmanager
def withdrawn(*groups: list[keras.Variable]) -> Iterator[tuple[list[Any], ...]]:
    """Temporarily removes the values of variables on JAX, as `fit` does, and yields them.

    A compiled step that receives a state must not read a variable instead, because the value would
    become a constant. There is no public way to remove the value of a `Variable`.
    """
    values = tuple([variable.value for variable in group] for group in groups)
    for group in groups:
        for variable in group:
            variable._value = None
    try:
        yield values
    finally:
        for group, old in zip(groups, values, strict=True):
            for variable, value in zip(group, old, strict=True):
                variable._value = value


@contextlib.contextmanager
def kept_on_error(model: keras.Model) -> Iterator[None]:
    """Restores the values of a model's variables on JAX if `fit` or `evaluate` fails.

    Both remove the values before the first step. After a later failure, `fit` restores the values
    that it has, and `evaluate` none. Keras has no public hook for when the values are removed.
    """
    purge = getattr(model, "_purge_model_variables", None)
    if purge is None:
        yield
        return
    held: list[tuple[keras.Variable, Any]] = []

    def hold_and_purge(**kwargs: Any) -> None:
        variables = model.variables + model.metrics_variables
        if isinstance(model.optimizer, keras.Optimizer):
            variables += model.optimizer.variables
        held[:] = [(variable, variable._value) for variable in variables]
        purge(**kwargs)

    with replaced(model, "_purge_model_variables", hold_and_purge):
        try:
            yield
        except BaseException:
            model.jax_state_sync()
            for variable, value in held:
                if variable._value is None:
                    variable._value = value
            raise
        finally:
            held.clear()


def symbolic_build(model: keras.Model, batch: tuple[Any, ...]) -> None:
    """Creates what `fit` creates before its first step: metrics and the optimizer's slots.

    Variables cannot be created in a compiled loop, and the only public way to create these is
    `fit`.
    """
    model._symbolic_build(data_batch=_symbolic(batch))
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def build_loss(model: keras.Model, batch: tuple[Any, ...]) -> None:
    """Creates what `evaluate` creates before its first step: the state of losses and metrics.

    It cannot be created in a compiled function. Keras would also build the optimizer.
    """
    with replaced(model, "optimizer", None):
        model._symbolic_build(data_batch=_symbolic(batch))


@contextlib.contextmanager
def built_from(model: keras.Model, batch_size: int, data: tuple[Any, ...]) -> Iterator[None]:
    """Lets `fit` and `evaluate` of a model under a TensorFlow strategy see the shapes of its data.

    Otherwise, every call takes a batch from an iterator made for this alone, and discards it. This
    takes longer than a small model's epoch, and TensorFlow 2.21 destroys the iterator while its
    background thread still reads from it, which can end the process with a segmentation fault.
    Keras has no argument or hook for the shapes.

    Args:
        model: A compiled model. Nothing is done if it is not distributed.
        batch_size: Number of examples per step, on all devices together.
        data: `(x, y)` or `(x, y, sample_weight)` as arrays, or None where there is none; or a
            `tf.data.Dataset` in place of x. Nothing is done for other data, of which only a batch
            shows the shapes.
    """
    strategy = getattr(model, "_distribute_strategy", None)
    if not hasattr(model, "_maybe_symbolic_build") or strategy is None:
        yield
        return
    if (spec := getattr(data[0], "element_spec", None)) is not None:
        batch = keras.utils.unpack_x_y_sample_weight(spec)
    elif all(map(_has_examples, keras.tree.flatten(data))):
        part = max(1, batch_size // strategy.num_replicas_in_sync)
        batch = keras.tree.map_structure(lambda array: array[:part], data, none_is_leaf=False)
    else:
        yield
        return

    def build(iterator: object = None, data_batch: object = None) -> None:
        with strategy.scope():
            model._symbolic_build(data_batch=_symbolic(batch))

    with replaced(model, "_maybe_symbolic_build", build):
        yield


def _has_examples(data: object) -> bool:
    return data is None or isinstance(data, np.ndarray) or keras.ops.is_tensor(data)


def _symbolic(batch: tuple[Any, ...]) -> tuple[Any, ...]:
    # Keras knows the type of texts only as that of tensors.
    return keras.tree.map_structure(
        lambda x: keras.KerasTensor(x.shape, "string") if x.dtype == object else x,
        batch,
        none_is_leaf=False,
    )


def training_loss(
    model: keras.Model, batch: tuple[Any, ...], adjust: Callable[[Any], Any] = lambda y_pred: y_pred
) -> Any:
    """Returns the loss of a forward pass in training mode, as `train_step` computes it.

    Keras does not publish which models take `training` in `call` and in `compute_loss`.

    Args:
        model: A compiled model.
        batch: `(x, y)` or `(x, y, sample_weight)` as tensors.
        adjust: Function that is applied to the outputs before the loss.
    """
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    y_pred = adjust(model(x, training=True) if model._call_has_training_arg else model(x))
    return model._compute_loss(x, y, y_pred, sample_weight, training=True)


def seed_variables(model: keras.Model) -> list[keras.Variable]:
    """Returns the states of all seed generators in a model, which are not among its weights."""
    generators = [seed for layer in flatten(model) for seed in layer._seed_generators]
    return list({id(seed.state): seed.state for seed in generators}.values())


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Temporarily lets float64 layers compute in float64, on every backend.

    New layers are float64 as well. JAX has no 64-bit types unless they are enabled. On JAX and
    torch, Keras also converts float64 to float32 when it determines the type of a result, by a
    table that has no public name.
    """
    with contextlib.ExitStack() as stack:
        narrowed = dtypes.BIT64_TO_BIT32_DTYPE["float64"]
        dtypes.BIT64_TO_BIT32_DTYPE["float64"] = "float64"
        stack.callback(dtypes.BIT64_TO_BIT32_DTYPE.update, float64=narrowed)
        stack.callback(keras.config.set_floatx, keras.config.floatx())
        stack.callback(keras.config.set_dtype_policy, keras.config.dtype_policy())
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        if keras.backend.backend() == "jax":
            import jax

            wide = jax.config.jax_enable_x64
            jax.config.update("jax_enable_x64", True)
            stack.callback(jax.config.update, "jax_enable_x64", wide)
        yield


def output_layers(model: keras.layers.Layer) -> list[Any]:
    """Returns the layers and operations that create the outputs of a model.

    Empty for a subclassed model. Keras does not publish which layer has created a tensor.
    """
    if isinstance(model, keras.Sequential):
        return model.layers[-1:]
    if is_functional(model):
        return [tensor._keras_history.operation for tensor in model.outputs]
    return []
