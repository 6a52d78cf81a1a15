"""The same experiment once more, from the configuration that a run folder holds."""

import dataclasses
import json
import typing
from pathlib import Path
from typing import Any

import tyro

from lottery_ticket_pruner.experiments import networks
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.options import OptionalPath
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, ORIGIN, SWEEP_FILE
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

Config = RunConfig | SupermaskConfig | InstabilityConfig


@dataclasses.dataclass(frozen=True)
class RepeatConfig:
    """Do once more what made a run folder, with every option as it was.

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
    quiet: bool = False
    """Print nothing."""

    def configuration(self) -> Config:
        """The configuration to run.

        Raises:
            OSError: there is no such file.
            ValueError: the file is not what one of the commands has written.
        """
        file = self.folder / CONFIG_FILE if self.folder.is_dir() else self.folder
        folder = file.parent.resolve()
        # In the folder of a sweep it would pass for one of its runs.
        beside = folder.parent if (folder.parent / SWEEP_FILE).is_file() else folder
        options = {
            "out": self.out or beside.with_name(f"{folder.name}-again"),
            "quiet": self.quiet,
        }
        try:
            stored = json.loads(file.read_text(encoding="utf-8"))
            return read(stored | options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"'{file}' holds no configuration of a run: {error}") from error


def read(values: dict[str, Any]) -> Config:
    """The configuration that `to_dict` made values of JSON from.

    Raises:
        ValueError: an option is missing or is none of the command's.
    """
    values = {name: value for name, value in values.items() if name not in ORIGIN}
    if values.get("conv_rate") and not networks.has_convolutions(values.get("network")):
        values["conv_rate"] = None  # Written before such rates were refused.
    kinds = typing.get_args(Config)
    kind = min(kinds, key=lambda kind: len(_names(kind) ^ values.keys()))
    if wrong := sorted(_names(kind) ^ values.keys()):
        raise ValueError(f"expected the options of a run, and these differ: {', '.join(wrong)}.")
    tuples = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    paths = {k: Path(tuples[k]) for k in ("data_dir", "out", "masks") if tuples.get(k)}
    return kind(**tuples | paths)


def _names(kind: type[Config]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)}
