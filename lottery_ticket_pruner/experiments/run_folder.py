"""The folder of a run: whose it is, whether it is finished, and how another takes its place."""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import time
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar

import keras
from rich.console import Console

import lottery_ticket_pruner
from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.experiments.config import choices, code_of
from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.results import (
    CODE,
    CONFIG_FILE,
    FACTS,
    ORIGIN,
    RESULTS_FILE,
    SWEEP_FILE,
    check_results,
    complete_lines,
    read_json,
    read_rows,
    reason,
)
from lottery_ticket_pruner.experiments.written import (
    EARLIER_STATE,
    REPLACED,
    move_others,
    results_in,
)
from lottery_ticket_pruner.fingerprints import UnidentifiedError, digest
from lottery_ticket_pruner.folders import FolderLock
from masked_layers.files import replace_folder, replacing


class Config(Protocol):
    """The resolved configuration of a run of any command."""

    overwrite: bool

    @property
    def folder(self) -> Path:
        """The folder that the run writes to."""

    def to_dict(self) -> dict[str, Any]:
        """Returns every option by its name."""


_Kind = TypeVar("_Kind")

# Files of a user's that a message names.
_SHOWN = 5
# What folders had before they said so themselves: an option of the command, its last file.
_SIGNS = {
    "run": ("rounds", "accuracy.png"),
    "supermask": ("learn", "curves-1.png"),
    "instability": ("points", "instability.png"),
}
# From these an interrupted run goes on.
_STATES = tuple(f"rounds/*/{name}" for name in ("state.json", "pruner-*.npz", "model-*.npz"))


