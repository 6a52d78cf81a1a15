"""Trainings that are distributed over several devices or processes."""

from __future__ import annotations

import keras


def why_distributed(model: keras.Model) -> str | None:
    """Returns how the training of a model is distributed, or None if it is not."""
    if keras.distribution.distribution() is not None:
        return "a `keras.distribution` is set"
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        strategy = model.distribute_strategy
        # Outside every scope, the strategy is the default one.
        if tf.distribute.has_strategy() or strategy is not tf.distribute.get_strategy():
            return f"the model is distributed by {type(strategy).__name__}"
    return None


def trains_apart() -> str | None:
    """Returns a message if this is one of several processes, between which Keras does nothing."""
    if keras.backend.backend() == "torch":
        from torch import distributed

        if distributed.is_available() and distributed.is_initialized():
            count = distributed.get_world_size()
            if count > 1:
                return (
                    f"`torch.distributed` has {count} processes, and each of them trains a model "
                    "of its own: `fit` of Keras does not average gradients. To train one model "
                    "together, wrap it in `DistributedDataParallel` and write the loop of steps "
                    "(https://keras.io/guides/distributed_training_with_torch)."
                )
    return None


def replicas_of(model: keras.Model) -> int:
    """Returns the number of parts into which every batch is divided when a model is trained."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        return int(model.distribute_strategy.num_replicas_in_sync)
    return _parts_on_jax() if backend == "jax" else 1


def shared_batch(model: keras.Model, examples: int, batch_size: int) -> int:
    """Returns the batch size of an evaluation, or another one of which replicas get equal parts.

    Which examples are evaluated together hardly matters, but Keras needs equal parts of the first
    batch.

    Args:
        model: The model.
        examples: Number of examples.
        batch_size: Number of examples per step.

    Raises:
        ValueError: If there are fewer examples than replicas.
    """
    first, replicas = min(batch_size, examples), replicas_of(model)
    if first % replicas == 0:
        return batch_size
    if examples < replicas:
        raise ValueError(
            f"{model.name!r} has {replicas} replicas, each of which evaluates a part of every "
            f"batch, so it needs {replicas} examples or more. Received: {examples}."
        )
    return max(replicas, first - first % replicas)


def check_equal_parts(model: keras.Model, batch_size: int) -> None:
    """Checks that replicas of a TensorFlow strategy get equal parts of the first batch of a `fit`.

    Otherwise Keras fails, because it averages the examples of all replicas to see their shapes.

    Raises:
        ValueError: If they do not.
    """
    if batch_size % (replicas := replicas_of(model)):
        raise ValueError(
            f"A batch of {batch_size} examples cannot be divided equally among the {replicas} "
            f"replicas that {model.name!r} is trained on. Choose a multiple of {replicas} as "
            "`batch_size`."
        )


def check_batches(examples: int, batch_size: int, what: str = "training") -> None:
    """Checks that every batch can be divided among the devices of a `keras.distribution` on JAX.

    JAX refuses other batches, in the middle of an epoch and without their origin.

    Args:
        examples: Number of examples.
        batch_size: Number of examples per step. The last batch may be smaller.
        what: What the examples are for.

    Raises:
        ValueError: If a batch cannot be divided.
    """
    parts = _parts_on_jax()
    if min(batch_size, examples) % parts or examples % batch_size % parts:
        raise ValueError(
            f"Under `keras.distribution`, every batch is divided among {parts} devices, so its "
            f"size must be a multiple of {parts}, also that of the last batch. Received for "
            f"{what}: {examples} examples in batches of {min(batch_size, examples)}. Choose "
            "another batch size, or leave examples out."
        )


def _parts_on_jax() -> int:
    distribution = keras.distribution.distribution()
    if distribution is None or keras.backend.backend() != "jax":
        return 1
    import jax

    if jax.process_count() > 1:  # Each process has a part of the batch, and of the devices.
        return 1
    mesh = distribution.device_mesh
    return int(mesh.shape[mesh.axis_names.index(distribution.batch_dim_name)])
