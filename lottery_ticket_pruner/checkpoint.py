"""The state of an iterative search between two rounds, on disk."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.fingerprints import description, digest, of_json, reasons
from lottery_ticket_pruner.folders import FolderLock
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.variables import read, variable_scope
from masked_layers.archives import read_npz
from masked_layers.files import UNEXPECTED_FORM, FileContentError, replacing

__all__ = ["STATE_FILE", "Checkpoint", "description", "digest"]

STATE_FILE = "state.json"
# Arguments missing from states of earlier versions, where they are assumed to be the same.
_LATER = ("layers", "metrics")
_ENTRIES = {"arguments", "round", "rows", "evaluations", "checksum"}


class Checkpoint:
    """A folder with the state after the last round: model, records, masks and results.

    The state is replaced as a whole. After a crash it is that of one round or of the next. Within a
    `with` block, no other process can use the folder.

    Args:
        folder: The folder. Created if it does not exist.
        arguments: Arguments of the search, as JSON data. A state with different arguments is not
            resumed; see `fingerprints`.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        self._folder = folder
        self._arguments = json.loads(json.dumps(arguments, default=description))
        self._state = folder / STATE_FILE
        self._lock = FolderLock(folder)

    def __enter__(self) -> Self:
        self._lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._lock.__exit__(*error)

    @property
    def folder(self) -> Path:
        """The folder."""
        return self._folder

    @property
    def identity(self) -> str:
        """A hash of the arguments."""
        return of_json(self._arguments)

    @property
    def unidentified(self) -> list[str]:
        """Sentences that say why the state cannot be resumed. Empty if it can be."""
        return reasons(self._arguments)

    def exists(self) -> bool:
        """Returns True if there is a state to resume from."""
        return self._state.is_file()

    def prepare(self) -> None:
        """Creates the folder.

        Raises:
            FileNotFoundError: If it was removed or replaced in the meantime.
        """
        self._lock.check()
        self._folder.mkdir(parents=True, exist_ok=True)

    def save(
        self,
        pruner: LotteryTicketPruner,
        number: int,
        rows: list[dict[str, Any]],
        evaluations: list[dict[str, Any]],
    ) -> None:
        """Writes the state after round `number`, whose training gave the final weights.

        Raises:
            FileNotFoundError: If the folder was removed or replaced in the meantime.
        """
        self.prepare()
        ml.save_masks(pruner.model, self._masks_file(number))
        pruner.save(self._pruner_file(number))
        arrays = {name: read(variable) for name, variable in _variables(pruner.model)}
        with replacing(self._model_file(number)) as file:
            np.savez(file, allow_pickle=False, **arrays)
        state = {
            "arguments": self._arguments,
            "round": number,
            "rows": rows,
            "evaluations": evaluations,
        }
        state = json.loads(json.dumps(state, default=description))
        with replacing(self._state) as file:
            file.write(json.dumps(state | {"checksum": of_json(state)}, indent=1).encode())
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

        All variables of the model are restored, including its optimizer and masks.

        Raises:
            FileContentError: If the state is damaged or incomplete, or belongs to another model. In
                that case masks and weights are not changed.
            ValueError: If the state belongs to other arguments, or cannot be identified.
        """
        number, rows, evaluations = self._read_state()
        if not model.optimizer.built:
            with variable_scope(model):
                model.optimizer.build(model.trainable_variables)
        masks, before = [], ml.get_masks(model)
        try:
            values = read_npz(self._model_file(number))
            for done in range(number + 1):
                ml.load_masks(model, self._masks_file(done))
                masks.append(ml.get_masks(model))
            pruner = LotteryTicketPruner.load(self._pruner_file(number), model)
            # Only now, because frozen values of pruned weights are variables as well.
            variables = dict(_variables(model))
            _compare(values, variables, self._model_file(number))
        except (OSError, ValueError) as error:
            LotteryTicketPruner(model).reset_masks()
            ml.set_masks(model, before)
            raise FileContentError(
                f"The state after round {number} in '{self._folder}' cannot be read: "
                f"{str(error).rstrip('.')}. If it is lost, choose another folder, or delete this "
                "one to start over."
            ) from error
        for name, variable in variables.items():
            variable.assign(values[name])
        return pruner, masks, rows, evaluations

    def _read_state(self) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
        """Returns the round, the rows and the evaluations, if the state belongs to this search."""
        try:
            state = json.loads(self._state.read_bytes())
            number, arguments = state["round"], state["arguments"]
            rows, evaluations = state["rows"], state["evaluations"]
            # A damaged name of the checksum must not make it a state without one.
            if more := state.keys() - _ENTRIES:
                raise ValueError(f"it has further entries: {sorted(more)}")
            checksum = state.pop("checksum", None)  # Earlier states have none.
            if checksum not in (None, of_json(state)):
                raise ValueError("its checksum does not match")
            places = {(row["round"], row["arm"]) for row in [*rows, *evaluations]}
            if type(number) is not int or not places <= {(n, a) for n, a in places if n <= number}:
                raise ValueError(f"round {number!r} is not the last one of its rows")
            arguments = dict(arguments)
        except (OSError, *UNEXPECTED_FORM) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise FileContentError(
                f"'{self._state}' is not the state of a search, or is cut short or damaged: "
                f"{reason}. Restore it from a copy, choose another folder, or delete this one "
                "to start over."
            ) from error
        here = {
            name: value
            for name, value in self._arguments.items()
            if name in arguments or name not in _LATER
        }
        if arguments != here:
            raise ValueError(
                f"{self._folder} holds the state of another search. (There, here): "
                f"{_changes(arguments, here)}. Choose another folder, or delete this one to start "
                "over."
            )
        if self.unidentified:
            raise ValueError(
                f"{self._folder} holds the state of a search that may be a different one. "
                f"{' '.join(self.unidentified)} Choose another folder, or delete this one to start "
                "over."
            )
        return number, rows, evaluations

    def _masks_file(self, number: int) -> Path:
        return self._folder / f"masks-{number:02}.npz"

    def _pruner_file(self, number: int) -> Path:
        return self._folder / f"pruner-{number:02}.npz"

    def _model_file(self, number: int) -> Path:
        return self._folder / f"model-{number:02}.npz"


def _changes(there: Mapping[str, Any], here: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns the entries that differ, by name, as pairs (there, here)."""
    one, other = dict(_flat(there)), dict(_flat(here))
    return {
        key: (one.get(key), other.get(key)) for key in one | other if one.get(key) != other.get(key)
    }


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in arguments.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    """Yields all variables of a model and its optimizer, by kind and position."""
    for kind, variables in (("model", model.variables), ("optimizer", model.optimizer.variables)):
        for position, variable in enumerate(variables):
            yield f"{kind}/{position}", variable


def _compare(
    values: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable], file: Path
) -> None:
    """Raises an error if variables do not match those of a model, before any is assigned."""
    if values.keys() != variables.keys():
        raise ValueError(
            f"'{file}' has {len(values)} variables, the model and its optimizer "
            f"{len(variables)}: {sorted(values.keys() ^ variables.keys())} are only in one of them"
        )
    for name, variable in variables.items():
        there = values[name]
        if there.shape != tuple(variable.shape) or there.dtype.kind not in "fiub":
            raise ValueError(
                f"'{file}' has {there.dtype}{there.shape} for {variable.path}, which has shape "
                f"{tuple(variable.shape)}"
            )