# --- What a folder says ---------------------------------------------------------------------------


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a file that is complete or not there."""
    with replacing(file) as whole:
        whole.write((json.dumps(values, indent=2) + "\n").encode())


def command_of(config: Any) -> str | None:
    """The command that wrote a configuration, if that can be told."""
    if not isinstance(config, dict):
        return None
    guessed = (name for name, (option, _) in _SIGNS.items() if option in config)
    command = config.get("command")
    return command if isinstance(command, str) and command else next(guessed, None)


def is_finished(folder: Path, command: str | None = None) -> bool:
    """Returns whether a folder holds all results of a run.

    Args:
        folder: The folder.
        command: What wrote it, if it does not say so.
    """
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        return False
    if "finished" in config:
        return bool(config["finished"])
    _, last_file = _SIGNS.get(command_of(config) or command, ("", "?"))
    return (folder / RESULTS_FILE).is_file() and (folder / last_file).is_file()


def restored(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """The configuration that `to_dict` made values of JSON from.

    An option that the values lack came later: it has its default, which is what was done before.

    Raises:
        ValueError: An option is none of the command's, or has a value of another type.
    """
    facts = {*FACTS, *ORIGIN, CODE, "masks_digest"}
    values = {name: value for name, value in values.items() if name not in facts}
    names = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"unknown options: {', '.join(unknown)}.")
    types = typing.get_type_hints(kind)
    if wrong := [f"{k} {v!r}" for k, v in values.items() if not _is_of(v, types[k])]:
        raise ValueError(f"options of other types: {', '.join(wrong)}.")
    if values.get("conv_rate") and not networks.has_convolutions(values.get("network")):
        values["conv_rate"] = None  # Written before such rates were refused.
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    paths = {k: Path(tuples[k]) for k in ("data_dir", "out", "masks") if tuples.get(k)}
    return kind(**tuples | paths)


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a value of JSON, or what it stands for, has the type of an option."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_of(one, parts[0]) for one in value)
    if parts:  # Of a union.
        return any(_is_of(value, part) for part in parts)
    takes = {float: float | int, Path: Path | str}.get(kind, kind)
    return isinstance(value, takes) and isinstance(value, bool) == (kind is bool)


def versions() -> dict[str, str]:
    """The versions of what decides the numbers of a run."""
    backend = keras.backend.backend()
    return {
        "lottery-ticket-pruner": lottery_ticket_pruner.__version__,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
    }


# --- Folders that are replaced as a whole ---------------------------------------------------------


class Workplace:
    """A folder that this process alone writes in, within a `with` block.

    Args:
        folder: Where the results are to be in the end.

    Attributes:
        final: That folder; behind a link, the one that this leads to.
        path: Where to write: `final`, or after `replace` a folder beside it.
        moved: A user's own files that came along from folders that were replaced, as paths from
            `final`.

    Raises:
        FolderInUseError: Another process writes in it.
        OSError: It cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.final = self.path = folder.resolve() if folder.is_symlink() else folder
        self.moved: list[Path] = []
        self._locks = contextlib.ExitStack()
        self._lock: FolderLock | None = None

    def __enter__(self) -> Self:
        try:
            self._bring_back()
            self._lock = self._locks.enter_context(FolderLock(self.final))
            for left in (self._beside, self._moved_away):
                if (left / REPLACED).exists():
                    self._discard(left)
            if (self.final / REPLACED).exists() and self._beside.is_dir():
                self._exchange()  # The lock goes with what was there.
                self._lock = self._locks.enter_context(FolderLock(self.final))
            (self.final / REPLACED).unlink(missing_ok=True)
            self._open()
        except BaseException:
            self._locks.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: Any) -> None:
        self._locks.close()
        if kind is not None and issubclass(kind, KeyboardInterrupt) and self.path.is_dir():
            error.add_note(f"What is done so far is in {self.path}.")

    def check(self) -> None:
        """Raises an error if the folder was removed meanwhile.

        Raises:
            FileNotFoundError: It was.
        """
        self._lock.check()

    def replace(self) -> None:
        """Has what follows written beside the folder, in whose place `complete` puts it."""
        if os.path.ismount(self.final):
            raise ValueError(f"'{self.final}' is a mount point: nothing can take its place.")
        self.path = self._beside
        self._lock = self._locks.enter_context(FolderLock(self.path))

    def complete(self) -> None:
        """Puts what was written in its place; of what was there, a user's own files stay."""
        if self.path != self.final:
            self._exchange()
            self.path = self.final
            self._lock.moved(self.final)

    def describe_moved(self) -> str:
        """Names the files of `moved`; empty where there are none."""
        names = [str(name) for name in self.moved[:_SHOWN]]
        more = len(self.moved) - len(names)
        names += [f"{more} more"] if more else []
        return f"Kept of what was there: {', '.join(names)}" if names else ""

    @property
    def _beside(self) -> Path:
        folder = self.final if self.final.name else self.final.resolve()
        return folder.with_name(f".{folder.name}.new")

    @property
    def _moved_away(self) -> Path:
        """The folder between the two steps of `replace_folder`, where the system needs two."""
        return self._beside.with_name(f"{self._beside.name}.old")

    def _open(self) -> None:
        """Prepares the folder, under the lock."""

    def _bring_back(self) -> None:
        """Ends the two steps of `replace_folder`, if a process was killed between them."""
        old, beside = self._moved_away, self._beside
        if self.final.exists() or not old.is_dir():
            return
        with contextlib.ExitStack() as locks:
            for folder in (old, beside):  # Both are locked where that process is alive.
                if folder.is_dir():
                    locks.enter_context(FolderLock(folder))
            if os.name == "nt":  # Nothing moves there that is open.
                locks.close()
            if not self.final.exists():
                os.rename(beside if beside.is_dir() else old, self.final)

    def _exchange(self) -> None:
        if os.name == "nt":  # Nothing moves there that is open.
            self._locks.close()
        (self.final / REPLACED).touch()
        replace_folder(self._beside, self.final)
        self._discard(self._beside)

    def _discard(self, left: Path) -> None:
        """Removes a folder that the final one has replaced, but for a user's own files."""
        stored = read_json(left / CONFIG_FILE)
        command = "sweep" if (left / SWEEP_FILE).is_file() else command_of(stored)
        self.moved += move_others(left, self.final, command)
        # What says what the folder is goes last, or what a kill leaves would pass for a new run.
        last = ("", CONFIG_FILE, SWEEP_FILE, REPLACED)
        inside = sorted(
            left.iterdir(), key=lambda path: last.index(path.name) if path.name in last else 0
        )
        with contextlib.suppress(OSError):  # What cannot be removed now is by the next one.
            for path in inside:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            left.rmdir()


