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
        ValueError: If there are no such devices, or `check_request` refuses them.
    """
    if not devices:
        return
    check_request(devices, batch_size)
    names = _named(devices)
    warnings.warn(
        f"Training is distributed over {len(names)} devices ({', '.join(names)}) and goes through "
        "`fit`, batch by batch. For small networks, the compiled programs that train on one device "
        "are faster.",
        stacklevel=3,
    )


def check_request(devices: Sequence[str], batch_size: int) -> None:
    """Checks what is asked for, without looking for the devices, which another machine may have.

    Args:
        devices: Names of devices, or a single number of devices. Empty for training as usual.
        batch_size: Number of examples per step of training.

    Raises:
        ValueError: If the backend is not TensorFlow, fewer than two devices are named, or a batch
            cannot be divided equally among them.
    """
    if not devices:
        return
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"--devices needs TensorFlow, not {keras.backend.backend()}: set "
            "KERAS_BACKEND=tensorflow, or leave the option out to train on one device."
        )
    number = _number(devices)
    count = len({name.lower() for name in devices}) if number is None else number
    if count < max(2, len(devices)):
        raise ValueError(
            f"--devices {' '.join(devices)}: name at least two different devices, or leave the "
            "option out to train on one."
        )
    if batch_size % count:  # A mean of the means of unequal parts is not the mean of a batch.
        raise ValueError(
            f"--batch-size {batch_size} cannot be divided among {count} devices. Choose a "
            f"multiple of {count}."
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
    there, number = _there(), _number(devices)
    names = [name.lower() for name in devices] if number is None else there[:number]
    if len(names) < (number or 0) or any(name not in there for name in names):
        raise ValueError(
            f"--devices {' '.join(devices)}: this machine has {len(there)} of the kind that "
            f"{keras.backend.backend()} trains on: {', '.join(there)}."
        )
    return names


def _there() -> list[str]:
    """Returns the names of the devices of this process of the kind that TensorFlow trains on.

    `keras.distribution.list_devices()` returns the same, but initializes them, with which
    TensorFlow takes the memory of GPUs: a sweep would take it from its runs.
    """
    import tensorflow as tf

    kind = "GPU" if tf.config.get_visible_devices("GPU") else "CPU"
    parts = (
        len(tf.config.get_logical_device_configuration(device) or [device])
        for device in tf.config.get_visible_devices(kind)
    )
    return [f"{kind.lower()}:{number}" for number in range(sum(parts))]


def _number(devices: Sequence[str]) -> int | None:
    """Returns the number of devices if an option counts them, or else None."""
    return int(devices[0]) if len(devices) == 1 and devices[0].isdecimal() else None
