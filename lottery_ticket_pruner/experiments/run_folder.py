"""Run folders: which run they belong to, whether it is finished, and how they are replaced."""

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
import numpy as np
from rich.console import Console

import lottery_ticket_pruner
from lottery_ticket_pruner import records
from lottery_ticket_pruner.checkpoint import STATE_FILE
from lottery_ticket_pruner.experiments import catalogue, checksums, networks, progress
from lottery_ticket_pruner.experiments.config import choices
from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.identifiers import code_of
from lottery_ticket_pruner.experiments.results import (
    CODE,
    CONFIG_FILE,
    FACTS,
    ORIGIN,
    PARTS_FILE,
    RESULTS_FILE,
    SWEEP_FILE,
    as_bytes,
    check_results,
    complete_lines,
    file_of_initial_weights,
    read_json,
    read_rows,
    reason,
)
from lottery_ticket_pruner.experiments.written import (
    EARLIER_STATE,
    REPLACED,
    SEEDS_FOLDER,
    SHOWN,
    move_others,
    refuse_to_replace,
    results_in,
)
from lottery_ticket_pruner.fingerprints import UnidentifiedError, digest
from lottery_ticket_pruner.folders import FolderLock
from masked_layers.files import replace_folder, replacing, sync
from masked_layers.text_tables import shortened


class Config(Protocol):
    """The interface of a resolved configuration of any command."""

    @property
    def overwrite(self) -> bool:
        """True if a run in the folder is to be replaced."""

    @property
    def folder(self) -> Path:
        """Folder that the run writes to."""

    def to_dict(self) -> dict[str, Any]:
        """Returns all options by name."""

    def resolve(self, training_images: int) -> "Config":
        """Returns the same configuration with all choices made."""


_Kind = TypeVar("_Kind")

# Files from which an interrupted run is resumed.
_STATES = (
    PARTS_FILE,
    *(f"rounds/*/{name}" for name in (STATE_FILE, "pruner-*.npz", "model-*.npz")),
)