# --- Folders of runs ------------------------------------------------------------------------------


class RunFolder(Workplace):
    """The folder of a run, which goes on with an interrupted one of the same choices.

    A finished run, and one of other choices, stay as they are, unless the configuration says
    `overwrite`: then the new run is made beside them, and takes their place when it is finished.

    Args:
        command: Of `lottery-ticket`, with which the run is made.
        config: Its configuration.
        data: What it runs on.
        masks: The masks of another run that it takes, in any nesting of dicts; its configuration
            has no more than their folder.

    Attributes:
        is_finished: Whether this run is finished already, so that there is nothing to do.
        is_interrupted: Whether there are results to go on from.

    Raises:
        ValueError: The folder holds a run of other choices or of another command, or a sweep.
    """

    def __init__(self, command: str, config: Config, data: Dataset, masks: Any = None) -> None:
        super().__init__(config.folder)
        self._command = command
        self._config = config
        self._images = len(data.x_train)
        origin = dict(zip(ORIGIN, (keras.backend.backend(), data.digest), strict=True))
        origin |= {} if masks is None else {"masks_digest": digest(masks)}
        self._unidentified = ""
        try:
            # Only of a user's own: the folders of all other runs say what they have always said.
            origin |= {CODE: code} if (code := code_of(config.to_dict())) else {}
        except UnidentifiedError as error:
            self._unidentified = str(error)
            origin[CODE] = "not to be identified"
        self._values = json.loads(json.dumps(config.to_dict() | origin))
        self.is_finished = self.is_interrupted = False
        self._console = Console(quiet=True)

    def carry_out(
        self,
        work: Callable[[Self], None],
        show: Callable[[list[dict[str, Any]]], None],
        console: Console,
    ) -> Path:
        """Does the work of the run, if it is not finished, and shows what came out.

        Args:
            work: Is called in the locked folder; it begins the run with `begin` and leaves the
                rows of the results in `results.csv`.
            show: Prints these rows.
            console: Where to print.

        Returns:
            The folder.
        """
        self._console = console
        started = None
        with self:
            if self.is_finished:
                self._print(self.describe())
            else:
                started = time.perf_counter()
                work(self)
                self.finish()
            show(read_rows(self.final / RESULTS_FILE))
        if self.moved:
            self._print(self.describe_moved())
        if started is not None:
            self._print(f"{time.perf_counter() - started:.0f} s. Results in {self.final}")
        return self.final

    def describe(self) -> str:
        """Says where results go and what becomes of those that are there."""
        if self.is_finished:
            return (
                f"The run in {self.final} is finished and stays as it is. --overwrite does it once "
                "more, and replaces it then."
            )
        if self.is_interrupted:
            return f"Going on with the interrupted run in {self.path}"
        if self.path != self.final:
            return f"Replacing the earlier run in {self.final} when this one is finished"
        return f"Results go to {self.final}"

    def begin(self, heading: str, keep: Sequence[str] = ()) -> None:
        """Writes the configuration; from here on the results in the folder are of this run.

        What is left of an earlier run is removed.

        Args:
            heading: What is printed above where the results go.
            keep: Patterns of what an interrupted run goes on from.
        """
        kept = {file for pattern in keep for file in self.path.glob(pattern)}
        for file in results_in(self.path, self._command):
            if not (self.is_interrupted and file in kept):
                file.unlink()
                self._remove_empty(file.parent)
        self._write(finished=False)
        self._print(f"{heading}\n{self.describe()}")

    def finish(self) -> None:
        """Says that the run is finished, and puts it in its place.

        Raises:
            FileNotFoundError: Its folder was removed meanwhile.
        """
        self.check()
        self._write(finished=True)
        for pattern in _STATES:
            for file in self.path.glob(pattern):
                file.unlink()
        self.complete()

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)

    def _remove_empty(self, folder: Path) -> None:
        """Removes a folder of results, and those around it, where nothing is left in them."""
        while folder != self.path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _write(self, *, finished: bool) -> None:
        facts = dict(zip(FACTS, (self._command, finished, versions()), strict=True))
        write_json(self.path / CONFIG_FILE, self._values | facts)

    def _open(self) -> None:
        differing = self._look()
        if (self.is_finished or differing) and self._config.overwrite:
            self.replace()
            differing = self._look()
            if self.is_finished:  # And was killed before it took its place.
                try:
                    self._check_results()
                except ValueError:  # It is damaged: it starts again.
                    self.is_finished = False
                else:
                    self.complete()
        elif differing:
            raise ValueError(self._refusal(differing))
        elif self.is_finished:
            self._check_results()

    def _check_results(self) -> None:
        check_results(self.path / RESULTS_FILE, self._values | {"command": self._command})

    def _look(self) -> dict[str, tuple[Any, Any]]:
        """Finds out what is in the folder; returns what makes it another run, (there, here)."""
        self.is_finished = self.is_interrupted = False
        stored = read_json(self.path / CONFIG_FILE)
        if (self.path / SWEEP_FILE).is_file():
            raise ValueError(f"'{self.path}' is the folder of a sweep. Give --out another one.")
        if (there := command_of(stored)) not in (None, self._command):
            raise ValueError(
                f"'{self.path}' holds the results of `lottery-ticket {there}`. Give --out another "
                "folder, or delete this one."
            )
        finished = is_finished(self.path, self._command)
        if not finished and not self._has_results():
            self._check_that_nothing_is_lost()
            return {}
        differing = self._differing(stored)
        if not differing:
            self.is_finished, self.is_interrupted = finished, not finished
        return differing

    def _has_results(self) -> bool:
        lines = complete_lines(self.path / RESULTS_FILE)
        return len(lines) > 1 or any(self.path.glob("rounds/*/state.json"))

    def _check_that_nothing_is_lost(self) -> None:
        """Refuses files with the names of results in a folder that was never one of a run."""
        if (self.path / CONFIG_FILE).exists():
            return
        if files := results_in(self.path, self._command):
            names = ", ".join(str(file.relative_to(self.path)) for file in files[:_SHOWN])
            raise ValueError(
                f"'{self.path}' holds no {CONFIG_FILE} of a run, but {names}, which a run would "
                "replace. Give --out another folder, or move what is there."
            )

    def _differing(self, stored: Any) -> dict[str, tuple[Any, Any]]:
        if stored is None:
            return {CONFIG_FILE: (None, None)}
        with contextlib.suppress(TypeError, ValueError):  # It has options that are unknown here.
            complete = restored(type(self._config), stored).resolve(self._images).to_dict()
            stored = json.loads(json.dumps(complete)) | stored
        earlier = read_json(self.path / EARLIER_STATE)
        if isinstance(earlier, dict) and "masks" in earlier:
            stored = {"masks_digest": earlier["masks"]} | stored
        there = {k: v for k, v in choices(stored).items() if k not in FACTS}
        here = choices(self._values)
        if self._unidentified:
            here[CODE] = f"not to be identified: {self._unidentified}"
        return {
            name: (there.get(name), here.get(name))
            for name in here | there
            if there.get(name) != here.get(name)
        }

    def _refusal(self, differing: Mapping[str, tuple[Any, Any]]) -> str:
        state = "a finished" if is_finished(self.path, self._command) else "an interrupted"
        if CONFIG_FILE in differing:
            why = reason(self.path / CONFIG_FILE)
            what = f"results, but of which options cannot be told: its {CONFIG_FILE} {why}"
        elif differing.keys() <= {*ORIGIN, CODE, "masks_digest"}:
            was = ", ".join(f"{name} {there}" for name, (there, _) in differing.items())
            what = f"{state} run of the same options with another {' and '.join(differing)} ({was})"
            if self._unidentified:
                what += f", for all that can be told. {self._unidentified.rstrip('.')}"
        else:
            shown = [
                f"{name.replace('_', ' ')} {there!r} there, {here!r} here"
                for name, (there, here) in differing.items()
            ]
            what = f"{state} run of other options ({'; '.join(shown)})"
        return (
            f"'{self.final}' holds {what}. Give --out another folder, or --overwrite to replace it "
            "when the new run is finished."
        )
