"""Runs every combination of options and seeds, each in a process of its own."""

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
from rich.console import Console

from _lottery_ticket import experiments as options
from _lottery_ticket import parser
from _lottery_ticket.jobs import LOG_FILE
from _lottery_ticket.refusals import option
from lottery_ticket_pruner.checks import require_extra
from lottery_ticket_pruner.commands import executors
from lottery_ticket_pruner.commands.jobs import Executor, Failure
from lottery_ticket_pruner.experiments import checksums, datasets, progress, results
from lottery_ticket_pruner.experiments.arguments import arguments as arguments_of
from lottery_ticket_pruner.experiments.arguments import given, options_given, parse_over
from lottery_ticket_pruner.experiments.config import RunConfig, choices, chosen
from lottery_ticket_pruner.experiments.identifiers import code_of
from lottery_ticket_pruner.experiments.reports import contents, run_folders
from lottery_ticket_pruner.experiments.run_folder import (
    Workplace,
    is_finished,
    versions,
    write_json,
)
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig
from lottery_ticket_pruner.experiments.workbench import fitted
from lottery_ticket_pruner.experiments.written import refuse_to_replace
from lottery_ticket_pruner.fingerprints import of_json
from masked_layers.checksums import SUMS_FILE
from masked_layers.files import replacing

if TYPE_CHECKING:
    from lottery_ticket_pruner.commands.optuna_search import Search

# Combinations that Optuna tries by default.
_TRIALS = 20


@dataclasses.dataclass(frozen=True)
class SweepConfig(options.SweepOptions, RunConfig):
    """Options of `lottery-ticket sweep`."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as JSON data."""
        values = super().to_dict()
        if self.search == "grid":  # The form of all sweeps that were made before these options.
            del values["search"], values["trials"]
        return values


@dataclasses.dataclass(frozen=True)
class SupermaskSweepConfig(options.SupermaskSweepOptions, SupermaskConfig):
    """Options of `lottery-ticket sweep-supermask`."""


@dataclasses.dataclass(frozen=True)
class _Kind:
    """A command whose options can be swept."""

    name: str
    sweep: str
    config: type[RunConfig] | type[SupermaskConfig]
    # Number of training steps of a resolved configuration with one seed, up to a factor.
    work: Callable[[Any], int]


_KINDS = (
    _Kind("run", "sweep", RunConfig, lambda config: config.steps * (config.rounds + 1)),
    _Kind("supermask", "sweep-supermask", SupermaskConfig, lambda config: config.work),
)


@dataclasses.dataclass(frozen=True)
class Child:
    """One run of a sweep.

    Attributes:
        label: Description of the combination that it tries.
        config: Its resolved configuration, including its folder.
        arguments: Command-line arguments of `lottery-ticket` for the same run.
        data: Digest of its data.
        values: The values of the combination.
    """

    label: str
    config: RunConfig | SupermaskConfig
    arguments: tuple[str, ...]
    data: str
    values: tuple[str, ...]

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.config.folder

    @property
    def is_finished(self) -> bool:
        """True if the folder contains all results."""
        return is_finished(self.config.folder, _kind(self.config).name)

    @property
    def work(self) -> int:
        """Cost of the run in training steps (for tickets, those of one arm over all rounds)."""
        return _kind(self.config).work(self.config)

    @property
    def work_done(self) -> int:
        """Cost of the rounds that have results, including the current one."""
        lines = results.complete_lines(self.config.folder / results.RESULTS_FILE)
        try:
            table = csv.DictReader(line.decode() for line in lines)
            rounds = [int(row["round"]) for row in table]
        except (ValueError, KeyError):  # Supermasks have no rounds.
            return 0
        return chosen(self.config.steps) * (max(rounds) + 1) if rounds else 0


