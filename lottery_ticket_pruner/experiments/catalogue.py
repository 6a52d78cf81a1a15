"""The experiments: the command of each, its options, its files, and the rows of its results.

Everything that treats experiments differently reads this module: the command line, `repeat`, the
checks of run folders and results, and reports (`reports/contents.py` has the tables and figures of
each command). A command that is not listed is an error everywhere.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from lottery_ticket_pruner.search_plans import CONTROLS
from lottery_ticket_pruner.supermasks import WEIGHTS

_ARMS = "|".join(("ticket", *CONTROLS))


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of experiment.

    Attributes:
        command: Command of `lottery-ticket` that executes it.
        module: Module next to this one. Its function `run(config, data)` executes the experiment.
        options: Name in that module of the class of its configuration.
        files: Regular expressions for the paths of the files that it writes, without those that
            every command writes (`written.py`). They must not match files that a user may have
            added, such as a served/2 or masks with other names.
        numbers: Columns of its tables that contain only numbers or nothing, in every version.
        columns: Columns that its results have, as alternatives of which one is complete.
        rows_per_seed: Returns the number of rows per seed of a finished run, given its resolved
            options. Raises a KeyError or TypeError if an option is missing or damaged.
        subject: Returns words for the title of a report, given the options.
        swept: Whether a command sweeps its options (`commands/sweep.py`), so that the folders of
            its runs are found in the folder of a sweep.
        sign: An option, and the last file that is written, which identify folders from before
            folders named their command. None for commands that were added later.
    """

    command: str
    module: str
    options: str
    files: tuple[str, ...]
    numbers: tuple[str, ...]
    columns: tuple[frozenset[str], ...]
    rows_per_seed: Callable[[Mapping[str, Any]], int]
    subject: Callable[[Mapping[str, Any]], str]
    swept: bool = False
    sign: tuple[str, str] | None = None

    @property
    def config(self) -> type[Any]:
        """Class of its configuration."""
        return getattr(self._loaded(), self.options)

    def run(self, config: Any, data: Any) -> Path:
        """Executes a resolved configuration and returns its folder."""
        return self._loaded().run(config, data)

    def fits(self, columns: Iterable[str]) -> bool:
        """Returns True if results with these columns may be from this experiment."""
        there = set(columns)
        return any(alternative <= there for alternative in self.columns)

    def _loaded(self) -> Any:
        # Loaded when it is needed, because the modules of experiments use this one.
        return importlib.import_module(f"{__package__}.{self.module}")


def _rows_of_run(config: Mapping[str, Any]) -> int:
    rounds = config["rounds"]
    return 1 + rounds + len(config["controls"]) * (len(config["control_rounds"]) or rounds)


def _rows_of_supermask(config: Mapping[str, Any]) -> int:
    learned = len(config["sparsities"]) or 1  # A mask that learns its sparsity has none.
    masks = learned if config["learn"] else len(config["criteria"]) * len(config["sparsities"])
    return len(config["weights"]) * len(config["dwr"]) * masks


def _subject_of_supermask(config: Mapping[str, Any]) -> str:
    return f"{config['learn'] or 'untrained'} masks" if "learn" in config else ""


_KINDS = (
    Kind(
        command="run",
        module="run",
        options="RunConfig",
        files=(
            r"accuracy\.png",
            r"ticket(-\d+)?\.(safetensors|keras)",
            rf"logs/({_ARMS})-\d+(/round_\d+)?/events\.out\.tfevents\.[^/]*",
            r"rounds/\d+/(state\.json|initial\.npz|(masks|model|pruner)-\d+\.npz)",
            r"served/1/(saved_model|fingerprint)\.pb",
            r"served/1/variables/variables\.(index|data-[\d-]+of-\d+)",
            r"served/1/(assets/weights\.mlsp|assets\.extra/(sparsity\.json|SHA256SUMS))",
        ),
        numbers=(
            *("round", "replicate", "sparsity", "test_accuracy", "test_loss", "early_stop_step"),
            *("seconds", "validation_loss", "channels", "seed"),
        ),
        columns=(frozenset({"arm", "round"}),),
        rows_per_seed=_rows_of_run,
        subject=lambda config: "",
        swept=True,
        sign=("rounds", "accuracy.png"),
    ),
    Kind(
        command="supermask",
        module="supermask",
        options="SupermaskConfig",
        files=(
            r"state\.json",  # Of earlier versions.
            r"(curves-\d+|heat-map)\.png",
            rf"supermask-({'|'.join(WEIGHTS)})-(plain|rescaled)(-[\d.e+-]+)?-\d+\.(safetensors|keras)",
        ),
        numbers=(
            *("replicate", "epoch", "sparsity", "test_accuracy", "test_loss", "dense_accuracy"),
            *("accuracy_of_samples_deviation", "deterministic_accuracy", "deterministic_sparsity"),
            *("seconds", "seed"),
        ),
        # The last two: of learned masks, in earlier versions.
        columns=tuple(frozenset({name}) for name in ("weights", "criterion", "kind", "epoch")),
        rows_per_seed=_rows_of_supermask,
        subject=_subject_of_supermask,
        swept=True,
        sign=("learn", "curves-1.png"),
    ),
    Kind(
        command="instability",
        module="instability",
        options="InstabilityConfig",
        files=(r"state\.json", r"lines\.csv", r"instability\.png"),  # The first: as above.
        numbers=(
            *("replicate", "rewind_to", "sparsity", "instability", "loss_barrier"),
            *("test_accuracy", "lowest_accuracy", "seconds", "share", "loss", "accuracy", "seed"),
        ),
        columns=(frozenset({"instability"}),),
        rows_per_seed=lambda config: len(config["rewind_to"]),
        subject=lambda config: "instability",
        sign=("points", "instability.png"),
    ),
)
KINDS = {kind.command: kind for kind in _KINDS}


def kind_of(command: object) -> Kind:
    """Returns the kind of experiment that a command executes.

    Raises:
        ValueError: If the command executes none.
    """
    if not isinstance(command, str) or command not in KINDS:
        raise ValueError(
            f"Expected an experiment, one of {', '.join(KINDS)}. Received: {command!r}"
        )
    return KINDS[command]


def command_of(config: Any) -> str | None:
    """Returns the command that wrote a configuration, or None if unknown."""
    if not isinstance(config, dict):
        return None
    command = config.get("command")
    if isinstance(command, str) and command:
        return command
    guessed = (kind.command for kind in _KINDS if kind.sign and kind.sign[0] in config)
    return next(guessed, None)


def kind_of_results(config: Mapping[str, Any], columns: Iterable[str]) -> Kind | None:
    """Returns the kind of experiment of a run folder, or None if its results have other columns.

    Args:
        config: Its options, which name the command unless an earlier version wrote them.
        columns: Columns of its results.

    Raises:
        ValueError: If the command that the options name executes no experiment.
    """
    columns = list(columns)
    named = config.get("command")
    kinds = _KINDS if named is None else (kind_of(named),)
    return next((kind for kind in kinds if kind.fits(columns)), None)
