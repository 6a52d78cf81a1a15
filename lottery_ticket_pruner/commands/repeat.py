"""The command `lottery-ticket repeat`: runs the experiment of a run folder again."""

import dataclasses
from pathlib import Path
from typing import Any

from _lottery_ticket import commands as options
from lottery_ticket_pruner.experiments import catalogue, datasets, own
from lottery_ticket_pruner.experiments.config import Experiment
from lottery_ticket_pruner.experiments.identifiers import code_of
from lottery_ticket_pruner.experiments.results import (
    CODE,
    CONFIG_FILE,
    SWEEP_FILE,
    missing_folder,
    read_json,
    reason,
)
from lottery_ticket_pruner.experiments.run_folder import restored, versions
from masked_layers.files import FileContentError


@dataclasses.dataclass(frozen=True)
class RepeatConfig(options.RepeatOptions):
    """Options of `lottery-ticket repeat`."""

    @property
    def place(self) -> Path:
        """The folder, also if its config.json was named."""
        return self.folder.parent if self.folder.is_file() else self.folder

    def configuration(self) -> Experiment:
        """Returns the configuration to run.

        Raises:
            OSError: If the file does not exist.
            FileContentError: If the file was not written by one of the commands.
            ValueError: If its functions have other code now.
        """
        file = self._file()
        folder = file.parent.resolve()
        # In the folder of a sweep, it would look like one of its runs.
        beside = folder.parent if (folder.parent / SWEEP_FILE).is_file() else folder
        options = {
            "out": self.out or beside.with_name(f"{folder.name}-again"),
            "quiet": self.quiet,
            "overwrite": self.overwrite,
        }
        try:
            config = read((stored := _stored(file)) | options)
        except (AttributeError, TypeError, ValueError) as error:
            raise FileContentError(
                f"'{file}' is not the configuration of a run: {error}"
            ) from error
        there = stored.get(CODE)
        if there is not None and datasets.is_own(config.data):
            own.import_module_of(config.data)  # It may register them.
        if there is not None and there != (here := code_of(config.to_dict())):
            raise ValueError(
                f"'{file}' uses functions with other code: {there} there, {here or 'none'} here."
            )
        return config

    def _file(self) -> Path:
        if not self.folder.exists():
            raise missing_folder(self.folder, "that of a run to repeat")
        file = self.folder / CONFIG_FILE if self.folder.is_dir() else self.folder
        if not file.is_file():
            of_sweep = (self.folder / SWEEP_FILE).is_file()
            what = (
                "the folder of a sweep: name one of the runs inside it"
                if of_sweep
                else f"not a run folder: it holds no {CONFIG_FILE}"
            )
            raise ValueError(f"'{self.folder}' is {what}.")
        return file


def _stored(file: Path) -> dict[str, Any]:
    if (values := read_json(file)) is None:
        raise ValueError(f"it {reason(file)}. Restore it from a copy.")
    return values


def read(values: dict[str, Any]) -> Experiment:
    """Returns the configuration stored in a run folder.

    Raises:
        ValueError: If the values belong to no command, or contain options that the command does not
            have.
    """
    command = catalogue.command_of(values)
    if command is None or command not in catalogue.KINDS:
        raise ValueError(f"expected the options of {', '.join(catalogue.KINDS)}.")
    try:
        return restored(catalogue.KINDS[command].config, values)
    except ValueError as error:
        wrote = ", ".join(f"{name} {text}" for name, text in values.get("versions", {}).items())
        now = ", ".join(f"{name} {text}" for name, text in versions().items())
        raise ValueError(
            f"{error} Written by {wrote or 'an earlier version'}; here: {now}."
        ) from error
