"""The command `lottery-ticket compare`: models side by side, on the same data."""

import dataclasses
import functools
import importlib
from pathlib import Path
from typing import Any

import keras
import numpy as np
from rich.console import Console

from _lottery_ticket import hints
from _lottery_ticket.commands import CompareConfig
from lottery_ticket_pruner.compression import (
    ModelComparison,
    Subject,
    compare_subjects,
    parts_of,
    predict_in_batches,
    test_part_of,
)
from lottery_ticket_pruner.experiments import (
    datasets,
    networks,
    own,
    own_networks,
    saved_tickets,
)
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, read_json
from lottery_ticket_pruner.training import Arrays, map_arrays
from masked_layers import serving
from masked_layers.ticket_files import SUFFIX, load_with_values

_NAMES = {"prune": "model", "run": "ticket"}


def compare(config: CompareConfig, console: Console | None = None) -> ModelComparison:
    """Loads the models and the data, and prints and returns the comparison.

    Raises:
        FileNotFoundError: If a model does not exist.
        ValueError: If a model or the data cannot be used.
    """
    if not config.models:
        raise ValueError("Name at least one model to compare.")
    if config.batch_size < 1:
        raise ValueError(f"--batch-size must be positive. Received: {config.batch_size}.")
    x, y = _data(config)
    names = dict.fromkeys(config.models)  # Each once.
    subjects = [_subject(name, x, config.batch_size) for name in names]
    found = compare_subjects(subjects, (x, y))
    found = dataclasses.replace(found, notes=(*found.notes, *_note_of_data(config)))
    console = console or Console()
    console.print(str(found), markup=False, highlight=False, soft_wrap=True)
    return found


def _data(config: CompareConfig) -> tuple[Arrays, Arrays]:
    """Returns the test examples: those of a folder if it has this data, or no other is named."""
    for name in config.models:
        stored = read_json(Path(name) / CONFIG_FILE)
        data = stored.get("data") if isinstance(stored, dict) else None
        if stored is not None and isinstance(data, str) and config.data in (None, data):
            return _data_of(Path(name), stored, config.data_dir or stored.get("data_dir"))
    if config.data is None:
        raise ValueError(
            "--data is missing: name a data set, module:function or file.py:function. It can only "
            "be left out if one of the models is a folder of `lottery-ticket prune` or `run`."
        )
    if datasets.is_own(config.data):
        return own.value_of(config.data, "load data with", test_part_of)
    return test_part_of(datasets.load(config.data, config.data_dir))


def _data_of(
    path: Path, stored: dict[str, Any], data_dir: Path | str | None
) -> tuple[Arrays, Arrays]:
    """Returns the test examples of a folder of `prune` or `run`, as it used them."""
    data = stored["data"]
    if stored.get("command") == "prune" and datasets.is_own(data):
        return own.value_of(data, "load data with", lambda made: parts_of(made).test)
    loaded = datasets.load(data, data_dir)
    if networks.is_own(stored.get("network") or ""):
        takes = own_networks.takes_no_channel(_model_in(path, stored), loaded)
        return (loaded.x_test[..., 0] if takes else loaded.x_test), loaded.y_test
    return test_part_of(loaded)


def _note_of_data(config: CompareConfig) -> tuple[str, ...]:
    """Returns a sentence if folders have different data."""
    every = [read_json(Path(name) / CONFIG_FILE) for name in config.models]
    names = [stored["data"] for stored in every if isinstance(stored, dict) and "data" in stored]
    first, *others = dict.fromkeys([*filter(None, [config.data]), *names, None])
    return tuple(
        f"Some of these models were made with {other}, but all are compared on {first}."
        for other in others
        if other is not None
    )


def _subject(name: str, x: Arrays, batch_size: int) -> Subject:
    path = Path(name)
    if not path.exists() and own.is_location(name):
        return own.value_of(
            name,
            "make a model with",
            lambda made: Subject.of_model(name, _model(made), batch_size),
        )
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return _served(name, x, batch_size)
        return _in_folder(name, batch_size)
    if not path.exists():
        hint = hints.file_question(path, (SUFFIX, *networks.FILES))
        raise FileNotFoundError(f"There is no file or folder '{name}'.{hint}")
    if path.suffix in (SUFFIX, *networks.FILES):
        return Subject.of_model(name, _in_file(path), batch_size)
    raise ValueError(
        "Expected a .keras, .h5 or .safetensors file, a SavedModel folder, a folder of "
        f"`lottery-ticket prune` or `run`, or module:function. Received: '{name}'."
    )


def _in_folder(name: str, batch_size: int) -> Subject:
    """Returns the model in a folder of `prune` or `run`, with the size of its SavedModel."""
    path = Path(name)
    stored = read_json(path / CONFIG_FILE) or {}
    found = Subject.of_model(name, _model_in(path, stored), batch_size)
    served = path / "served" / "1"
    if (served / "saved_model.pb").is_file():
        report = serving.inspect(served)
        return dataclasses.replace(found, nbytes=report.disk_nbytes)
    return found


def _model_in(path: Path, stored: dict[str, Any]) -> keras.Model:
    name = _NAMES.get(str(stored.get("command")))
    if name is None:
        raise ValueError(
            f"'{path}' is neither a SavedModel folder nor one of `lottery-ticket prune` or `run`: "
            "name a file or folder inside it, such as served/1."
        )
    return _in_file(saved_tickets.find(path, name))


def _in_file(path: Path) -> keras.Model:
    if path.suffix == SUFFIX:
        return load_with_values(path)
    return own_networks.load_file(path, compiled=False)


def _served(name: str, x: Arrays, batch_size: int) -> Subject:
    """Returns a subject for a SavedModel, which TensorFlow runs on any backend."""
    try:
        tf: Any = importlib.import_module("tensorflow")
    except ImportError as error:
        raise ValueError(f"'{name}' is a SavedModel, for which TensorFlow is needed.") from error
    loaded = tf.saved_model.load(name)
    if not hasattr(loaded, "serve"):
        raise ValueError(f"'{name}' has no endpoint `serve`, which Keras' and sparse exports have.")

    def run(inputs: Arrays) -> Any:
        outputs = loaded.serve(map_arrays(tf.convert_to_tensor, inputs))
        return keras.tree.map_structure(lambda output: output.numpy(), outputs)

    report = serving.inspect(name)
    count = len(keras.tree.flatten(x)[0])
    batch = map_arrays(lambda array: array[np.arange(batch_size) % count], x)
    return Subject(
        name,
        lambda inputs: predict_in_batches(name, run, inputs),
        lambda: functools.partial(run, batch),
        report,
        report.disk_nbytes,
    )


def _model(made: object) -> keras.Model:
    if not isinstance(made, keras.Model):
        raise ValueError(f"Expected a Keras model. Received: {type(made).__name__}.")
    return made
