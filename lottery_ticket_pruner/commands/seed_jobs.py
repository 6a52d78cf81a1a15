"""The seeds of one run as jobs, whose results are put together into the folder of the run."""

import csv
import dataclasses
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lottery_ticket_pruner.commands import executors
from lottery_ticket_pruner.commands.jobs import Failure
from lottery_ticket_pruner.commands.sweep import Child
from lottery_ticket_pruner.experiments import progress, results
from lottery_ticket_pruner.experiments.arguments import arguments, options_given
from lottery_ticket_pruner.experiments.config import RunConfig, chosen
from lottery_ticket_pruner.experiments.reports import tables
from lottery_ticket_pruner.experiments.run import draw, writer
from lottery_ticket_pruner.experiments.run_folder import RunFolder
from lottery_ticket_pruner.experiments.workbench import load_and_resolve
from lottery_ticket_pruner.experiments.written import SEEDS_FOLDER, results_in

# Files of the run of a seed that the whole run does not take, or makes for all seeds.
_NOT_TAKEN = (results.RESULTS_FILE, "SHA256SUMS", "accuracy.png")
# Names of a seed's own files in its run, and in that of all seeds.
_OWN = (
    (re.compile(r"rounds/0/(.*)"), r"rounds/{}/\1"),
    (re.compile(r"logs/(\w+)-0/(.*)"), r"logs/\1-{}/\2"),
    (re.compile(r"ticket\.(\w+)"), r"ticket-{}.\1"),
)


class _UnfinishedError(Exception):
    """Jobs that failed, so that the run stays unfinished."""


def run(config: RunConfig, console: Console | None = None) -> list[Failure]:
    """Executes each seed of a run as a job, and returns the failures.

    The folder is that of the same run in one process: its results are the same except for seconds,
    and it can be reported and repeated in the same way. Until all seeds are finished, their own run
    folders are in `.seeds`.

    Args:
        config: The options as they were given, without choices made.
        console: Where to print.

    Raises:
        MissingExtraError: If the package for a cluster is not installed.
        ValueError: If the options cannot be used, or the folder holds another run.
        FolderInUseError: If another process is writing in the folder.
        OSError: If it cannot be written, or is removed in the meantime.
    """
    console = console or progress.console(quiet=config.quiet)
    executors.check(config)
    resolved, data = load_and_resolve(config)
    executors.check_devices(config, resolved.devices, chosen(resolved.batch_size))
    folder = RunFolder("run", resolved, data)
    failures: list[Failure] = []

    def work(place: RunFolder) -> None:
        if place.is_interrupted and not (place.path / SEEDS_FOLDER).is_dir():
            raise ValueError(
                f"The interrupted run in '{place.path}' was begun without --executor. Resume it "
                "without this option, or choose another folder with --out."
            )
        children = _children(config, resolved, place.path)
        todo = [child for child in children if not child.is_finished]
        with executors.executor_of(config, place.path, console) as executor:
            done = f", {len(children) - len(todo)} of them finished earlier" * (todo != children)
            place.begin(f"{len(children)} seeds, each a job{done}; {executor.pace(len(todo))}")
            failures.extend(executor.run(todo))
        if failures:
            raise _UnfinishedError
        _put_together(resolved, children, place)

    try:
        folder.carry_out(work, lambda rows: console.print(tables.summary_table(rows)), console)
    except _UnfinishedError:
        text = f"The run is not finished. What is done so far is in {folder.path}"
        progress.say(console, text)
        return failures
    return []


def _children(config: RunConfig, resolved: RunConfig, folder: Path) -> list[Child]:
    given = options_given(config, RunConfig)
    common = [text for name, value in given.items() for text in arguments(name, value)]
    children = []
    for seed in resolved.seeds:
        out = folder / SEEDS_FOLDER / str(seed) / folder.name
        own = ("--seeds", str(seed), "--out", str(out), "--quiet")
        children.append(
            Child(
                f"seed {seed}",
                dataclasses.replace(resolved, seeds=(seed,), out=out),
                ("run", *common, *own),
                data="",
                values=(),
            )
        )
    return children


def _put_together(config: RunConfig, children: Sequence[Child], place: RunFolder) -> None:
    """Copies the results of all seeds, which stay until the run is marked as finished."""
    rows: list[dict[str, Any]] = []
    table = writer(config, place)
    try:
        for replicate, child in enumerate(children):
            options = child.config.to_dict() | {"command": "run"}
            results.check_results(child.folder / results.RESULTS_FILE, options)
            for row in _rows_of(child.folder):
                table.write(row | {"replicate": replicate})
            rows += [
                row | {"replicate": replicate}
                for row in results.read_rows(child.folder / results.RESULTS_FILE)
            ]
            for file in results_in(child.folder, "run"):
                _take(file, child.folder, place.path, replicate)
    finally:
        table.close()
    draw(config, rows, place)


def _rows_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a table with each value as it was written."""
    with (folder / results.RESULTS_FILE).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _take(file: Path, source: Path, target: Path, replicate: int) -> None:
    name = file.relative_to(source).as_posix()
    if name in _NOT_TAKEN:
        return
    if replicate:
        found = ((pattern.fullmatch(name), own) for pattern, own in _OWN)
        matches = [match.expand(own.format(replicate)) for match, own in found if match]
        if not matches:  # Such as the SavedModel, which only the first seed has.
            return
        (name,) = matches
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(file, target / name)
