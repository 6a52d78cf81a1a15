"""Devices that a command trains on, given by its option --devices."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras

if TYPE_CHECKING:
    import tensorflow as tf


def check(devices: Sequence[str], batch_size: int) -> None:
    """Checks that a command can train on some devices, before it does anything.

    Args:
        devices: Names of devices as `keras.distribution.list_devices()` has them, or a single
            number of devices. Empty for training as usual.
        batch_size: Number of examples per step of training.

    Warns:
        UserWarning: That training takes another route, which is slower for small networks.

    Raises:
        ValueError: If there are no such devices, or fewer than two are named, or a batch cannot be
            divided equally among them, or the backend is not TensorFlow.
    """
    if not devices:
        return
    names = _named(devices)
    if batch_size % len(names):  # A mean of the means of unequal parts is not the mean of a batch.
        raise ValueError(
            f"--batch-size {batch_size} cannot be divided among {len(names)} devices. Choose a "
            f"multiple of {len(names)}."
        )
    warnings.warn(
        f"Training is distributed over {len(names)} devices ({', '.join(names)}) and goes through "
        "`fit`, batch by batch. For small networks, the compiled programs that train on one device "
        "are faster. On CPU devices, TensorFlow was seen to crash between two calls of `fit` "
        "(segmentation fault); the same command then resumes.",
        stacklevel=3,
    )


def scope(devices: Sequence[str]) -> contextlib.AbstractContextManager[Any]:
    """Returns the scope for making a model that is trained on some devices.

    Each device has a copy of the model and gets an equal part of every batch. Only what makes the
    model is done in the scope. Everything else knows the devices from the model, and what is made
    of it elsewhere, such as files for serving, is not distributed.

    Args:
        devices: Devices that passed `check`. Empty for a scope without effect.
    """
    if not devices:
        return contextlib.nullcontext()
    return _strategy(tuple(_named(devices))).scope()


@functools.cache
def _strategy(names: tuple[str, ...]) -> tf.distribute.MirroredStrategy:
    """Returns the strategy for some devices.

    There must be only one in a process: operations of two have the same keys, and TensorFlow aborts
    when it takes those of one for those of the other.
    """
    import tensorflow as tf

    return tf.distribute.MirroredStrategy([name.upper() for name in names])


def _named(devices: Sequence[str]) -> list[str]:
    """Returns the names of the devices that an option names or counts."""
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"--devices needs TensorFlow, not {keras.backend.backend()}: set "
            "KERAS_BACKEND=tensorflow, or leave the option out to train on one device."
        )
    there = keras.distribution.list_devices()
    count = int(devices[0]) if len(devices) == 1 and devices[0].isdecimal() else None
    names = [name.lower() for name in devices] if count is None else there[:count]
    missing = [name for name in names if name not in there]
    if missing or (count is not None and len(there) < count):
        raise ValueError(
            f"--devices {' '.join(devices)}: this machine has {len(there)} of the kind that "
            f"{keras.backend.backend()} trains on: {', '.join(there)}."
        )
    if len(set(names)) < max(2, len(names)):
        raise ValueError(
            f"--devices {' '.join(devices)}: name at least two different devices, or leave the "
            "option out to train on one."
        )
    return names