def plan(config: SweepConfig | SupermaskSweepConfig) -> list[Child]:
    """Returns the runs of a sweep in the order of --over, with all seeds of a combination together.

    Raises:
        ValueError: If an option does not exist, or a combination of options is not valid.
        DatasetNotFoundError: If the data is not in its folder and could not be downloaded.
    """
    executors.check(config)
    _check_search(config)
    kind = _kind(config)
    over = _tried(config)
    names = [name for name, _ in over]
    fixed = options_given(config, kind.config)
    for name in names:
        if names.count(name) > 1 or name in fixed:
            raise ValueError(f"{option(name)} is given twice. Put all its values into one --over.")
    common = [text for name, value in fixed.items() for text in arguments_of(name, value)]
    if not config.seeds:
        raise ValueError("Give at least one seed.")
    read: dict[tuple[str, Path | None], datasets.Dataset] = {}
    tried: set[tuple[str | None, ...]] = set()
    found: dict[str, tuple[str, RunConfig | SupermaskConfig, list[str], tuple[str, ...]]] = {}
    for values in itertools.product(*(values for _, values in over)):
        pairs = list(zip(names, values, strict=True))
        label = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in pairs)
        arguments = [*common, *(text for pair in pairs for text in given(*pair, kind.config))]
        parsed = kind.config(**vars(parser.parse([kind.name, *arguments])))
        source = (parsed.data, parsed.data_dir)
        for seed in config.seeds:
            try:
                if source not in read:
                    read[source] = datasets.load(*source)
                data = read[source]
                child = dataclasses.replace(parsed, seeds=(seed,)).resolve(len(data.x_train))
                what = (child.network, child.data, str(getattr(child, "rate", None)), child.scope)
                if what not in tried:
                    tried.add(what)
                    fitted(child, data, config.seeds)
            except ValueError as error:
                raise ValueError(f"{label}: {error}" if label else str(error)) from error
            text = ", ".join(filter(None, (label, f"seed {seed}")))
            found.setdefault(child.name, (text, child, [*arguments, "--seeds", str(seed)], values))
    for devices, size in dict.fromkeys((c.devices, c.batch_size) for _, c, _, _ in found.values()):
        executors.check_devices(config, devices, chosen(size))
    folder = config.out or Path("runs") / _name(config, found)
    return [
        Child(
            label,
            dataclasses.replace(child, out=folder / name),
            (kind.name, *arguments, "--out", str(folder / name)),
            read[child.data, child.data_dir].digest,
            values,
        )
        for name, (label, child, arguments, values) in found.items()
    ]


def sweep(
    config: SweepConfig | SupermaskSweepConfig, console: Console | None = None
) -> list[Failure]:
    """Executes all unfinished runs, combines all results in one table, and returns the failures.

    The folder contains a run folder for each combination and seed, with the output of the run in
    `output.log`; `results.csv`, with the rows of all finished runs and their options and seeds; and
    `sweep.json`, with the options of the last call, the backend and digests of the data.

    Raises:
        ValueError: If `plan` refuses the options, or the finished runs in the folder used another
            backend or other data. In that case nothing is run.
        FolderInUseError: If another process is writing in the folder.
        OSError: If the folder cannot be written, or is removed in the meantime.
    """
    console = console or progress.console(quiet=config.quiet)
    children = plan(config)
    folder = children[0].config.folder.parent
    if (folder / results.CONFIG_FILE).is_file():
        raise ValueError(f"'{folder}' is the folder of a run. Choose another folder with --out.")
    with Workplace(folder) as place:
        if config.overwrite and _is_replaced(config, children):
            place.replace()
            children = [_moved(child, place.path) for child in children]
            # Runs left by an interrupted sweep with other options must not be included.
            for left in set(place.path.iterdir()) - {child.config.folder for child in children}:
                if (left / LOG_FILE).is_file():
                    shutil.rmtree(left)
            if _is_finished(config, place.path):  # It was killed before it was moved in place.
                place.complete()
                if place.moved:
                    progress.say(console, place.describe_moved())
                return []
        return _carry_out(config, children, place, console)


def _is_replaced(config: SweepConfig | SupermaskSweepConfig, children: Sequence[Child]) -> bool:
    """Returns whether the sweep in the folder has other options, or is finished."""
    folder = children[0].config.folder.parent
    stored = _stored(folder)
    if not stored:
        return False
    finished = stored.get("finished", all(child.is_finished for child in children))
    return finished or _choices(stored) != _choices(config.to_dict())


def _is_finished(config: SweepConfig | SupermaskSweepConfig, folder: Path) -> bool:
    stored = _stored(folder)
    same = _choices(stored) == _choices(config.to_dict())
    return same and stored.get("finished", False)


def _stored(folder: Path) -> dict[str, Any]:
    """Returns the options of the sweep in a folder. Empty if there is no sweep."""
    file = folder / results.SWEEP_FILE
    stored = results.read_json(file)
    if stored is None and file.is_file():
        raise ValueError(
            f"The sweep in '{folder}' cannot be identified: its {file.name} "
            f"{results.reason(file)}. Restore it from a copy, or choose another folder with --out."
        )
    if stored is not None:
        # A sweep that is killed before its mark has the checksum of the options with the mark.
        marked = results.as_bytes({**stored, "finished": True})
        checksums.check(folder, [file.name], {file.name: marked})
    return stored or {}


