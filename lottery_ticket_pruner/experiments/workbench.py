"""Data and networks that the experiments share, and how they are made reproducible."""

from pathlib import Path
from typing import Protocol, Self, TypeVar

import keras

from lottery_ticket_pruner.experiments import datasets, networks
from lottery_ticket_pruner.experiments.config import RunConfig, chosen


class Unresolved(Protocol):
    """The interface of an experiment's configuration, which may leave choices open."""

    data: str
    data_dir: Path | None

    def resolve(self, images: int) -> Self:
        """Returns the configuration with all choices made, given the number of images."""


_Config = TypeVar("_Config", bound=Unresolved)


def load_and_resolve(config: _Config) -> tuple[_Config, datasets.Dataset]:
    """Loads the data of a configuration, and makes all choices that it leaves open.

    Raises:
        ValueError: If the configuration is not valid.
        DatasetNotFoundError: If the data is not in `data_dir` and could not be downloaded.
    """
    data = datasets.load(config.data, config.data_dir)
    return config.resolve(len(data.x_train)), data


def compiled_network(config: RunConfig, data: datasets.Dataset, seed: int) -> keras.Model:
    """Returns the compiled network of a resolved configuration, with initial weights of a seed."""
    keras.utils.set_random_seed(seed)
    pixels = data.x_train.reshape(-1, data.input_shape[-1])
    model = networks.build(
        chosen(config.network),
        data.input_shape,
        data.classes,
        mean=pixels.mean(0, dtype="float64").tolist(),
        variance=pixels.var(0, dtype="float64").tolist(),
    )
    model.compile(
        networks.optimizer(
            chosen(config.optimizer), chosen(config.learning_rate), chosen(config.steps)
        ),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def make_deterministic() -> None:
    """Enables deterministic operations of TensorFlow and torch, for the rest of the process."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):  # Without one, results are reproducible anyway.
            tf.config.experimental.enable_op_determinism()
    elif keras.backend.backend() == "torch":
        import torch

        torch.use_deterministic_algorithms(True)
