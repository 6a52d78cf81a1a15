"""Networks of the user for experiments: functions that return a model, and model files."""

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from _lottery_ticket import hints
from lottery_ticket_pruner import _keras, fingerprints, records
from lottery_ticket_pruner.checks import line_of
from lottery_ticket_pruner.experiments import networks, own
from lottery_ticket_pruner.experiments.datasets import Dataset
from masked_layers.files import temporary_folder
from masked_layers.keras_files import load_model

_PURPOSE = "make a network with"
# Number of examples with which a network is tried.
_TRIED = 8


def build(name: str) -> keras.Model:
    """Makes the network of a function or file, with initial weights from Keras' global seed.

    The architecture of a file is built again, and its trained weights are not used. Only what is
    not trained is taken from the file: the weights of layers that are not trainable, and what
    layers such as `Normalization` and `TextVectorization` were adapted to.

    Args:
        name: `module:function`, `path/to/file.py:function`, or a path of a `.keras` or `.h5` file.

    Raises:
        FileNotFoundError: If the file or module does not exist.
        UserCodeError: If the function raises an exception.
        ValueError: If the file is damaged, the function does not exist or returns something else,
            or the model is masked.
    """
    if Path(name).suffix not in networks.FILES:
        return own.value_of(name, _PURPOSE, _plain)
    stored = _plain(load_file(Path(name), compiled=True))
    model = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(stored))
    for layer, before in zip(_keras.flatten(model), _keras.flatten(stored), strict=True):
        variables, assets = _kept_state(before)
        if variables:
            layer.load_own_variables(variables)
        if assets:
            with temporary_folder() as folder:
                for file, content in assets.items():
                    (folder / file).write_bytes(content)
                layer.load_assets(str(folder))
    return model


def load_file(path: Path, *, compiled: bool) -> keras.Model:
    """Loads a model file that a user has named.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or has classes that are not imported.
    """
    if not path.is_file():
        hint = hints.file_question(path, networks.FILES)
        raise FileNotFoundError(f"There is no file '{path}'.{hint}")
    try:
        return load_model(path, compiled=compiled)
    except ValueError as error:
        if error.__cause__ is None:  # The file is damaged.
            raise
        raise ValueError(
            f"{error} If the model has classes of your own, name a function that loads it: "
            "file.py:function."
        ) from error


def identity(name: str) -> str:
    """Returns a hash of the code of a function, or of what `build` takes from a file.

    Raises:
        UnidentifiedError: If the code refers to something without readable state.
    """
    if Path(name).suffix not in networks.FILES:
        return own.object_of(name, _PURPOSE, fingerprints.fingerprint)
    model = load_file(Path(name), compiled=True)
    config = keras.saving.serialize_keras_object(model)
    states = [_kept_state(layer) for layer in _keras.flatten(model)]
    assets = [[files[name].hex() for name in sorted(files)] for _, files in states]
    kept = fingerprints.digest([variables for variables, _ in states])
    return fingerprints.of_json([json.loads(json.dumps(config, default=str)), kept, assets])


def compiled(
    name: str, data: Dataset, optimizer: str | None, learning_rate: float | None, steps: int
) -> keras.Model:
    """Returns `build(name)` as an experiment trains it.

    A model that is already compiled keeps its loss and metrics, and its optimizer unless another
    one is given. Otherwise, the loss is the cross-entropy of the classes, from logits or
    probabilities, depending on what the outputs are.

    Args:
        name: Name for `build`.
        data: The data.
        optimizer: Name of an optimizer of `networks.optimizer`. None for that of a compiled model,
            or else for Adam.
        learning_rate: Its learning rate. None for that of a compiled model, or else for 0.0012.
        steps: Number of steps of the whole training.

    Raises:
        ValueError: If the network does not take such inputs, or does not return a score for each
            class.
    """
    model = build(name)
    outputs = _outputs(name, model, data)
    given = optimizer is not None or learning_rate is not None
    if model.compiled and not given:
        return model
    made = networks.optimizer(optimizer or "adam", learning_rate or networks.LEARNING_RATE, steps)
    if model.compiled:
        config = model.get_compile_config() | {
            "optimizer": keras.saving.serialize_keras_object(made)
        }
        model.compile_from_config(config)
        return model
    sums_to_one = outputs.min() >= 0 and np.allclose(outputs.sum(-1), 1, atol=1e-3)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=not sums_to_one)
    model.compile(made, loss, metrics=["accuracy"])
    return model


