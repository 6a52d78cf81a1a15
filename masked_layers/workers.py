"""Replicas and processes that train one model together, and must agree on its masks."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

if TYPE_CHECKING:
    import tensorflow as tf


def devices_of(variable: keras.Variable) -> contextlib.AbstractContextManager[Any]:
    """Creates variables in the scope on all devices that a variable is on.

    Models know the strategy that they were made under, but not the layers inside them.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if isinstance(variable.value, tf.distribute.DistributedValues):
            return variable.value.distribute_strategy.scope()
    return contextlib.nullcontext()


def check_agreement(variable: keras.Variable, arrays: Iterable[Any], what: str) -> None:
    """Checks that all workers of a TensorFlow strategy are about to assign the same arrays.

    An assignment changes the copies of a variable in its own process only. Different values would
    stay different, without an error, for the rest of the training. All workers must call this.
    Without further workers nothing happens.

    Args:
        variable: A variable of the model.
        arrays: Arrays or tensors, in the same order on every worker.
        what: Name of the arrays, for the message.

    Raises:
        ValueError: If they differ. Every worker gets it.
    """
    strategy = _strategy_with_other_workers(variable)
    if strategy is None:
        return
    import tensorflow as tf

    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(array)).tobytes())
    own = np.frombuffer(digest.digest(), "int64")
    values = strategy.experimental_distribute_values_from_function(lambda _: tf.constant(own[None]))
    found = strategy.gather(values, axis=0).numpy()
    if (found != found[0]).any():
        raise ValueError(
            f"The workers of the strategy have different {what}, and nothing was changed. Each "
            "worker decides for itself, so all must do the same: with the same `data` (not each "
            "its part), seeds and recorded weights, and the same random numbers for new models "
            "(`keras.utils.set_random_seed`)."
        )


def check_outside_replicas(method: str) -> None:
    """Raises an error inside a function that `strategy.run` calls for each replica.

    Args:
        method: What was called, for the message.

    Raises:
        ValueError: If it was called there.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.distribute.has_strategy() and not tf.distribute.in_cross_replica_context():
            raise ValueError(
                f"`{method}` was called inside `strategy.run`, where every replica would decide "
                "for itself. Call it between two calls of `strategy.run`."
            )


def check_outside_scope(method: str) -> None:
    """Raises an error inside the scope of a TensorFlow strategy.

    TensorFlow makes what is loaded there a part of the strategy, so that it cannot be executed.

    Args:
        method: What was called, for the message.

    Raises:
        ValueError: If it was called there.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.distribute.has_strategy():
            raise ValueError(
                f"`{method}` was called inside `strategy.scope()`. Call it outside, with the same "
                "model."
            )


def note_other_workers(model: keras.Model, error: Exception) -> None:
    """Adds a note to an error of `fit` or `evaluate` if other workers train the model, too."""
    if any(_strategy_with_other_workers(variable) for variable in model.variables[:1]):
        error.add_note(
            f"`fit` and `evaluate` of Keras {keras.__version__} may not support several workers of "
            "a `tf.distribute` strategy. Train and evaluate in a loop of your own with "
            "`strategy.run`, and call `advance` of callbacks that change masks."
        )


def _strategy_with_other_workers(variable: keras.Variable) -> tf.distribute.Strategy | None:
    """Returns the strategy that a variable is distributed by, if other processes take part."""
    if keras.backend.backend() != "tensorflow":
        return None
    strategy = getattr(variable.value, "distribute_strategy", None)
    if strategy is None:
        return None
    alone = len(strategy.extended.worker_devices) == strategy.num_replicas_in_sync
    return None if alone else strategy
