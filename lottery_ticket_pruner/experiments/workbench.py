"""Data and networks that the experiments share, and how they are made reproducible."""

import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import keras

import masked_layers as ml
from lottery_ticket_pruner.experiments import datasets, networks, own_networks
from lottery_ticket_pruner.experiments.config import RunConfig, chosen
from lottery_ticket_pruner.shares import shares_of


class Unresolved(Protocol):
    """The interface of an experiment's configuration, which may leave choices open."""

    @property
    def data(self) -> str:
        """Name of the data set."""

    @property
    def data_dir(self) -> Path | None:
        """Folder with its files."""

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of all replicates."""

    def resolve(self, images: int, /) -> Self:
        """Returns the configuration with all choices made, given the number of images."""


_Config = TypeVar("_Config", bound=Unresolved)


def load_and_resolve(config: _Config) -> tuple[_Config, datasets.Dataset]:
    """Loads the data of a configuration, and makes all choices that it leaves open.

    Raises:
        ValueError: If the configuration is not valid, or its network does not fit the data.
        DatasetNotFoundError: If the data is not in `data_dir` and could not be downloaded.
    """
    data = datasets.load(config.data, config.data_dir)
    resolved = config.resolve(len(data.x_train))
    return resolved, fitted(resolved, data, config.seeds)


def fitted(config: Any, data: datasets.Dataset, seeds: Sequence[int]) -> datasets.Dataset:
    """Returns the data as the network takes it, after trying what could fail only later.

    Custom networks are tried on a few examples, and patterns of rates on the paths of the network.
    The data is only changed for a custom network whose inputs lack the last axis of length 1, which
    was added to it.

    Args:
        config: A resolved configuration.
        data: Its data.
        seeds: Seeds of all runs. If a custom network has the same weights for the first two of
            them, a warning says so.

    Raises:
        ValueError: If the network does not fit the data, or a pattern applies to no layer.
    """
    name = chosen(config.network)
    patterns = isinstance(getattr(config, "rate", None), tuple)
    is_own = networks.is_own(name)
    if not (is_own or patterns):
        return data
    training = config if isinstance(config, RunConfig) else config.training_config()
    if is_own:
        keras.utils.set_random_seed(seeds[0])
        if own_networks.takes_no_channel(own_networks.build(name), data):
            parts = ("x_train", "x_validation", "x_test")
            data = dataclasses.replace(
                data, **{part: getattr(data, part)[..., 0] for part in parts}
            )
    model = compiled_network(training, data, seeds[0])
    if is_own:
        own_networks.check(name, model, data)
        second = compiled_network(training, data, seeds[1]) if len(seeds) > 1 else None
        if second is not None and own_networks.same_weights(model, second):
            warnings.warn(
                f"--network {name} has the same initial weights for every seed, so that seeds "
                "differ only in the order of the data. Draw its weights from Keras' global seed.",
                stacklevel=2,
            )
    if patterns:
        paths = [ref.path for ref in ml.masked_refs(ml.convert_to_masked(model))]
        shares_of("--rate", training.amount["rate"], paths, chosen(training.scope))
    return data


def compiled_network(config: RunConfig, data: datasets.Dataset, seed: int) -> keras.Model:
    """Returns the compiled network of a resolved configuration, with initial weights of a seed."""
    keras.utils.set_random_seed(seed)
    name, steps = chosen(config.network), chosen(config.steps)
    if networks.is_own(name):
        return own_networks.compiled(name, data, config.optimizer, config.learning_rate, steps)
    pixels = data.x_train.reshape(-1, data.input_shape[-1])
    model = networks.build(
        name,
        data.input_shape,
        data.classes,
        mean=pixels.mean(0, dtype="float64").tolist(),
        variance=pixels.var(0, dtype="float64").tolist(),
    )
    model.compile(
        networks.optimizer(chosen(config.optimizer), chosen(config.learning_rate), steps),
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
