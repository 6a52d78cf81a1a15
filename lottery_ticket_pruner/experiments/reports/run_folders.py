"""Reads run folders, and finds out which of them are replicates of one configuration."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lottery_ticket_pruner.experiments.catalogue import KINDS, Kind, kind_of_results
from lottery_ticket_pruner.experiments.results import (
    CODE,
    CONFIG_FILE,
    FACTS,
    IDENTITY,
    RESULTS_FILE,
    check_results,
    check_unfinished,
    is_run,
    missing_folder,
    read_json,
    read_table,
    reason,
)
from masked_layers.files import FileContentError

# Options for where to run and what to print, which do not affect results.
_NO_CHOICE = ("data_dir", "out", "quiet", "seeds", "masks_digest", *FACTS)

_NAMING = ("data", "network", "strategy", "criterion", "structure")

# Options that usually follow from others, or that do not affect tickets.
_FOLLOWING = (
    "conv_rate", "output_rate", "scope", "controls", "control_rounds", "eval_every", "data_digest",
    CODE,
)  # fmt: skip

# Options whose values are understood without their names.
_PLAIN = (*_NAMING, "learn")


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """One run folder.

    Attributes:
        folder: Path of the folder.
        config: The resolved options of the run.
        rows: Its results, one row per measurement, with a column `seed`.
    """

    folder: Path
    config: dict[str, Any]
    rows: pd.DataFrame

    @functools.cached_property
    def kind(self) -> Kind:
        """The experiment that it is a run of.

        Raises:
            ValueError: If its results have other columns, or none.
        """
        kind = kind_of_results(self.config, self.rows)
        if kind is None:
            named = self.config.get("command")
            of = f"`lottery-ticket {named}`" if named else "any experiment"
            raise ValueError(
                f"'{self.folder / RESULTS_FILE}' lacks the columns of the results of {of}. It has: "
                f"{list(self.rows.columns.drop('seed'))}"
            )
        return kind


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Runs of one configuration, which differ only in seeds or folders.

    Attributes:
        label: Description that distinguishes it from the other groups.
        config: The options that all its runs share.
        runs: The runs.
        rows: The rows of all runs. Each seed counts once, from the run that got furthest.
    """

    label: str
    config: dict[str, Any]
    runs: tuple[Run, ...]
    rows: pd.DataFrame

    @property
    def kind(self) -> Kind:
        """The experiment that its runs are runs of."""
        return self.runs[0].kind

    @property
    def title(self) -> str:
        """Data set, network, criterion and treatment of the group."""
        words = [str(self.config[key]) for key in _NAMING if self.config.get(key)]
        return ", ".join(filter(None, (*words, self.kind.subject(self.config))))


def read_run(folder: Path) -> Run:
    """Reads a run folder, finished or not.

    Raises:
        FileNotFoundError: If the folder does not exist.
        FileContentError: If it is not a run folder, one of its files was not written by a run, or
            results of a finished run are missing.

    Warns:
        UserWarning: If the results end in the middle of a line, which is left out.
    """
    if not folder.is_dir():
        raise missing_folder(folder, "that of a run")
    if not is_run(folder):
        raise FileContentError(
            f"'{folder}' is not a run folder: it lacks {CONFIG_FILE} or {RESULTS_FILE}."
        )
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        raise FileContentError(
            f"'{folder}' cannot be read as a run: its {CONFIG_FILE} "
            f"{reason(folder / CONFIG_FILE)}. Restore it from a copy."
        )
    seeds = config.get("seeds") or []
    if not isinstance(seeds, list) or not all(isinstance(seed, int) for seed in seeds):
        raise FileContentError(f"'{folder / CONFIG_FILE}' holds no seeds. Received: {seeds!r}")
    if "command" in config and config["command"] not in tuple(KINDS):
        raise FileContentError(
            f"'{folder}' was written by `lottery-ticket {config['command']}`, which is not an "
            f"experiment of this version: {', '.join(KINDS)}."
        )
    if config.get("finished"):
        check_results(folder / RESULTS_FILE, config | {"seeds": seeds})
    else:
        check_unfinished(folder, config)
    try:
        rows = read_table(folder / RESULTS_FILE)
    except ValueError as error:
        raise FileContentError(
            f"{error} Restore it from a copy, or resume the run that has to write it."
        ) from error
    place = "epoch" if "epoch" in rows else "sparsity"
    missing = [name for name in ("replicate", place, "test_accuracy") if name not in rows]
    if missing:
        raise FileContentError(
            f"'{folder / RESULTS_FILE}' lacks the columns {missing}. It has: {list(rows)}"
        )
    if not (folder / RESULTS_FILE).read_bytes().endswith(b"\n"):
        warnings.warn(
            f"'{folder / RESULTS_FILE}' ends in the middle of a line, which is left out. Repeat "
            "the command that made the folder to complete it.",
            stacklevel=2,
        )
    if not np.isfinite(rows["replicate"].astype(float)).all():
        raise FileContentError(f"'{folder / RESULTS_FILE}' lacks numbers in column 'replicate'.")
    rows = rows.drop(columns=[name for name in IDENTITY if name in rows])
    numbers = rows["replicate"].astype(int)
    rows["seed"] = [seeds[n] if 0 <= n < len(seeds) else n for n in numbers]
    return Run(folder, config, rows)


