"""The same experiment once more, from the configuration that a run folder holds."""

import dataclasses
from pathlib import Path
from typing import Any

import tyro

from lottery_ticket_pruner.experiments.config import RunConfig, code_of
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.options import OptionalPath
from lottery_ticket_pruner.experiments.results import (
    CODE,
    CONFIG_FILE,
    SWEEP_FILE,
    read_json,
    reason,
)
from lottery_ticket_pruner.experiments.run_folder import command_of, restored, versions
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

Config = RunConfig | SupermaskConfig | InstabilityConfig


@dataclasses.dataclass(frozen=True)
class RepeatConfig:
    """Do once more what made a run folder, with every option as it was.

    An option that came later than the folder has its default.

    For folders of run, supermask and instability, and those of single runs within a sweep's. If the
    first time was --deterministic, the second gives the same numbers, bit for bit, on as
    many cores of the same machine, by the same backend on the same data. A sweep gives each of its
    runs a share of the cores.
    """

    folder: tyro.conf.Positional[Path]
    """Folder of the run, or its config.json alone."""
    out: OptionalPath = None
    """Folder for the new run; by default the old one's name with -again, next to it or, if it is \
in a sweep's, next to that."""
    overwrite: bool = False
    """Replace the run that is in the new run's folder, when this one is finished."""
    quiet: bool = False
    """Print nothing."""

    def configuration(self) -> Config:
        """The configuration to run.

        Raises:
            OSError: there is no such file.
            ValueError: the file is not what one of the commands has written.
        """
        file = self._file()
        folder = file.parent.resolve()
        # In the folder of a sweep it would pass for one of its runs.
        beside = folder.parent if (folder.parent / SWEEP_FILE).is_file() else folder
        options = {
            "out": self.out or beside.with_name(f"{folder.name}-again"),
            "quiet": self.quiet,
            "overwrite": self.overwrite,
        }
        try:
            config = read((stored := _stored(file)) | options)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"'{file}' holds no configuration of a run: {error}") from error
        there = stored.get(CODE)
        if there is not None and there != (here := code_of(config.to_dict())):
            raise ValueError(
                f"'{file}' is of functions with other code: {there} there, {here or 'none'} here."
            )
        return config

    def _file(self) -> Path:
        if not self.folder.exists():
            raise FileNotFoundError(f"There is no folder '{self.folder}' of a run to repeat.")
        file = self.folder / CONFIG_FILE if self.folder.is_dir() else self.folder
        if not file.is_file():
            of_sweep = (self.folder / SWEEP_FILE).is_file()
            what = (
                "the folder of a sweep: name one of those in it"
                if of_sweep
                else f"not a run folder: it holds no {CONFIG_FILE}"
            )
            raise ValueError(f"'{self.folder}' is {what}.")
        return file


def _stored(file: Path) -> dict[str, Any]:
    if (values := read_json(file)) is None:
        raise ValueError(f"it {reason(file)}. Restore it from a copy.")
    return values


def read(values: dict[str, Any]) -> Config:
    """The configuration that a run folder holds.

    Raises:
        ValueError: it is that of no command, or has options that the command does not have.
    """
    kinds = {"run": RunConfig, "supermask": SupermaskConfig, "instability": InstabilityConfig}
    command = command_of(values)
    if command not in kinds:
        raise ValueError(f"expected the options of {', '.join(kinds)}.")
    try:
        return restored(kinds[command], values)
    except ValueError as error:
        wrote = ", ".join(f"{name} {text}" for name, text in values.get("versions", {}).items())
        now = ", ".join(f"{name} {text}" for name, text in versions().items())
        raise ValueError(
            f"{error} Written by {wrote or 'an earlier version'}; here: {now}."
        ) from error
