"""Run folders read back: their rows, and which of them are replicates of one configuration."""

import csv
import dataclasses
import io
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

CONFIG_FILE = "config.json"
RESULTS_FILE = "results.csv"
SWEEP_FILE = "sweep.json"
COLUMNS = (
    "round",
    "arm",
    "replicate",
    "sparsity",
    "test_accuracy",
    "test_loss",
    "early_stop_step",
    "seconds",
    "validation_loss",
)
# What decides the results beside the options; a run folder's configuration holds both.
ORIGIN = ("backend", "data_digest")
# What else a run folder's configuration holds: what wrote it, whether all results are there, and
# the versions of this package, of Keras and of the backend.
FACTS = ("command", "finished", "versions")
# What its criteria and treatments are, where they are of a user's own.
CODE = "code"
# Options that say where to run and what to print: they change no number of the results.
_NO_CHOICE = ("data_dir", "out", "quiet", "seeds", "masks_digest", *FACTS)
_NAMING = ("data", "network", "strategy", "criterion")
# Options that mostly follow from others, or that change no ticket.
_FOLLOWING = (
    "conv_rate", "output_rate", "scope", "controls", "control_rounds", "eval_every", "data_digest",
)  # fmt: skip
# Columns that hold numbers, or nothing, in the results of every command and version.
_NUMBERS = (
    *(name for name in COLUMNS if name != "arm"),
    *("epoch", "rewind_to", "instability", "loss_barrier", "lowest_accuracy"),
    *("dense_accuracy", "accuracy_of_samples_deviation"),
    *("deterministic_accuracy", "deterministic_sparsity"),
    *("share", "loss", "accuracy"),
)
# Options whose values speak for themselves.
_PLAIN = (*_NAMING, "learn")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: Where it is.
        config: The options of the run, every choice made.
        rows: Its results, one line per measurement, with a column `seed`.
    """

    folder: Path
    config: dict[str, Any]
    rows: pd.DataFrame


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration: they differ in seeds, or in where they were written.

    Attributes:
        label: What sets it apart from the other groups, in words.
        config: The options that all its runs share.
        runs: The runs.
        rows: Their rows together; each seed counts once, in the run that got furthest.
    """

    label: str
    config: dict[str, Any]
    runs: tuple[Run, ...]
    rows: pd.DataFrame

    @property
    def has_rounds(self) -> bool:
        """True if its rows are those of `lottery-ticket run`, by rounds and arms."""
        return "arm" in self.rows and "round" in self.rows

    @property
    def has_masks(self) -> bool:
        """True if its rows are those of `lottery-ticket supermask`, by sparsity or by epoch."""
        return not (self.has_rounds or self.is_instability)

    @property
    def is_instability(self) -> bool:
        """True if its rows are those of `lottery-ticket instability`."""
        return "instability" in self.rows

    @property
    def title(self) -> str:
        """Data set, network, criterion and what was made of them."""
        words = [str(self.config[key]) for key in _NAMING if self.config.get(key)]
        if self.is_instability:
            words.append("instability")
        elif "learn" in self.config:
            words.append(f"{self.config['learn'] or 'untrained'} masks")
        return ", ".join(words)


class CsvWriter:
    """Writes rows to a CSV file one by one, each on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers are kept to six digits.

        Raises:
            FileNotFoundError: The file was removed or replaced meanwhile.
        """
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            same = False
        if not same:
            raise FileNotFoundError(
                f"'{self._path}' was removed or replaced while results were written to it: they "
                "are lost."
            )
        rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(rounded)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def is_run(folder: Path) -> bool:
    """Returns True if a folder holds a configuration and its results, or says that it does."""
    if (folder / CONFIG_FILE).is_file() and (folder / RESULTS_FILE).is_file():
        return True
    return bool((read_json(folder / CONFIG_FILE) or {}).get("finished"))


def read_json(file: Path) -> dict[str, Any] | None:
    """The options in a file; None where there is no file that can be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def reason(file: Path) -> str:
    """Returns why `read_json` cannot read a file, as the end of a sentence."""
    if not file.is_file():
        return "is missing"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"is cut short or damaged ({error})"
    return f"holds no options, but {values!r:.40}"


def complete_lines(file: Path) -> list[bytes]:
    """The lines of a file that are whole, as the end of the line shows; none without the file."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def read_table(file: Path) -> pd.DataFrame:
    """Read a CSV file that a command wrote, each number as it was written.

    A last line without its end may be cut inside of a number: it is left out.

    Raises:
        ValueError: it is no such table; the message names the file, and the line if it is one.
    """
    content = b"".join(complete_lines(file))
    try:
        heading, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
    except (ValueError, csv.Error) as error:  # The first also where there is no heading.
        what = "no whole line" if not content else str(error)
        raise ValueError(f"'{file}' is not the table that a command wrote: {what}.") from error
    for line, row in enumerate(rows, 2):
        if row and len(row) != len(heading):
            raise ValueError(
                f"'{file}', line {line}: expected {len(heading)} values, one for each column. "
                f"Received {len(row)}."
            )
        for name, cell in zip(heading, row, strict=False):
            if name in _NUMBERS and not _is_number(cell):
                raise ValueError(
                    f"'{file}', line {line}: expected a number in column '{name}'. "
                    f"Received: {cell!r}."
                )
    return pd.read_csv(io.BytesIO(content))


