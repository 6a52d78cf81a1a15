"""The state of an iterative search between two rounds, on disk."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import fitting
from lottery_ticket_pruner.folders import FolderLock
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from masked_layers.files import replacing


class Checkpoint:
    """A folder with the state after the last round: model, records, masks of every round, results.

    The state changes as a whole: after a crash it is that of one round or of the next. Within a
    `with` block the folder is this process's alone.

    Args:
        folder: made if it is not there.
        arguments: what the search was asked to do, in JSON's types. A state of other arguments is
            not taken for one of these.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        self._folder = folder
        self._arguments = json.loads(json.dumps(arguments, default=description))
        self._state = folder / "state.json"
        self._lock = FolderLock(folder)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return self._state.is_file()

    def save(
        self,
        pruner: LotteryTicketPruner,
        number: int,
        rows: list[dict[str, Any]],
        evaluations: list[dict[str, Any]],
    ) -> None:
        """Writes the state after round `number`, in which the final weights were trained.

        Raises:
            FileNotFoundError: The folder was removed or replaced meanwhile.
        """
        self._lock.check()
        self._folder.mkdir(parents=True, exist_ok=True)
        ml.save_masks(pruner.model, self._masks_file(number))
        pruner.save(self._pruner_file(number))
        arrays = {name: fitting.read(variable) for name, variable in _variables(pruner.model)}
        with replacing(self._model_file(number)) as file:
            np.savez(file, allow_pickle=False, **arrays)
        state = {
            "arguments": self._arguments,
            "round": number,
            "rows": rows,
            "evaluations": evaluations,
        }
        with replacing(self._state) as file:
            file.write(json.dumps(state, indent=1, default=description).encode())
        self._pruner_file(number - 1).unlink(missing_ok=True)
        self._model_file(number - 1).unlink(missing_ok=True)

    def load(
        self, model: keras.Model
    ) -> tuple[
        LotteryTicketPruner,
        list[dict[str, np.ndarray]],
        list[dict[str, Any]],
        list[dict[str, Any]],
    ]:
        """Returns the pruner, the masks after each round, the rows and the evaluations.

        The model gets back all its variables, optimizer and masks included.

        Raises:
            ValueError: The state is of other arguments or of another model, or not readable.
        """
        try:
            state = json.loads(self._state.read_bytes())
            number, arguments = state["round"], state["arguments"]
            rows, evaluations = state["rows"], state["evaluations"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state} is not the state of a search: {error!r}") from error
        if arguments != self._arguments:
            there, here = dict(_flat(arguments)), dict(_flat(self._arguments))
            changed = {
                key: (there.get(key), here.get(key))
                for key in there | here
                if there.get(key) != here.get(key)
            }
            raise ValueError(
                f"{self._folder} holds the state of another search. (There, here): {changed}. "
                "Choose another folder, or delete this one to start over."
            )
        masks = []
        for done in range(number + 1):
            ml.load_masks(model, self._masks_file(done))
            masks.append(ml.get_masks(model))
        pruner = LotteryTicketPruner.load(self._pruner_file(number), model)
        if not model.optimizer.built:
            with fitting.variable_scope(model):
                model.optimizer.build(model.trainable_variables)
        with np.load(self._model_file(number), allow_pickle=False) as arrays:
            for name, variable in _variables(model):
                variable.assign(arrays[name])
        return pruner, masks, rows, evaluations

    def _masks_file(self, number: int) -> Path:
        return self._folder / f"masks-{number:02}.npz"

    def _pruner_file(self, number: int) -> Path:
        return self._folder / f"pruner-{number:02}.npz"

    def _model_file(self, number: int) -> Path:
        return self._folder / f"model-{number:02}.npz"


def digest(data: Any) -> str:
    """A short text that changes with any array in any nesting of lists and dicts of them."""
    found = hashlib.sha256()
    for path, leaf in keras.tree.flatten_with_path(data):
        array = np.asarray(() if leaf is None else leaf)
        found.update(f"{path} {array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
    return found.hexdigest()[:16]


def description(thing: Any) -> Any:
    """What an optimizer, losses or an augmentation are configured to do, in JSON's types.

    Names are left out: in them Keras counts the objects of a process.
    """
    if thing is None or isinstance(thing, str | int | float):
        return thing
    if isinstance(thing, np.ndarray | np.generic):
        return thing.tolist()
    if isinstance(thing, Mapping):
        return {key: description(value) for key, value in thing.items() if key != "name"}
    if isinstance(thing, list | tuple):
        return [description(value) for value in thing]
    if hasattr(thing, "get_config"):
        return {"class_name": type(thing).__name__, **description(thing.get_config())}
    if dataclasses.is_dataclass(thing):
        return repr(thing)
    return getattr(thing, "__name__", type(thing).__name__)


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in arguments.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    """Everything that a model and its optimizer hold, by kind and position."""
    for kind, variables in (("model", model.variables), ("optimizer", model.optimizer.variables)):
        for position, variable in enumerate(variables):
            yield f"{kind}/{position}", variable
