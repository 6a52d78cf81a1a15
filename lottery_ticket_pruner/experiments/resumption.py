"""Interrupted runs: what a folder keeps while one is under way, for the next to go on from it."""

import json
from pathlib import Path
from typing import Any

import keras

from lottery_ticket_pruner.checkpoint import digest
from lottery_ticket_pruner.experiments.config import choices
from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, ORIGIN, SWEEP_FILE
from masked_layers.files import replacing

# The command that has an option of this name.
_COMMANDS = {"rounds": "run", "learn": "supermask", "points": "instability"}


class Resumption:
    """What a run folder says of the run in it: its choices, its data, its backend.

    Args:
        folder: of the run.
        values: its configuration.
        data: what it runs on.
        masks: the masks of another run that it takes, in any nesting of dicts; its configuration
            has no more than their folder.

    Raises:
        ValueError: the folder holds the results of another command, or a sweep.
    """

    def __init__(
        self, folder: Path, values: dict[str, Any], data: Dataset, masks: Any = None
    ) -> None:
        self._folder = folder
        self._file = folder / "state.json"
        origin = dict(zip(ORIGIN, (keras.backend.backend(), data.digest), strict=True))
        self._config = values | origin
        state = choices(self._config) | ({} if masks is None else {"masks": digest(masks)})
        self._state = json.loads(json.dumps(state))
        self._earlier = _read(folder / CONFIG_FILE)
        if (folder / SWEEP_FILE).is_file():
            raise ValueError(f"'{folder}' is the folder of a sweep. Give --out another one.")
        there, here = _command(self._earlier), _command(values)
        if there not in (None, here):
            raise ValueError(
                f"'{folder}' holds the results of `lottery-ticket {there}`. Give --out another "
                "folder, or delete this one."
            )

    def check_origin(self) -> None:
        """Refuse to go on where a run of the same choices was interrupted, but on other data.

        Raises:
            ValueError: the data differ, or the backend.
        """
        before = _read(self._file)
        if not isinstance(before, dict):
            return
        changed = {
            name for name in before | self._state if before.get(name) != self._state.get(name)
        }
        if changed and changed <= set(ORIGIN):
            was = ", ".join(f"{name} {before.get(name)}" for name in sorted(changed))
            raise ValueError(
                f"'{self._folder}' holds an interrupted run of the same options with another "
                f"{' and '.join(sorted(changed))} ({was}). Give --out another folder, or delete "
                "this one."
            )

    def is_possible(self) -> bool:
        """Whether a run like this one was interrupted here."""
        return _read(self._file) == self._state

    def describe(self) -> str:
        """Where results go, and, before `begin`, what becomes of those that are there."""
        if self.is_possible():
            return f"Going on with the interrupted run in {self._folder}"
        if self._earlier:
            return f"Replacing the earlier run in {self._folder}"
        return f"Results go to {self._folder}"

    def begin(self) -> None:
        """Write the configuration; from here on the results in the folder are of this run."""
        for file, values in (
            (self._folder / CONFIG_FILE, self._config),
            (self._file, self._state),
        ):
            with replacing(file) as whole:
                whole.write((json.dumps(values, indent=2) + "\n").encode())

    def end(self) -> None:
        """Say that the run is finished: the next one starts from nothing."""
        self._file.unlink(missing_ok=True)


def _read(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _command(values: Any) -> str | None:
    if not isinstance(values, dict):
        return None
    return next((name for option, name in _COMMANDS.items() if option in values), None)