def _is_number(cell: str) -> bool:
    """Returns True for a number as commands write it, and for an empty cell, which means none."""
    try:
        return not cell or (float(cell) is not None and cell.isascii() and "_" not in cell)
    except ValueError:
        return False


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Read what a run has written back into rows, to go on from there.

    Raises:
        ValueError: as for `read_table`.
    """
    try:
        return read_table(file).to_dict("records")
    except ValueError as error:
        raise ValueError(
            f"{error} Restore it from a copy, or delete it: its run starts over then."
        ) from error


def rows_per_seed(config: Mapping[str, Any]) -> int | None:
    """Returns the number of rows per seed of a finished run, or None if it is not known.

    Args:
        config: The options of the run, every choice made, and its `command`.
    """
    count = lambda name: len(config[name])  # noqa: E731
    try:
        if config["command"] == "run":
            arms = count("controls") * (count("control_rounds") or config["rounds"])
            return 1 + config["rounds"] + arms
        if config["command"] == "instability":
            return count("rewind_to")
        if config["command"] == "supermask":
            learned = count("sparsities") or 1  # A mask that finds its own sparsity has none.
            masks = learned if config["learn"] else count("criteria") * count("sparsities")
            return count("weights") * count("dwr") * masks
    except (KeyError, TypeError):
        pass
    return None


def check_results(file: Path, config: Mapping[str, Any]) -> None:
    """Raises an error where the results of a finished run are not all there.

    Args:
        file: The table of its results.
        config: The options of the run, every choice made, and its `command`.

    Raises:
        ValueError: the table is missing, damaged or lacks rows, and the message says what to do.
    """
    try:
        if not file.is_file():
            raise ValueError(f"'{file}' is missing, with the results of a finished run.")
        rows = read_table(file)
        wanted = rows_per_seed(config)
        if wanted is None or "epoch" in rows:  # As an earlier version wrote them.
            return
        lines = file.read_bytes().splitlines(keepends=True)
        if not lines[-1].endswith(b"\n"):
            raise ValueError(f"'{file}', line {len(lines)}: it ends in the middle.")
        found = rows["replicate"].value_counts() if "replicate" in rows else {}
        for replicate, seed in enumerate(config["seeds"]):
            if (there := int(found.get(replicate, 0))) != wanted:
                raise ValueError(
                    f"'{file}' has {there} rows of seed {seed} (replicate {replicate}), where the "
                    f"finished run wrote {wanted}; {len(rows)} of {wanted * len(config['seeds'])} "
                    "in all."
                )
        if len(rows) != wanted * len(config["seeds"]):
            raise ValueError(f"'{file}' has rows of others than its {len(config['seeds'])} seeds.")
    except ValueError as error:
        raise ValueError(
            f"{error} Restore it from a copy, or have the run done once more: the command that "
            f"made '{file.parent}' replaces it with --overwrite; `lottery-ticket repeat` does the "
            "same elsewhere."
        ) from error


def read_run(folder: Path) -> Run:
    """Read a run folder, finished or not.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not a run folder, a file of it is not what a run writes, or it says
            that the run is finished and does not have all of its results.

    Warns:
        UserWarning: its results end in the middle of a line, which is left out.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'.")
    if not is_run(folder):
        raise ValueError(
            f"'{folder}' is not a run folder: it lacks {CONFIG_FILE} or {RESULTS_FILE}."
        )
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        raise ValueError(
            f"'{folder}' cannot be read as a run: its {CONFIG_FILE} "
            f"{reason(folder / CONFIG_FILE)}. Restore it from a copy."
        )
    seeds = config.get("seeds") or []
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"'{folder / CONFIG_FILE}' holds no seeds. Received: {seeds!r}")
    if config.get("finished"):
        check_results(folder / RESULTS_FILE, config | {"seeds": seeds})
    try:
        rows = read_table(folder / RESULTS_FILE)
    except ValueError as error:
        raise ValueError(
            f"{error} Restore it from a copy, or go on with the run that has to write it."
        ) from error
    place = "epoch" if "epoch" in rows else "sparsity"
    missing = [name for name in ("replicate", place, "test_accuracy") if name not in rows]
    if missing:
        raise ValueError(
            f"'{folder / RESULTS_FILE}' lacks the columns {missing}. It has: {list(rows)}"
        )
    if not (folder / RESULTS_FILE).read_bytes().endswith(b"\n"):
        warnings.warn(
            f"'{folder / RESULTS_FILE}' ends in the middle of a line, which is left out. The "
            "command that made the folder writes it whole.",
            stacklevel=2,
        )
    if not np.isfinite(rows["replicate"].astype(float)).all():
        raise ValueError(f"'{folder / RESULTS_FILE}' lacks numbers in column 'replicate'.")
    numbers = rows["replicate"].astype(int)
    rows["seed"] = [seeds[n] if 0 <= n < len(seeds) else n for n in numbers]
    return Run(folder, config, rows)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Read run folders, and those inside of folders of runs, such as a sweep's; each once.

    Inside of such a folder, what holds no results yet is passed over.

    Raises:
        FileNotFoundError: a folder is not there.
        ValueError: a folder is not a run and holds none, cannot be read, or holds no results yet.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise FileNotFoundError(f"There is no folder '{folder}'.")
        if is_run(folder):
            runs = [read_run(folder)]
        else:
            runs = [read_run(inside) for inside in sorted(folder.iterdir()) if is_run(inside)]
            if not runs:
                raise ValueError(
                    f"'{folder}' is neither a run folder, with {CONFIG_FILE} and {RESULTS_FILE}, "
                    "nor a folder that holds run folders."
                )
        begun = [run for run in runs if len(run.rows)]
        if not begun:
            raise ValueError(f"'{folder}' holds no results yet.")
        found.update((run.folder.resolve(), run) for run in begun)
    return list(found.values())


