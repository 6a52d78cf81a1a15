"""The state of an iterative search between two rounds, on disk."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.fingerprints import description, digest, reasons
from lottery_ticket_pruner.folders import FolderLock
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.variables import read, variable_scope
from masked_layers.archives import read_npz
from masked_layers.files import replacing

__all__ = ["Checkpoint", "description", "digest"]

# What states of earlier versions do not tell: there it is taken to be the same.
_LATER = ("layers", "metrics")


class Checkpoint:
    """A folder with the state after the last round: model, records, masks of every round, results.

    The state changes as a whole: after a crash it is that of one round or of the next. Within a
    `with` block the folder is this process's alone.

    Args:
        folder: Made if it is not there.
        arguments: What the search was asked to do, in JSON's types. A state of other arguments is
            not taken for one of these, see `fingerprints`.
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

    @property
    def unidentified(self) -> list[str]:
        """Returns in sentences why the state cannot be resumed; empty where it can."""
        return reasons(self._arguments)

    def exists(self) -> bool:
        """Returns True if there is a state to resume from."""
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
            FileNotFoundError: If the folder was removed or replaced meanwhile.
        """
        self._lock.check()
        self._folder.mkdir(parents=True, exist_ok=True)
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
            file.write(json.dumps(state | {"checksum": _checksum(state)}, indent=1).encode())
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
            ValueError: If the state is of other arguments or of another model, of what cannot be
                identified, damaged or not whole. Masks and weights are as before then.
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
            # Only now: what pruned weights are frozen at are variables, too.
            variables = dict(_variables(model))
            _compare(values, variables, self._model_file(number))
        except (OSError, ValueError) as error:
            LotteryTicketPruner(model).reset_masks()
            ml.set_masks(model, before)
            raise ValueError(
                f"The state after round {number} in '{self._folder}' cannot be read: "
                f"{str(error).rstrip('.')}. Without one, choose another folder, or delete this "
                "one to start over."
            ) from error
        for name, variable in variables.items():
            variable.assign(values[name])
        return pruner, masks, rows, evaluations

    def _read_state(self) -> tuple[int, list[dict[str, Any]], list[dict[str, Any]]]:
        """The round, the rows and the evaluations; of a state of this search."""
        try:
            state = json.loads(self._state.read_bytes())
            number, arguments = state["round"], state["arguments"]
            rows, evaluations = state["rows"], state["evaluations"]
            checksum = state.pop("checksum", None)  # Earlier states have none.
            if checksum not in (None, _checksum(state)):
                raise ValueError("its checksum is another one")
            places = {(row["round"], row["arm"]) for row in [*rows, *evaluations]}
            if type(number) is not int or not places <= {(n, a) for n, a in places if n <= number}:
                raise ValueError(f"round {number!r} is not the last one of its rows")
            arguments = dict(arguments)
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error).rstrip(".")
            raise ValueError(
                f"'{self._state}' is not the state of a search, or is cut short or damaged: "
                f"{reason}. Restore it from a copy, or choose another folder, or delete this one "
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
                f"{self._folder} holds the state of a search that may be another one. "
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
    """Returns the entries that differ, by name, each as (there, here)."""
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
    """Everything that a model and its optimizer hold, by kind and position."""
    for kind, variables in (("model", model.variables), ("optimizer", model.optimizer.variables)):
        for position, variable in enumerate(variables):
            yield f"{kind}/{position}", variable


def _compare(
    values: Mapping[str, np.ndarray], variables: Mapping[str, keras.Variable], file: Path
) -> None:
    """Refuses other variables than a model has, before any of them is assigned."""
    if values.keys() != variables.keys():
        raise ValueError(
            f"'{file}' has {len(values)} variables, the model and its optimizer "
            f"{len(variables)}: {sorted(values.keys() ^ variables.keys())} are only in one of them"
        )
    for name, variable in variables.items():
        there = values[name]
        if there.shape != tuple(variable.shape) or there.dtype.kind not in "fiub":
            raise ValueError(
                f"'{file}' has {there.dtype}{there.shape} for {variable.path}, which has the shape "
                f"{tuple(variable.shape)}"
            )


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:16]