# --- Contents of a folder -------------------------------------------------------------------------


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a file that is complete or absent."""
    with replacing(file) as whole:
        whole.write(as_bytes(values))


def is_finished(folder: Path, command: str | None = None) -> bool:
    """Returns whether a folder contains all results of a run.

    Args:
        folder: The folder.
        command: The command that wrote it, if the folder does not say so.
    """
    config = read_json(folder / CONFIG_FILE)
    if config is None:
        return False
    if "finished" in config:
        return bool(config["finished"])
    kind = catalogue.KINDS.get(catalogue.command_of(config) or command or "")
    if kind is None or kind.sign is None:
        return False
    _, last_file = kind.sign
    return (folder / RESULTS_FILE).is_file() and (folder / last_file).is_file()


def restored(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """Restores a configuration from the JSON values of `to_dict`.

    Missing options were added later. They get their defaults, which is how the run behaved.

    Raises:
        ValueError: If an option does not belong to the command, or has a value of another type.
    """
    facts = {*FACTS, *ORIGIN, CODE, "masks_digest"}
    values = {name: value for name, value in values.items() if name not in facts}
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]  # All kinds are dataclasses.
    names = {field.name for field in fields}
    if unknown := sorted(values.keys() - names):
        raise ValueError(f"unknown options: {', '.join(unknown)}.")
    types = typing.get_type_hints(kind)
    if wrong := [f"{k} {v!r}" for k, v in values.items() if not _is_of(v, types[k])]:
        raise ValueError(f"options of other types: {', '.join(wrong)}.")
    if values.get("conv_rate") and not networks.has_convolutions(values.get("network") or ""):
        values["conv_rate"] = None  # Written before such rates were refused.
    tuples: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    paths = {k: Path(v) for k, v in tuples.items() if v and Path in _alternatives(types[k])}
    return kind(**tuples | paths)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types that an annotation allows."""
    return typing.get_args(kind) or (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    """Returns whether a JSON value, or what it stands for, has the type of an option."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, list | tuple) and all(_is_of(one, parts[0]) for one in value)
    if parts:  # For a union.
        return any(_is_of(value, part) for part in parts)
    takes = {float: float | int, Path: Path | str}.get(kind, kind)
    return isinstance(value, takes) and isinstance(value, bool) == (kind is bool)


def versions() -> dict[str, str]:
    """Returns the versions of everything that affects the numbers of a run."""
    backend = keras.backend.backend()
    return {
        "lottery-ticket-pruner": lottery_ticket_pruner.__version__,
        "keras": keras.__version__,
        backend: importlib.import_module(backend).__version__,
    }


# --- Folders that are replaced as a whole ---------------------------------------------------------


class Workplace:
    """A folder that only this process writes in, within a `with` block.

    Args:
        folder: Final location of the results.

    Attributes:
        final: The final folder. For a link, the folder that it leads to.
        path: Folder to write to: `final`, or a folder next to it after `replace`.
        moved: The user's files that were kept from replaced folders, as paths relative to `final`.

    Raises:
        FolderInUseError: If another process is writing in the folder.
        OSError: If the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self.final = self.path = folder.resolve() if folder.is_symlink() else folder
        self.moved: list[Path] = []
        self._locks = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._bring_back()
            self._lock = self._locks.enter_context(FolderLock(self.final))
            for left in (self._beside, self._moved_away):
                if (left / REPLACED).exists():
                    self._discard(left)
            if (self.final / REPLACED).exists() and self._beside.is_dir():
                self._exchange()  # The lock is removed with the old content.
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
        """Raises an error if the folder was removed in the meantime.

        Raises:
            FileNotFoundError: If it was removed.
        """
        self._lock.check()

    def replace(self) -> None:
        """Lets new files be written next to the folder, until `complete` replaces the folder."""
        if os.path.ismount(self.final):
            raise ValueError(f"'{self.final}' is a mount point and cannot be replaced.")
        self.path = self._beside
        self._lock = self._locks.enter_context(FolderLock(self.path))

    def complete(self) -> None:
        """Moves the new files in place, and keeps the user's own files of the old folder."""
        if self.path != self.final:
            self._exchange()
            self.path = self.final
            self._lock.moved(self.final)

    def describe_moved(self) -> str:
        """Returns a sentence with the names of `moved`, or an empty one if there are none."""
        names = shortened(self.moved, SHOWN)
        return f"Kept of what was there: {names}" if names else ""

    @property
    def _beside(self) -> Path:
        folder = self.final if self.final.name else self.final.resolve()
        return folder.with_name(f".{folder.name}.new")

    @property
    def _moved_away(self) -> Path:
        """Folder between the two steps of `replace_folder`, on systems that need two."""
        return self._beside.with_name(f"{self._beside.name}.old")

    def _open(self) -> None:
        """Prepares the folder, under the lock."""

    def _bring_back(self) -> None:
        """Completes the two steps of `replace_folder` if a process was killed between them."""
        old, beside = self._moved_away, self._beside
        if self.final.exists() or not old.is_dir():
            return
        with contextlib.ExitStack() as locks:
            for folder in (old, beside):  # Both are locked if that process is alive.
                if folder.is_dir():
                    locks.enter_context(FolderLock(folder))
            if os.name == "nt":  # Open files cannot be moved there.
                locks.close()
            if not self.final.exists():
                os.rename(beside if beside.is_dir() else old, self.final)

    def _exchange(self) -> None:
        if os.name == "nt":  # Open files cannot be moved there.
            self._locks.close()
        (self.final / REPLACED).touch()
        replace_folder(self._beside, self.final)
        self._discard(self._beside)

    def _discard(self, left: Path) -> None:
        """Removes a folder that the final one has replaced, except for the user's own files."""
        stored = read_json(left / CONFIG_FILE)
        command = "sweep" if (left / SWEEP_FILE).is_file() else catalogue.command_of(stored)
        self.moved += move_others(left, self.final, command)
        # The files that identify the folder are removed last. If the process is killed before, the
        # rest must not look like a new run.
        last = ("", CONFIG_FILE, SWEEP_FILE, REPLACED)
        inside = sorted(
            left.iterdir(), key=lambda path: last.index(path.name) if path.name in last else 0
        )
        with contextlib.suppress(OSError):  # The next process removes what remains.
            for path in inside:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            left.rmdir()


# --- Folders of runs ------------------------------------------------------------------------------


class RunFolder(Workplace):
    """The folder of a run, which resumes an interrupted run with the same options.

    Finished runs, and runs with other options, are not changed, unless the configuration says
    `overwrite`. The new run is then written next to them, and replaces them when it is finished.

    Args:
        command: Command of `lottery-ticket` that executes the run.
        config: Configuration of the run.
        data: Data of the run.
        masks: Masks that the run takes from another run, as nested dicts. Its configuration
            contains only their folder.

    Attributes:
        is_finished: Whether the run is already finished, so that there is nothing to do.
        is_interrupted: Whether there are results from which to resume.

    Raises:
        ValueError: If the folder contains a run with other options or of another command, or a
            sweep.
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
            # Only for custom ones: all other folders keep the form that they have always had.
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
        """Executes the run, if it is not finished, and shows the results.

        Args:
            work: Function that is called in the locked folder. It starts the run with `begin` and
                leaves the rows of the results in `results.csv`.
            show: Function that prints these rows.
            console: Console to print to.

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
            files = results_in(self.final, self._command)
            drawn = ", ".join(sorted(file.name for file in files if file.suffix == ".png"))
            what = f", drawn in {drawn}" if drawn else ""
            self._print(f"{time.perf_counter() - started:.0f} s. Results in {self.final}{what}")
        return self.final

    def describe(self) -> str:
        """Returns where results go, and what happens to existing ones."""
        if self.is_finished:
            return (
                f"The run in {self.final} is finished and stays as it is. Use --overwrite to "
                "repeat and replace it."
            )
        if self.is_interrupted:
            return f"Resuming the interrupted run in {self.path}"
        if self.path != self.final:
            return f"Replacing the earlier run in {self.final} when this one is finished"
        return f"Results go to {self.final}"

    def begin(self, heading: str, keep: Sequence[str] = ()) -> None:
        """Writes the configuration. From now on, the results in the folder belong to this run.

        Files left over from an earlier run are removed.

        Args:
            heading: Text that is printed above the location of the results.
            keep: Patterns of files from which an interrupted run is resumed.
        """
        kept = {file for pattern in keep for file in self.path.glob(pattern)}
        for file in results_in(self.path, self._command):
            if not (self.is_interrupted and file in kept):
                file.unlink()
                self._remove_empty(file.parent)
        write_json(self.path / CONFIG_FILE, self._content(finished=False))
        self._print(f"{heading}\n{self.describe()}")

    def keep_initial_weights(self, replicate: int, model: keras.Model) -> None:
        """Writes the initial weights of a seed, unless an interrupted run has already done so.

        Args:
            replicate: Position of the seed.
            model: The model with these weights.
        """
        file = file_of_initial_weights(self.path, replicate)
        if not file.exists():
            paths = records.Architecture.of(model).paths
            file.parent.mkdir(parents=True, exist_ok=True)
            with replacing(file) as whole:
                weights = dict(zip(paths, records.snapshot(model), strict=True))
                np.savez_compressed(whole, allow_pickle=False, **weights)

    def finish(self) -> None:
        """Marks the run as finished, and moves it in place.

        Everything else, and its checksums, are on disk before the mark.

        Raises:
            FileNotFoundError: If its folder was removed in the meantime.
        """
        self.check()
        states = self._states()
        kept = [file for file in results_in(self.path, self._command) if file not in states]
        for file in kept:
            sync(file)
        content = as_bytes(self._content(finished=True))
        checksums.write(self.path, kept, {CONFIG_FILE: content})
        with replacing(self.path / CONFIG_FILE) as whole:
            whole.write(content)
        self._remove_states()
        self.complete()

    def _states(self) -> set[Path]:
        return {file for pattern in _STATES for file in self.path.glob(pattern)}

    def _remove_states(self) -> None:
        """Removes what a finished run needs no more, also if an earlier process was killed here."""
        for file in self._states():
            file.unlink()
        if (seeds := self.path / SEEDS_FOLDER).is_dir():
            shutil.rmtree(seeds, ignore_errors=True)

    def _print(self, text: str) -> None:
        progress.say(self._console, text)

    def _remove_empty(self, folder: Path) -> None:
        """Removes a folder of results, and its parents up to `path`, if they are empty."""
        while folder != self.path and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def _content(self, *, finished: bool) -> dict[str, Any]:
        """Returns what the configuration file contains."""
        return self._values | dict(zip(FACTS, (self._command, finished, versions()), strict=True))

    def _open(self) -> None:
        differing = self._look()
        if (self.is_finished or differing) and self._config.overwrite:
            self.replace()
            differing = self._look()
            if self.is_finished:  # It was killed before it was moved in place.
                try:
                    self._check_results()
                except ValueError:  # It is damaged, so it starts again.
                    self.is_finished = False
                else:
                    self._remove_states()
                    self.complete()
        elif differing:
            raise ValueError(self._refusal(differing))
        elif self.is_finished:
            self._check_results()
            self._remove_states()

    def _check_results(self) -> None:
        check_results(self.path / RESULTS_FILE, self._values | {"command": self._command})

    def _look(self) -> dict[str, tuple[Any, Any]]:
        """Examines the folder, and returns what identifies another run, as (there, here)."""
        self.is_finished = self.is_interrupted = False
        stored = read_json(self.path / CONFIG_FILE)
        if (self.path / SWEEP_FILE).is_file():
            raise ValueError(f"'{self.path}' is the folder of a sweep. Choose another with --out.")
        if (there := catalogue.command_of(stored)) not in (None, self._command):
            raise ValueError(
                f"'{self.path}' holds the results of `lottery-ticket {there}`. Choose another "
                "folder with --out, or delete this one."
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
        states = (f"rounds/*/{STATE_FILE}", f"{SEEDS_FOLDER}/*/*/{CONFIG_FILE}")
        return len(lines) > 1 or any(any(self.path.glob(state)) for state in states)

    def _check_that_nothing_is_lost(self) -> None:
        """Refuses files with the names of results in a folder that does not belong to a run."""
        if (self.path / CONFIG_FILE).exists():
            return
        names = [file.relative_to(self.path) for file in results_in(self.path, self._command)]
        refuse_to_replace(self.path, names, f"{CONFIG_FILE} of a run")

    def _differing(self, stored: Any) -> dict[str, tuple[Any, Any]]:
        if stored is None:
            return {CONFIG_FILE: (None, None)}
        with contextlib.suppress(TypeError, ValueError):  # It has unknown options.
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
            what = f"results, but their options are unknown: its {CONFIG_FILE} {why}"
        elif differing.keys() <= {*ORIGIN, CODE, "masks_digest"}:
            was = ", ".join(f"{name} {there}" for name, (there, _) in differing.items())
            what = f"{state} run of the same options with another {' and '.join(differing)} ({was})"
            if self._unidentified:
                what += f", as far as can be determined. {self._unidentified.rstrip('.')}"
        else:
            shown = [
                f"{name.replace('_', ' ')} {there!r} there, {here!r} here"
                for name, (there, here) in differing.items()
            ]
            what = f"{state} run of other options ({'; '.join(shown)})"
        return (
            f"'{self.final}' holds {what}. Choose another folder with --out, or use --overwrite to "
            "replace it when the new run is finished."
        )