def find_runs(folders: Iterable[Path]) -> list[Run]:
    """Reads run folders, including those inside folders of runs such as a sweep, each once.

    Inside such a folder, runs without results are skipped.

    Raises:
        FileNotFoundError: If a folder does not exist.
        ValueError: If a folder is not a run and contains none, cannot be read, or has no results
            yet.
    """
    found: dict[Path, Run] = {}
    for folder in folders:
        if not folder.is_dir():
            raise missing_folder(folder, "that of a run, or one with several, such as ./runs")
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
    """Groups runs that differ only in seeds and folders, in the given order."""
    together: dict[str, list[Run]] = {}
    for run in runs:
        key = json.dumps([run.kind.command, _choices(run)], sort_keys=True)
        together.setdefault(key, []).append(run)
    groups = [
        Group("", _choices(same[0]), tuple(same), _pooled(same)) for same in together.values()
    ]
    # Each command has its own options, which do not apply to runs of other commands.
    for kind in dict.fromkeys(group.kind.command for group in groups):
        places = [place for place, group in enumerate(groups) if group.kind.command == kind]
        labels = _labels([groups[place].config for place in places])
        for place, label in zip(places, labels, strict=True):
            groups[place] = dataclasses.replace(groups[place], label=label)
    return groups


def varied_options(configs: Sequence[dict[str, Any]]) -> list[str]:
    """Returns the options in which configurations differ, in the order of the configurations."""
    options = dict.fromkeys(option for config in configs for option in config)
    return [option for option in options if len({as_text(c.get(option)) for c in configs}) > 1]


def tidy(runs: Sequence[Run], options: Iterable[str] = ()) -> pd.DataFrame:
    """Returns all rows of all runs in one table: run folder, options, seed, results.

    Options are those that say what the results are of, the given ones, and all others that differ.
    """
    named = [name for name in IDENTITY if any(run.config.get(name) for run in runs)]
    varied = varied_options([_choices(run) for run in runs])
    options = [*dict.fromkeys([*named, *options, *varied])]
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
    """Returns the options in which configurations differ, as text.

    Options that follow from earlier ones, such as a layer's rate from --rate, are left out.
    """
    labels: list[tuple[str, ...]] = [() for _ in configs]
    for option in varied_options(configs):
        values = [config.get(option) for config in configs]
        refined = [(*label, as_text(value)) for label, value in zip(labels, values, strict=True)]
        follows = option in _FOLLOWING and len(set(refined)) == len(set(labels))
        # Options that are built in have no code.
        if not follows or (None in values and option != CODE):
            described = [_described(option, value) for value in values]
            labels = [(*label, *text) for label, text in zip(labels, described, strict=True)]
    return [", ".join(label) for label in labels]


def _described(option: str, value: Any) -> tuple[str, ...]:
    if option == "learn" and value is None:
        return ("untrained",)
    if value is None:
        return ()
    return (as_text(value) if option in _PLAIN else f"{option.replace('_', ' ')} {as_text(value)}",)


def option_text(option: str, value: Any) -> str:
    """Returns the value of an option as text for readers, with the meaning of an empty one."""
    if option == "control_rounds" and not value:
        return "all"
    return as_text(value)


def as_text(value: Any) -> str:
    """Returns the value of an option as text for readers."""
    if isinstance(value, list | tuple):
        return " ".join(map(as_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