def _choices(values: dict[str, Any]) -> dict[str, Any]:
    left_out = ("jobs", "backend", "digests", *results.FACTS)
    values = {k: v for k, v in choices(values).items() if k not in left_out}
    return json.loads(json.dumps(values))


def _moved(child: Child, folder: Path) -> Child:
    """Returns the same run in the folder of another sweep."""
    place = folder / child.config.folder.name
    config = dataclasses.replace(child.config, out=place)
    return dataclasses.replace(child, config=config, arguments=(*child.arguments[:-1], str(place)))


def _carry_out(
    config: SweepConfig | SupermaskSweepConfig,
    children: Sequence[Child],
    place: Workplace,
    console: Console,
) -> list[Failure]:
    started = time.perf_counter()
    folder = place.path
    if (folder / results.RESULTS_FILE).exists() and not _stored(folder):
        refuse_to_replace(folder, [results.RESULTS_FILE], f"{results.SWEEP_FILE} of a sweep")
    _check_finished(folder)
    _check_code(children)
    todo = [child for child in children if not child.is_finished]
    origin = _origin(folder, children, is_new=len(todo) == len(children))
    kind = _kind(config)
    facts = dict(zip(results.FACTS, (kind.sweep, False, versions()), strict=True))
    search = _search(config, children, place)
    with contextlib.ExitStack() as stack:
        executor = executors.executor_of(config, folder, console) if todo else None
        if executor is not None:
            stack.enter_context(executor)
        _begin(folder, config.to_dict() | origin | facts)
        at_once = len(todo) if search is None else len(config.seeds)
        pace = executor.pace(at_once) if executor else "nothing left to run"
        what = "runs" if search is None else "runs to choose from"
        if not config.over:
            progress.say(
                console, "Without --over OPTION=VALUE,VALUE, this is one combination of options."
            )
        progress.say(
            console,
            f"{len(children)} {what}, {len(children) - len(todo)} of them finished earlier; "
            f"{pace}\n{_where(place)}",
        )
        failures: list[Failure] = []
        if search is not None:
            assert isinstance(config, SweepConfig)
            children, failures = _choose(search, config, children, executor)
        elif executor is not None:
            failures = executor.run(todo)
    place.check()
    _combine(folder, kind, [name for name, _ in _tried(config)])
    finished = [child.config.folder for child in children if child.is_finished]
    if finished:
        groups = run_folders.groups_of(run_folders.find_runs(finished))
        for sheet in contents.overviews(groups):
            console.print(sheet.table())
    if search is not None and finished:
        console.print(search.best().table())
    if len(finished) == len(children):
        facts["finished"] = True
        if place.path != place.final:
            _say_where(children, place.final)
        _mark(folder, config.to_dict() | origin | facts)
        place.complete()
    seconds = time.perf_counter() - started
    moved = f"{place.describe_moved()}\n" if place.moved else ""
    text = f"{moved}{seconds:.0f} s. Results in {place.path}"
    progress.say(console, text)
    return failures


def _begin(folder: Path, values: dict[str, Any]) -> None:
    """Writes the options of a sweep, without the mark and checksums of a finished one."""
    (folder / SUMS_FILE).unlink(missing_ok=True)
    write_json(folder / results.SWEEP_FILE, values)


def _mark(folder: Path, values: dict[str, Any]) -> None:
    """Writes the checksums of a finished sweep, and then its options with the mark."""
    content = results.as_bytes(values)
    checksums.write(folder, [folder / results.RESULTS_FILE], {results.SWEEP_FILE: content})
    with replacing(folder / results.SWEEP_FILE) as whole:
        whole.write(content)


def _check_search(config: SweepConfig | SupermaskSweepConfig) -> None:
    """Checks the options of a search.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ValueError: If options contradict each other.
    """
    if not isinstance(config, SweepConfig):
        return
    if config.search == "grid":
        if config.trials is not None:
            raise ValueError("--trials needs --search optuna: a grid runs all combinations.")
        return
    require_extra("optuna")
    if config.trials is not None and config.trials < 1:
        raise ValueError(f"--trials must be positive. Received: {config.trials}.")
    if not config.over:
        raise ValueError("--search optuna needs options to choose: --over OPTION=VALUE,VALUE.")


def _search(
    config: SweepConfig | SupermaskSweepConfig, children: Sequence[Child], place: Workplace
) -> "Search | None":
    """Returns the search of a sweep, or None if it runs all combinations."""
    if not isinstance(config, SweepConfig) or config.search == "grid":
        return None
    from lottery_ticket_pruner.commands.optuna_search import Search

    options = dict(_tried(config))
    study = of_json({"options": options, "runs": sorted(child.folder.name for child in children)})
    return Search(place.path, options, list(dict.fromkeys(c.values for c in children)), study)


