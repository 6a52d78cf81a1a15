"""Interrupted runs: what a folder keeps while one is under way, for the next to go on from it."""

import json
from pathlib import Path
from typing import Any

import keras

from lottery_ticket_pruner.checkpoint import digest
from lottery_ticket_pruner.experiments.config import choices
from lottery_ticket_pruner.experiments.datasets import Dataset
from masked_layers.files import replacing


class Resumption:
    """The file of a run under way: the results next to it are of its choices, data and backend.

    Args:
        folder: of the run.
        values: its configuration.
        data: what it runs on.
        masks: the masks of another run that it takes, in any nesting of dicts; its configuration
            has no more than their folder.
    """

    def __init__(
        self, folder: Path, values: dict[str, Any], data: Dataset, masks: Any = None
    ) -> None:
        self._file = folder / "state.json"
        state = {
            "choices": choices(values),
            "data": data.digest,
            "backend": keras.backend.backend(),
        }
        if masks is not None:
            state["masks"] = digest(masks)
        self._state = json.loads(json.dumps(state))

    def is_possible(self) -> bool:
        """Whether a run like this one was interrupted here."""
        try:
            return json.loads(self._file.read_text(encoding="utf-8")) == self._state
        except (OSError, ValueError):
            return False

    def begin(self) -> None:
        """Say that from here on the results in the folder are of this run."""
        with replacing(self._file) as file:
            file.write(json.dumps(self._state, indent=1).encode())

    def end(self) -> None:
        """Say that the run is finished: the next one starts from nothing."""
        self._file.unlink(missing_ok=True)