def groups_of(runs: Sequence[Run]) -> list[Group]:
    """Put runs together that differ in nothing but seeds and places, in the order given."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps(_choices(run), sort_keys=True)
        together.setdefault(key, []).append(run)
    groups = [
        Group("", _choices(same[0]), tuple(same), _pooled(same)) for same in together.values()
    ]
    # Each command has options of its own, that tell nothing of a run of another one.
    for kind in ("has_rounds", "has_masks", "is_instability"):
        places = [place for place, group in enumerate(groups) if getattr(group, kind)]
        labels = _labels([groups[place].config for place in places])
        for place, label in zip(places, labels, strict=True):
            groups[place] = dataclasses.replace(groups[place], label=label)
    return groups


def varied_options(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The options in which configurations differ, in the order of the configurations."""
    options = dict.fromkeys(option for config in configs for option in config)
    return [option for option in options if len({as_text(c.get(option)) for c in configs}) > 1]


def tidy(runs: Sequence[Run], options: Iterable[str] = ()) -> pd.DataFrame:
    """All rows of all runs in one table: run folder, options, seed, results.

    Options are those named, and all others that differ.
    """
    options = [*dict.fromkeys([*options, *varied_options([_choices(run) for run in runs])])]
    tables = []
    for run in runs:
        rows = run.rows.drop(columns="replicate")
        heading = {"run": run.folder.name}
        heading |= {option: as_text(run.config.get(option)) for option in options}
        columns = {name: value for name, value in heading.items() if name not in rows}
        columns["seed"] = rows.pop("seed")
        tables.append(pd.concat([pd.DataFrame(columns, index=rows.index), rows], axis=1))
    return pd.concat(tables, ignore_index=True)


def _choices(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key not in _NO_CHOICE}


def _pooled(runs: Sequence[Run]) -> pd.DataFrame:
    seen: set[int] = set()
    tables = []
    for run in sorted(runs, key=lambda run: -len(run.rows)):
        tables.append(run.rows[~run.rows["seed"].isin(seen)])
        seen |= set(run.rows["seed"])
    return pd.concat(tables, ignore_index=True)


def _labels(configs: Sequence[dict[str, Any]]) -> list[str]:
    """The options in which configurations differ, as text.

    One that follows from those before it, as a layer's rate does from --rate, is left out.
    """
    labels: list[tuple[str, ...]] = [() for _ in configs]
    for option in varied_options(configs):
        values = [config.get(option) for config in configs]
        refined = [(*label, as_text(value)) for label, value in zip(labels, values, strict=True)]
        follows = option in _FOLLOWING and len(set(refined)) == len(set(labels))
        if not follows or None in values:
            described = [_described(option, value) for value in values]
            labels = [(*label, *text) for label, text in zip(labels, described, strict=True)]
    return [", ".join(label) for label in labels]


def _described(option: str, value: Any) -> tuple[str, ...]:
    if option == "learn" and value is None:
        return ("untrained",)
    if value is None:
        return ()
    return (as_text(value) if option in _PLAIN else f"{option.replace('_', ' ')} {as_text(value)}",)


def as_text(value: Any) -> str:
    """The value of an option as readers see it."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
