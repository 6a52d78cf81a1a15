"""The states of a search: masks and weights after an attempt, in memory or in a folder."""

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.fingerprints import description, of_json, reasons
from lottery_ticket_pruner.folders import FolderLock
from lottery_ticket_pruner.overrides import assign
from lottery_ticket_pruner.variables import read
from masked_layers.archives import read_npz
from masked_layers.files import UNEXPECTED_FORM, FileContentError, replacing

STATE_FILE = "state.json"


@dataclasses.dataclass(frozen=True)
class State:
    """The masks and the weights of a model, which belong together."""

    masks: Mapping[str, np.ndarray]
    weights: list[np.ndarray]

    @classmethod
    def of(cls, model: keras.Model) -> Self:
        """Copies the state of a masked model."""
        ml.sync(model)
        return cls(ml.get_masks(model), [read(variable) for variable in model.weights])

    def restore(self, model: keras.Model) -> None:
        """Sets the masks and weights of the model, not its optimizer."""
        ml.set_masks(model, self.masks)
        assign(model.weights, self.weights)


class Progress:
    """The results of a search so far, which a folder keeps between processes.

    The dense state and the best one are kept. Within a `with` block, no other process can use the
    folder. Files are replaced as a whole, so that after a crash the state is that of one attempt
    or of the next.

    Args:
        folder: The folder, created if it does not exist. None to keep everything in memory.
        arguments: Everything that determines the results, as JSON data.
        overwrite: Whether to remove the state of an earlier search, once the folder is locked.

    Attributes:
        rows: A row for each attempt.
        facts: What was decided at the beginning.

    Raises:
        FileContentError: If its state is damaged.
        ValueError: If the folder holds another search.
    """

    def __init__(
        self, folder: Path | None, arguments: Mapping[str, Any], *, overwrite: bool = False
    ) -> None:
        self._folder, self._overwrite = folder, overwrite
        self._arguments = json.loads(json.dumps(arguments, default=description))
        self._lock = None if folder is None else FolderLock(folder)
        self._states: dict[str, State] = {}
        self.rows: list[dict[str, Any]] = []
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> Self:
        if self._lock is not None:
            self._lock.__enter__()
            try:
                if self._overwrite:
                    self._discard()
                self._read()
            except BaseException:
                self._lock.__exit__()
                raise
        return self

    def __exit__(self, *error: object) -> None:
        if self._lock is not None:
            self._lock.__exit__(*error)

    def keep(self, name: str, state: State) -> None:
        """Keeps a state under a name. `write` makes it that of the latest row."""
        if self._folder is None:
            self._states[name] = state
            return
        arrays = {f"mask/{path}": mask for path, mask in state.masks.items()}
        arrays |= {f"weight/{number}": value for number, value in enumerate(state.weights)}
        with replacing(self._file(name)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def state(self, name: str) -> State:
        """Returns a state that was kept.

        Raises:
            OSError: If its file is missing.
            FileContentError: If its file is damaged.
        """
        if self._folder is None:
            return self._states[name]
        arrays = read_npz(self._file(name))
        kinds: dict[str, dict[str, np.ndarray]] = {"mask": {}, "weight": {}}
        try:
            for key, array in arrays.items():
                kind, _, rest = key.partition("/")
                kinds[kind][rest] = array
            weights = [kinds["weight"][str(i)] for i in range(len(kinds["weight"]))]
        except KeyError as error:
            raise FileContentError(
                f"'{self._file(name)}' is not a state of a search: it has {error}. Choose another "
                "folder, or delete this one to start over."
            ) from error
        return State(kinds["mask"], weights)

    def write(self) -> None:
        """Writes the rows and facts, and removes states that they do not name.

        Raises:
            FileNotFoundError: If the folder was removed in the meantime.
        """
        used = {self.facts.get("dense"), self.facts.get("best")}
        if self._folder is None or self._lock is None:
            self._states = {name: state for name, state in self._states.items() if name in used}
            return
        self._lock.check()
        content = {"arguments": self._arguments, "facts": self.facts, "rows": self.rows}
        content = json.loads(json.dumps(content))
        with replacing(self._folder / STATE_FILE) as file:
            file.write(json.dumps(content | {"checksum": of_json(content)}, indent=1).encode())
        for file_of_state in self._folder.glob("state-*.npz"):
            if file_of_state.name not in {f"state-{name}.npz" for name in used}:
                with contextlib.suppress(OSError):
                    file_of_state.unlink()

    def _file(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"state-{name}.npz"

    def _discard(self) -> None:
        assert self._folder is not None
        for file in [self._folder / STATE_FILE, *self._folder.glob("state-*.npz")]:
            file.unlink(missing_ok=True)

    def _read(self) -> None:
        assert self._folder is not None
        file = self._folder / STATE_FILE
        if not file.is_file():
            return
        try:
            content = json.loads(file.read_text())
            checksum = content.pop("checksum")
            if checksum != of_json(content):
                raise ValueError("its checksum does not match")
            arguments, rows, facts = (content[key] for key in ("arguments", "rows", "facts"))
            if not (isinstance(arguments, dict) and isinstance(facts, dict)):
                raise ValueError("its arguments or facts have no names")
            if not (isinstance(rows, list) and all(isinstance(row, dict) for row in rows)):
                raise ValueError("its rows have no names")
        except (OSError, *UNEXPECTED_FORM) as error:
            raise FileContentError(
                f"'{file}' is not the state of a search, or is damaged: {error}. Choose another "
                "folder, or delete this one to start over."
            ) from error
        if arguments != self._arguments:
            there, here = _differences(arguments, self._arguments)
            raise ValueError(
                f"'{self._folder}' holds another search. There: {there}. Here: {here}. Choose "
                "another folder, or pass `overwrite` to start over."
            )
        if unidentified := reasons(self._arguments):
            raise ValueError(
                f"'{self._folder}' holds a search that may be a different one. "
                f"{' '.join(unidentified)} Choose another folder, or delete this one to start over."
            )
        self.rows, self.facts = rows, facts


def _differences(*arguments: Mapping[str, Any]) -> list[str]:
    """Returns as text for each of two searches the arguments that differ, and the goals by name."""
    first, second = ({**each, **(each.get("goals") or {})} for each in arguments)
    names = [key for key in first | second if key != "goals" and first.get(key) != second.get(key)]
    return [", ".join(f"`{key}` {each.get(key)!r}" for key in names) for each in (first, second)]
