"""Devices that a command trains on, given by its option --devices."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import keras


@contextlib.contextmanager
def distributed(devices: Sequence[str]) -> Iterator[int]:
    """Distributes the training of models that are made inside the context over some devices.

    Each device has a copy of the model and gets an equal part of every batch: by
    `tf.distribute.MirroredStrategy` on TensorFlow, and `keras.distribution.DataParallel` on JAX.

    Args:
        devices: Names of devices as `keras.distribution.list_devices()` has them, or a single
            number of devices. Empty for training as usual.

    Yields:
        The number of devices.

    Raises:
        ValueError: If there are no such devices, or fewer than two are named, or the backend cannot
            distribute a training.
    """
    if not devices:
        yield 1
        return
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        raise ValueError(
            f"--devices needs TensorFlow or JAX, because Keras on {backend} trains on one device. "
            "Set KERAS_BACKEND."
        )
    names = _named(devices)
    warnings.warn(
        f"Training is distributed over {len(names)} devices ({', '.join(names)}) and goes through "
        "`fit`, batch by batch. For small networks, the compiled programs that train on one device "
        "are faster.",
        stacklevel=3,
    )
    if backend == "tensorflow":
        import tensorflow as tf

        with tf.distribute.MirroredStrategy([name.upper() for name in names]).scope():
            yield len(names)
        return
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(
        keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    )
    try:
        yield len(names)
    finally:
        keras.distribution.set_distribution(before)


def check_batch_size(batch_size: int, devices: int) -> None:
    """Checks that all devices get equal parts of a batch.

    A mean of the means of unequal parts is not the mean over the batch.

    Raises:
        ValueError: If they do not.
    """
    if batch_size % devices:
        raise ValueError(
            f"--batch-size {batch_size} cannot be divided among {devices} devices. Choose a "
            f"multiple of {devices}."
        )


def _named(devices: Sequence[str]) -> list[str]:
    """Returns the names of the devices that an option names or counts."""
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
