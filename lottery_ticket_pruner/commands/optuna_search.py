"""Chooses which combinations of a sweep to run with Optuna, in place of running all of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lottery_ticket_pruner import notices
from lottery_ticket_pruner.experiments import results
from lottery_ticket_pruner.experiments.reports.tables import Sheet
from masked_layers.files import naming, replacing

STORAGE = "optuna.log"
# A sampler may suggest the same combination again and again.
_REPEATED = 20

Values = tuple[str, ...]
# The validation loss and the share of weights left of a combination, or None if a run failed.
Outcome = tuple[float, float] | None


class Search:
    """A search for the combinations with the least validation loss and the fewest weights left.

    Both are minimized, because rates lead to different sparsities. Optuna's TPE sampler decides by
    the trials so far, which a file keeps, so an interrupted search goes on as if it had not been.

    Args:
        folder: Folder of the sweep.
        options: The values of each option that is tried, by its name.
        combinations: The values of each combination that is a run of its own.
        study: Identity of the sweep. Trials of another one in the same file are not used.

    Raises:
        ValueError: If several combinations mean the same.
    """

    def __init__(
        self,
        folder: Path,
        options: Mapping[str, Sequence[str]],
        combinations: Sequence[Values],
        study: str,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._names, self._choices = list(options), list(options.values())
        self._combinations = list(combinations)
        if math.prod(map(len, self._choices)) != len(combinations):
            raise ValueError(
                "Some values of --over lead to the same runs, so Optuna could not tell them apart. "
                "Leave out those that mean the same as another one."
            )
        self._failed: set[Values] = set()
        self._not_finite: dict[Values, float] = {}
        self._journal = folder / STORAGE
        _complete(self._journal)
        backend = optuna.storages.journal.JournalFileBackend(str(self._journal))
        with naming(self._journal):
            self._study = optuna.create_study(
                study_name=study,
                storage=optuna.storages.JournalStorage(backend),
                directions=["minimize", "minimize"],
                load_if_exists=True,
            )
        # Those of an earlier call are run to the end: later ones are then those of a whole search.
        self._interrupted: list[tuple[int, Values]] = []
        for trial in self._study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
            if len(trial.params) == len(self._names):
                self._interrupted.append((trial.number, self._values(trial.params)))
            else:  # Interrupted while it was made.
                self._study.tell(trial.number, state=optuna.trial.TrialState.FAIL)

    def run(self, trials: int, outcome_of: Callable[[Values], Outcome]) -> None:
        """Tries combinations until so many different ones were tried, in all calls together.

        Args:
            trials: Number of combinations.
            outcome_of: Runs a combination.

        Warns:
            UserWarning: If the validation loss of a combination is not finite.
        """
        while len(self.tried) < min(trials, len(self._combinations)):
            with naming(self._journal):
                trial, values = self._suggested()
            outcome = outcome_of(values)
            with naming(self._journal):
                self._note(trial, values, outcome)

    def _note(self, trial: Any, values: Values, outcome: Outcome) -> None:
        """Writes the outcome of a trial."""
        if outcome is not None and math.isfinite(outcome[0]):
            self._study.tell(trial, list(outcome))
            return
        self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        self._failed.add(values)
        if outcome is not None:
            self.leave_out(values, outcome[0])

    def leave_out(self, values: Values, loss: float) -> None:
        """Leaves out a combination whose validation loss is not finite.

        Optuna minimizes finite numbers, so its trial has failed. It is not tried again.
        """
        self._failed.add(values)
        if values not in self._not_finite:
            self._not_finite[values] = loss
            notices.warn(
                f"The validation loss of {self._words(values)} is {loss}, so that it cannot be one "
                "of the best combinations, and is a failed trial of Optuna."
            )

    @property
    def tried(self) -> set[Values]:
        """The combinations that were tried. Those that failed in earlier calls are tried again."""
        return set(self._known()) | self._failed

    def best(self) -> Sheet:
        """Returns the combinations of which no other one is better in both respects."""
        rows: dict[Values, Sequence[float]] = {}
        for trial in self._study.best_trials:
            rows.setdefault(self._values(trial.params), trial.values)
        lines = [
            (*values, f"{left:.2%}", f"{loss:.4f}")
            for values, (loss, left) in sorted(rows.items(), key=lambda row: row[1][1])
        ]
        names = [name.replace("_", " ") for name in self._names]
        note = "No other one that was tried has both fewer weights and a smaller loss."
        if self._not_finite:
            left_out = "; ".join(map(self._words, self._not_finite))
            note += f" Left out, because their loss is not finite: {left_out}."
        return Sheet(
            f"Best of {len(self.tried)} of {len(self._combinations)} combinations",
            (*names, "weights left", "validation loss"),
            tuple(lines),
            len(names),
            note,
        )

    def _suggested(self) -> tuple[Any, Values]:
        """Returns a trial of a combination that was not tried, and its values."""
        known = self._known()
        tried = known.keys() | self._failed
        for _ in range(_REPEATED):
            trial, values = self._ask()
            if values not in tried:
                return trial, values
            # What is known already costs nothing, and Optuna's next suggestion differs.
            if values in known:
                self._study.tell(trial, known[values])
            else:
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
        rest = [values for values in self._combinations if values not in tried]
        chosen = rest[np.random.default_rng(len(tried)).integers(len(rest))]
        self._study.enqueue_trial(dict(zip(self._names, chosen, strict=True)))
        return self._ask()

    def _known(self) -> dict[Values, Sequence[float]]:
        """Returns the outcomes of the combinations that were tried and did not fail."""
        states = [self._optuna.trial.TrialState.COMPLETE]
        complete = self._study.get_trials(deepcopy=False, states=states)
        return {self._values(trial.params): trial.values for trial in complete}

    def _ask(self) -> tuple[Any, Values]:
        if self._interrupted:
            return self._interrupted.pop(0)
        # A new sampler for each trial, so that a resumed search continues as another would.
        seed = len(self._study.get_trials(deepcopy=False))
        self._study.sampler = self._optuna.samplers.TPESampler(seed=seed)
        trial = self._study.ask()
        pairs = zip(self._names, self._choices, strict=True)
        return trial, tuple(trial.suggest_categorical(name, choices) for name, choices in pairs)

    def _words(self, values: Values) -> str:
        names = (name.replace("_", " ") for name in self._names)
        return ", ".join(f"{name} {value}" for name, value in zip(names, values, strict=True))

    def _values(self, params: Mapping[str, Any]) -> Values:
        return tuple(params[name] for name in self._names)


def _complete(journal: Path) -> None:
    """Removes a last line without its end, which a full disk or a kill has left, from a journal.

    Optuna would append the next entry to it, and could not read the file again.
    """
    content = journal.read_bytes() if journal.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with replacing(journal) as file:
            file.write(whole)


def outcome_of(folders: Sequence[Path]) -> tuple[float, float]:
    """Returns the mean validation loss of the last tickets in run folders, and what they keep.

    Raises:
        FileContentError: If a table is damaged.
    """
    last = [
        max(
            (
                row
                for row in results.read_rows(folder / results.RESULTS_FILE)
                if row["arm"] == "ticket"
            ),
            key=lambda row: row["round"],
        )
        for folder in folders
    ]
    losses = [float(row["validation_loss"]) for row in last]
    left = [1 - float(row["sparsity"]) for row in last]
    return float(np.mean(losses)), float(np.mean(left))