def check(name: str, model: keras.Model, data: Dataset) -> None:
    """Tries the loss and the metrics of a compiled network, which is not used afterwards.

    Raises:
        ValueError: If the loss does not take the labels of the data, or there is no accuracy.
    """
    x, y = data.x_train[:_TRIED], data.y_train[:_TRIED]
    model.run_eagerly = True  # Compiling takes longer.
    try:
        metrics = model.evaluate(x, y, verbose=0, return_dict=True)
    except Exception as error:  # Losses raise errors of all types.
        raise ValueError(
            f"--network {name} is compiled with a loss or metrics that cannot be computed from "
            "labels that are class indices. Compile it with "
            f"loss='sparse_categorical_crossentropy', or not at all. {line_of(error)}"
        ) from error
    if "accuracy" not in metrics:
        raise ValueError(
            f"--network {name} is compiled without the metric of the results. Compile it with "
            f"metrics=['accuracy'], or not at all. Received: {', '.join(metrics)}."
        )


def same_weights(first: keras.Model, second: keras.Model) -> bool:
    """Returns True if all maskable weights of two networks are equal."""
    pairs = zip(ml.weight_refs(first), ml.weight_refs(second), strict=True)
    return all(
        np.array_equal(*(keras.ops.convert_to_numpy(ref.variable) for ref in pair))
        for pair in pairs
    )


def takes_no_channel(model: keras.Model, data: Dataset) -> bool:
    """Returns True if the network's inputs lack the axis that was added to images without one."""
    shape = getattr(model, "input_shape", None)
    inputs = data.input_shape
    return isinstance(shape, tuple) and inputs[-1:] == (1,) and len(shape) == len(inputs)


def _plain(made: object) -> keras.Model:
    if not isinstance(made, keras.Model):
        raise ValueError(f"Expected a Keras model for --network. Received: {type(made).__name__}.")
    if records.is_masked(made):
        raise ValueError(
            "Expected a network without masks, because experiments add their own. Received: a "
            f"masked model, {made.name!r}. Use `masked_layers.strip_masks(model)`."
        )
    return made


def _outputs(name: str, model: keras.Model, data: Dataset) -> np.ndarray:
    """Returns the outputs of a few examples, which also builds the network.

    Raises:
        ValueError: If the network does not fit the data.
    """
    takes = getattr(model, "input_shape", None)
    if isinstance(takes, dict | list):
        raise ValueError(
            f"--network {name} has {len(takes)} inputs; the data of an experiment is one array."
        )
    try:
        outputs = model(data.x_train[:_TRIED], training=False)
    except Exception as error:  # Layers raise errors of all types.
        expects = f" It takes inputs of shape {takes[1:]}." if isinstance(takes, tuple) else ""
        raise ValueError(
            f"--network {name} does not take the inputs of --data {data.name}, of shape "
            f"{data.input_shape}.{expects} {line_of(error)}"
        ) from error
    shape = tuple(outputs.shape) if hasattr(outputs, "shape") else None
    if shape is None or len(shape) != 2 or shape[1] < data.classes:
        returned = f"shape {shape}" if shape else type(outputs).__name__
        raise ValueError(
            f"--network {name} must return a score for each of the {data.classes} classes of "
            f"--data {data.name}: outputs of shape (examples, {data.classes}). Received: "
            f"{returned} for {_TRIED} examples."
        )
    return keras.ops.convert_to_numpy(outputs).astype("float64")


def _kept_state(layer: keras.Layer) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Returns the variables of a layer that is not trained by gradients, and its assets by file.

    Vocabularies are assets. Layers inside of the layer are not included.
    """
    variables: dict[str, Any] = {}
    if not layer.trainable or hasattr(layer, "adapt"):
        layer.save_own_variables(variables)
        variables = {name: keras.ops.convert_to_numpy(value) for name, value in variables.items()}
    if not hasattr(layer, "save_assets"):
        return variables, {}
    with temporary_folder() as folder:
        layer.save_assets(str(folder))
        return variables, {file.name: file.read_bytes() for file in folder.iterdir()}
