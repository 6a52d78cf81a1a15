"""The device on which the backend computes."""

import keras


def computes_on_cpu() -> bool:
    """Returns whether the backend computes on the CPU, unless it is told otherwise."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        import tensorflow as tf

        return not tf.config.list_logical_devices("GPU")
    if backend == "jax":
        import jax

        return bool(jax.default_backend() == "cpu")
    return bool(keras.ops.zeros(()).device.type == "cpu")
