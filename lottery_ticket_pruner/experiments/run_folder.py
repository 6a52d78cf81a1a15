"""The folder of a run: whose it is, whether it is finished, and how another takes its place."""

import contextlib
import dataclasses
import importlib
import json
import os
import shutil
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import keras

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
    complete_lines,
)
from lottery_ticket_pruner.fingerprints import UnidentifiedError, digest
from lottery_ticket_pruner.folders import FolderLock
from masked_layers.files import replace_folder, replacing

if TYPE_CHECKING:
    from lottery_ticket_pruner.experiments.config import RunConfig
    from lottery_ticket_pruner.experiments.instability import InstabilityConfig
    from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

    Config = RunConfig | SupermaskConfig | InstabilityConfig

_Kind = TypeVar("_Kind")

# Marks a folder that another one is about to replace, or has replaced.
_REPLACED = ".replaced"
# What folders had before they said so themselves: an option of the command, its last file.
_SIGNS = {
    "run": ("rounds", "accuracy.png"),
    "supermask": ("learn", "curves-1.png"),
    "instability": ("points", "instability.png"),
}
_EARLIER_STATE = "state.json"
# From these an interrupted run goes on.
_STATES = tuple(f"rounds/*/{name}" for name in ("state.json", "pruner-*.npz", "model-*.npz"))


# --- What a folder says ---------------------------------------------------------------------------


def read_json(file: Path) -> Any:
    """The content of a file; None where there is none that can be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    """Writes a file that is complete or not there."""
    with replacing(file) as whole:
        whole.write((json.dumps(values, indent=2) + "\n").encode())


def command_of(config: Any) -> str | None:
    """The command that wrote a configuration, if that can be told."""
    if not isinstance(config, dict):
        return None
    guessed = (name for name, (option, _) in _SIGNS.items() if option in config)
    return config.get("command") or next(guessed, None)


def is_finished(folder: Path, command: str | None = None) -> bool:
    """Returns whether a folder holds all results of a run.

    Args:
        folder: The folder.
        command: What wrote it, if it does not say so.
    """
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config, dict) or not (folder / RESULTS_FILE).is_file():
        return False
    if "finished" in config:
        return bool(config["finished"])
    _, last_file = _SIGNS.get(command_of(config) or command, ("", "?"))
    return (folder / last_file).is_file()


def restored(kind: type[_Kind], values: Mapping[str, Any]) -> _Kind:
    """The configuration that `to_dict` made values of JSON from.

    An option that the values lack came later: it has its default, which is what was done before.

    Raises:
        ValueError: an option is none of the command's, or has a value of another type.
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
        final: That folder.
        path: Where to write: `final`, or after `replace` a folder beside it.

    Raises:
        FolderInUseError: Another process writes in it.
        OSError: It cannot be made or written.
    """

    def __init__(self, folder: Path) -> None:
        self.final = self.path = folder
        self._locks = contextlib.ExitStack()
        self._lock: FolderLock | None = None

    def __enter__(self) -> Self:
        final, beside = self.final, self._beside
        old = beside.with_name(f"{beside.name}.old")
        if not final.exists() and old.is_dir():
            # Killed between the two steps of `replace_folder`, where the system needs two.
            os.rename(beside if beside.is_dir() else old, final)
        try:
            self._lock = self._locks.enter_context(FolderLock(final))
            for left in (beside, old):
                if (left / _REPLACED).exists():
                    shutil.rmtree(left)
            if (final / _REPLACED).exists() and beside.is_dir():
                self._exchange()  # The lock goes with what was there.
                self._lock = self._locks.enter_context(FolderLock(final))
            (final / _REPLACED).unlink(missing_ok=True)
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
        """Puts what was written in its place; what was there before is gone then."""
        if self.path != self.final:
            self._exchange()
            self.path = self.final
            self._lock.moved(self.final)

    @property
    def _beside(self) -> Path:
        folder = self.final if self.final.name else self.final.resolve()
        return folder.with_name(f".{folder.name}.new")

    def _open(self) -> None:
        """Prepares the folder, under the lock."""

    def _exchange(self) -> None:
        if os.name == "nt":  # Nothing moves there that is open.
            self._locks.close()
        (self.final / _REPLACED).touch()
        replace_folder(self._beside, self.final)
        shutil.rmtree(self._beside, ignore_errors=True)


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

    def __init__(self, command: str, config: "Config", data: Dataset, masks: Any = None) -> None:
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
        self._replaces_another = False

    def describe(self) -> str:
        """Decides where results go and what becomes of those that are there."""
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

    def begin(self, patterns: Sequence[str], keep: Sequence[str] = ()) -> None:
        """Writes the configuration; from here on the results in the folder are of this run.

        Args:
            patterns: What a run writes: all that is left of an earlier one is removed.
            keep: Patterns of what an interrupted run goes on from.
        """
        kept = {file for pattern in keep for file in self.path.glob(pattern)}
        for pattern in (*patterns, _EARLIER_STATE):
            for file in self.path.glob(pattern):
                if not (self.is_interrupted and file in kept):
                    file.unlink()
        self._write(finished=False)

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

    def _write(self, *, finished: bool) -> None:
        facts = dict(zip(FACTS, (self._command, finished, versions()), strict=True))
        write_json(self.path / CONFIG_FILE, self._values | facts)

    def _open(self) -> None:
        differing = self._look()
        if (self.is_finished or differing) and self._config.overwrite:
            self.replace()
            differing = self._look()
            if self.is_finished:  # And was killed before it took its place.
                self.complete()
        elif differing:
            raise ValueError(self._refusal(differing))

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
        if not self._has_results():
            return {}
        differing = self._differing(stored)
        if not differing:
            self.is_finished = is_finished(self.path, self._command)
            self.is_interrupted = not self.is_finished
        return differing

    def _has_results(self) -> bool:
        lines = complete_lines(self.path / RESULTS_FILE)
        return len(lines) > 1 or any(self.path.glob("rounds/*/state.json"))

    def _differing(self, stored: Any) -> dict[str, tuple[Any, Any]]:
        if not isinstance(stored, dict):
            return {CONFIG_FILE: ("not readable", "the options of this run")}
        with contextlib.suppress(TypeError, ValueError):  # It has options that are unknown here.
            complete = restored(type(self._config), stored).resolve(self._images).to_dict()
            stored = json.loads(json.dumps(complete)) | stored
        earlier = read_json(self.path / _EARLIER_STATE)
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
        if differing.keys() <= {*ORIGIN, CODE, "masks_digest"}:
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
