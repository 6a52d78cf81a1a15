"""The state of an iterative search between two rounds, on disk."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import fitting
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from masked_layers.files import replacing


class Checkpoint:
    """A folder with the state after the last round: model, records, masks of every round, results.

    The state changes as a whole: after a crash it is that of one round or of the next.

    Args:
        folder: made if it is not there.
        arguments: what the search was asked to do, in JSON's types. A state of other arguments is
            not taken for one of these.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, Any]) -> None:
        self._folder = folder
        self._arguments = json.loads(json.dumps(arguments))
        self._state = folder / "state.json"

    def exists(self) -> bool:
        """Whether there is a state to go on from."""
        return self._state.is_file()

    def save(self, pruner: LotteryTicketPruner, rows: list[dict[str, Any]], number: int) -> None:
        """Writes the state after round `number`, in which the final weights were trained."""
        self._folder.mkdir(parents=True, exist_ok=True)
        ml.save_masks(pruner.model, self._masks_file(number))
        pruner.save(self._pruner_file(number))
        arrays = {name: fitting.read(variable) for name, variable in _variables(pruner.model)}
        with replacing(self._model_file(number)) as file:
            np.savez(file, allow_pickle=False, **arrays)
        state = {"arguments": self._arguments, "round": number, "rows": rows}
        with replacing(self._state) as file:
            file.write(json.dumps(state, indent=1).encode())
        self._pruner_file(number - 1).unlink(missing_ok=True)
        self._model_file(number - 1).unlink(missing_ok=True)

    def load(
        self, model: keras.Model
    ) -> tuple[LotteryTicketPruner, list[dict[str, np.ndarray]], list[dict[str, Any]]]:
        """Returns the pruner, the masks after each round and the rows.

        The model gets back all its variables, optimizer and masks included.

        Raises:
            ValueError: The state is of other arguments or of another model, or not readable.
        """
        try:
            state = json.loads(self._state.read_bytes())
            number, rows, arguments = state["round"], state["rows"], state["arguments"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self._state} is not the state of a search: {error!r}") from error
        if arguments != self._arguments:
            changed = {
                key: (arguments.get(key), value)
                for key, value in self._arguments.items()
                if arguments.get(key) != value
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
        return pruner, masks, rows

    def _masks_file(self, number: int) -> Path:
        return self._folder / f"masks-{number:02}.npz"

    def _pruner_file(self, number: int) -> Path:
        return self._folder / f"pruner-{number:02}.npz"

    def _model_file(self, number: int) -> Path:
        return self._folder / f"model-{number:02}.npz"


def _variables(model: keras.Model) -> Iterator[tuple[str, keras.Variable]]:
    """Everything that a model and its optimizer hold, by kind and position."""
    for kind, variables in (("model", model.variables), ("optimizer", model.optimizer.variables)):
        for position, variable in enumerate(variables):
            yield f"{kind}/{position}", variable