def _choose(
    search: "Search",
    config: SweepConfig,
    children: Sequence[Child],
    executor: Executor | None,
) -> tuple[list[Child], list[Failure]]:
    """Runs the combinations that a search chooses; returns all runs of these, and failures."""
    from lottery_ticket_pruner.commands.optuna_search import outcome_of

    failures: list[Failure] = []

    def try_out(values: tuple[str, ...]) -> tuple[float, float] | None:
        own = [child for child in children if child.values == values]
        todo = [child for child in own if not child.is_finished]
        found = executor.run(todo) if executor is not None else []
        failures.extend(found)
        return None if found else outcome_of([child.folder for child in own])

    for values in dict.fromkeys(child.values for child in children):
        own = [child for child in children if child.values == values]
        if all(child.is_finished for child in own):
            loss, _ = outcome_of([child.folder for child in own])
            if not math.isfinite(loss):
                search.leave_out(values, loss)
    search.run(chosen(config.trials, _TRIALS), try_out)
    return [child for child in children if child.values in search.tried], failures


def _check_finished(folder: Path) -> None:
    """Reads the finished runs in the folder of a sweep, to find damage before anything is run."""
    for inside in sorted(folder.iterdir()):
        if is_finished(inside):
            try:
                run_folders.read_run(inside)
            except ValueError as error:
                raise ValueError(
                    f"{error} If you delete '{inside}' here, the sweep repeats this run."
                ) from error


def _check_code(children: Sequence[Child]) -> None:
    """Compares the code of custom objects with that of finished runs."""
    for child in (child for child in children if child.is_finished):
        stored = results.read_json(child.config.folder / results.CONFIG_FILE) or {}
        there, here = stored.get(results.CODE, ""), code_of(child.config.to_dict())
        if there != here:
            raise ValueError(
                f"The finished run in '{child.config.folder}' used other code: {there or 'none'} "
                f"there, {here or 'none'} here. Delete it, or choose another folder with --out."
            )


def _where(place: Workplace) -> str:
    if place.path == place.final:
        return f"Results go to {place.final}"
    return (
        f"Replacing the earlier sweep in {place.final} when all runs of this one are finished; "
        f"until then they are in {place.path}"
    )


def _say_where(children: Sequence[Child], folder: Path) -> None:
    """Writes the final location of each run into its configuration."""
    for child in children:
        file = child.config.folder / results.CONFIG_FILE
        out = str(folder / child.config.folder.name)
        content = results.as_bytes(json.loads(file.read_text(encoding="utf-8")) | {"out": out})
        checksums.replace(file, content)


def _origin(folder: Path, children: Sequence[Child], is_new: bool) -> dict[str, Any]:
    """Returns what affects results besides the options, after comparing it with finished runs."""
    now = {
        "backend": keras.backend.backend(),
        "digests": {child.config.data: child.data for child in children},
    }
    before = {} if is_new else _stored(folder)
    digests = before.get("digests", {})
    other = [name for name, digest in now["digests"].items() if digests.get(name, digest) != digest]
    if other or before.get("backend", now["backend"]) != now["backend"]:
        what = f"other data named {', '.join(other)}" if other else f"backend {before['backend']}"
        raise ValueError(
            f"The finished runs in '{folder}' used {what}, but would be taken for replicates of "
            "the new ones. Choose another folder with --out."
        )
    now["digests"] = digests | now["digests"]
    return now


def _combine(folder: Path, kind: _Kind, options: Sequence[str]) -> None:
    inside = [path for path in sorted(folder.iterdir()) if is_finished(path, kind.name)]
    if inside:
        with replacing(folder / results.RESULTS_FILE) as file:
            run_folders.tidy(run_folders.find_runs(inside), options).to_csv(file, index=False)


def _name(config: SweepConfig | SupermaskSweepConfig, children: Iterable[str]) -> str:
    return f"sweep-{datasets.label(config.data)}-{of_json(sorted(children))[:8]}"


def _tried(config: SweepConfig | SupermaskSweepConfig) -> list[tuple[str, list[str]]]:
    """Returns the options of --over, each with the values that are tried."""
    return [parse_over(text, _kind(config).config) for text in config.over]


def _kind(config: RunConfig | SupermaskConfig) -> _Kind:
    return next(kind for kind in _KINDS if isinstance(config, kind.config))
