"""The command `lottery-ticket compare`: models side by side, on the same data."""

import dataclasses
import functools
import importlib
import shlex
from collections.abc import Sequence
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
    progress,
    saved_tickets,
)
from lottery_ticket_pruner.experiments.reports import comparison
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, read_json
from lottery_ticket_pruner.training import Arrays, map_arrays
from masked_layers import serving
from masked_layers.files import replacing
from masked_layers.ticket_files import SUFFIX, load_with_values

_NAMES = {"prune": "model", "run": "ticket"}
_EXPECTED = (
    "Expected a .keras, .h5 or .safetensors file, a SavedModel folder such as served/1, a folder "
    "of `lottery-ticket prune` or `run`, or module:function or file.py:function."
)


def compare(config: CompareConfig, console: Console | None = None) -> ModelComparison:
    """Loads the models and the data, and prints and returns the comparison.

    Raises:
        FileNotFoundError: If a model does not exist.
        OSError: If the page cannot be written.
        ValueError: If a model or the data cannot be used.
    """
    if not config.models:
        raise ValueError("Name at least one model to compare.")
    if config.batch_size < 1:
        raise ValueError(f"--batch-size must be positive. Received: {config.batch_size}.")
    named = [_Named(name) for name in dict.fromkeys(config.models)]  # Each once.
    for one in named:
        _check_exists(one)
    x, y = _data(config, named)
    subjects = [_subject(one, x, config.batch_size) for one in named]
    found = compare_subjects(subjects, (x, y))
    found = dataclasses.replace(found, notes=(*found.notes, *_note_of_data(config, named)))
    console = console or progress.console()
    progress.say(console, str(found))
    if config.page is not None:
        options = {"data": config.data or "that of the folders", "batch_size": config.batch_size}
        with replacing(config.page) as file:
            file.write(comparison.page(found, options).encode())
        progress.say(console, f"Page: {config.page}")
    return found


class _Named:
    """A model as the user has named it. What is read from its folder is read once.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = Path(name)

    @functools.cached_property
    def stored(self) -> dict[str, Any]:
        """The configuration in the folder. Empty if there is none."""
        stored = read_json(self.path / CONFIG_FILE)
        return stored if isinstance(stored, dict) else {}

    @functools.cached_property
    def model(self) -> keras.Model:
        """The model in a folder of `prune` or `run`."""
        file = _NAMES.get(str(self.stored.get("command")))
        if file is None:
            raise ValueError(
                f"'{self.path}' is neither a SavedModel folder nor one of `lottery-ticket prune` "
                "or `run`: name a file or folder inside it, such as served/1."
            )
        return _in_file(saved_tickets.find(self.path, file))


def _check_exists(named: _Named) -> None:
    """Raises an error if a model is neither a file, a folder nor a location."""
    path = named.path
    if path.exists() or own.is_location(named.name):
        return
    hint = hints.file_question(path, (SUFFIX, *networks.FILES)) or hints.folder_question(path)
    raise FileNotFoundError(f"There is no file or folder '{path}'. {_EXPECTED}{hint}")


def _data(config: CompareConfig, named: Sequence[_Named]) -> tuple[Arrays, Arrays]:
    """Returns the test examples: those of a folder if it has this data, or no other is named."""
    for one in named:
        data = one.stored.get("data")
        if isinstance(data, str) and config.data in (None, data):
            if config.data is None and datasets.is_own(data):  # The folder may be someone else's.
                raise ValueError(
                    f"'{one.name}' was made with data of the function '{data}'. Code that a folder "
                    f"names is not executed by itself: add --data {shlex.quote(data)} if you want "
                    "that, or name other data."
                )
            return _data_of(one, config.data_dir or one.stored.get("data_dir"))
    if config.data is None:
        raise ValueError(
            "--data is missing: name a data set, module:function or file.py:function. It can only "
            "be left out if one of the models is a folder of `lottery-ticket prune` or `run` with "
            "data of a name."
        )
    if datasets.is_own(config.data):
        datasets.warn_of_folder(config.data, config.data_dir)
        return own.value_of(config.data, "load data with", test_part_of)
    return test_part_of(datasets.load(config.data, config.data_dir))


def _data_of(named: _Named, data_dir: Path | str | None) -> tuple[Arrays, Arrays]:
    """Returns the test examples of a folder of `prune` or `run`, as it used them."""
    data = named.stored["data"]
    if named.stored.get("command") == "prune" and datasets.is_own(data):
        return own.value_of(data, "load data with", lambda made: parts_of(made).test)
    loaded = datasets.load(data, data_dir)
    if networks.is_own(named.stored.get("network") or ""):
        takes = own_networks.takes_no_channel(named.model, loaded)
        return (loaded.x_test[..., 0] if takes else loaded.x_test), loaded.y_test
    return test_part_of(loaded)


def _note_of_data(config: CompareConfig, named: Sequence[_Named]) -> tuple[str, ...]:
    """Returns a sentence if folders have different data."""
    names = [one.stored["data"] for one in named if "data" in one.stored]
    first, *others = dict.fromkeys([*filter(None, [config.data]), *names, None])
    return tuple(
        f"Some of these models were made with {other}, but all are compared on {first}."
        for other in others
        if other is not None
    )


def _subject(named: _Named, x: Arrays, batch_size: int) -> Subject:
    name, path = named.name, named.path
    if not path.exists() and own.is_location(name):
        return own.value_of(
            name,
            "make a model with",
            lambda made: Subject.of_model(name, _model(made), batch_size),
        )
    if path.is_dir():
        if (path / "saved_model.pb").is_file():
            return _served(name, x, batch_size)
        return _in_folder(named, batch_size)
    if path.suffix in (SUFFIX, *networks.FILES):
        return Subject.of_model(name, _in_file(path), batch_size)
    raise ValueError(f"{_EXPECTED} Received: '{name}'.")


def _in_folder(named: _Named, batch_size: int) -> Subject:
    """Returns the model in a folder of `prune` or `run`, with the size of its SavedModel."""
    found = Subject.of_model(named.name, named.model, batch_size)
    served = named.path / "served" / "1"
    if (served / "saved_model.pb").is_file():
        report = serving.inspect(served)
        return dataclasses.replace(found, nbytes=report.disk_nbytes)
    return found


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
    report = serving.inspect(name)  # Before TensorFlow loads it, which may not notice damage.
    loaded = tf.saved_model.load(name)
    if not hasattr(loaded, "serve"):
        raise ValueError(f"'{name}' has no endpoint `serve`, which Keras' and sparse exports have.")

    def run(inputs: Arrays) -> Any:
        outputs = loaded.serve(map_arrays(tf.convert_to_tensor, inputs))
        return keras.tree.map_structure(lambda output: output.numpy(), outputs)

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
