"""Chooses the executor of a command by its options: processes of this machine, or a cluster."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from lottery_ticket_pruner.checks import require_extra
from lottery_ticket_pruner.commands.clusters import ClusterExecutor
from lottery_ticket_pruner.commands.engines import DaskEngine, Engine, RayEngine, SlurmEngine
from lottery_ticket_pruner.commands.jobs import Executor
from lottery_ticket_pruner.commands.processes import LocalExecutor
from lottery_ticket_pruner.experiments import devices

# Folder in that of the sweep for the files of submitit.
_SLURM_FOLDER = ".slurm"
_PACKAGES = {"ray": "ray", "slurm": "submitit", "dask": "distributed"}


class ExecutorOptions(Protocol):
    """The options of a command that say where its jobs are executed."""

    @property
    def executor(self) -> str | None:
        """Name of an executor, or None if none was chosen."""

    @property
    def address(self) -> str | None:
        """Address of a cluster."""

    @property
    def executor_option(self) -> Sequence[str]:
        """Requests of a job to a cluster, each as name=value."""

    @property
    def jobs(self) -> int | None:
        """Number of jobs at a time."""


def check(options: ExecutorOptions) -> None:
    """Checks the options before anything is done.

    Raises:
        MissingExtraError: If the package for a cluster is not installed.
        ValueError: If options contradict each other.
    """
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"--jobs must be positive. Received: {options.jobs}.")
    given = _parsed(options.executor_option)
    name = options.executor or "local"
    if name in _PACKAGES:
        require_extra(name, _PACKAGES[name])
    elif given:
        raise ValueError("--executor-option needs --executor ray, slurm or dask.")
    if options.address is not None and name not in ("ray", "dask"):
        raise ValueError("--address needs --executor ray or dask.")


def check_devices(options: ExecutorOptions, names: Sequence[str], batch_size: int) -> None:
    """Checks whether a job can train on several devices, before anything is done.

    On a cluster, the job itself looks for them on its machine.

    Args:
        options: The options of the command.
        names: The devices of the job, as in --devices. Empty for training as usual.
        batch_size: Its number of examples per step of training.

    Raises:
        ValueError: If it cannot.
    """
    if (options.executor or "local") != "local":
        devices.check_request(names, batch_size)
        return
    if names and options.jobs != 1:
        raise ValueError("--devices: several jobs at a time would share them. Add --jobs 1.")
    devices.check(names, batch_size)


def executor_of(options: ExecutorOptions, folder: Path, console: Console) -> Executor:
    """Returns what executes the jobs of a command, to be entered by `with`.

    Args:
        options: The options.
        folder: Folder of the command's results, which contains those of its jobs.
        console: Where to print.
    """
    given = _parsed(options.executor_option)
    engine: Engine
    match options.executor:
        case "ray":
            engine = RayEngine(options.address, given)
        case "slurm":
            engine = SlurmEngine(folder.absolute() / _SLURM_FOLDER, given)
        case "dask":
            engine = DaskEngine(options.address, given)
        case _:
            return LocalExecutor(options.jobs, console)
    return ClusterExecutor(engine, folder, options.jobs, console)


def _parsed(texts: Sequence[str]) -> dict[str, Any]:
    """Returns the values by name: JSON where they are, such as numbers, and text elsewhere.

    Raises:
        ValueError: If a text is malformed, or a name is given twice.
    """
    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or name in found:
            raise ValueError(
                "--executor-option expects NAME=VALUE, each name once, as in num_gpus=1. "
                f"Received: {text!r}."
            )
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found
