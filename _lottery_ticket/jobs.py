"""The job of a worker of a cluster: one command line of `lottery-ticket`, in its own folder.

A worker imports this module alone, so it needs the package, but it does not import Keras: the
command line is a process of its own. Everything that the sweep and its workers tell each other is
in files that both see.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Tells a run that its standard input stays open while the process that started it is alive.
PARENT = "LOTTERY_TICKET_ENDS_WITH_STDIN"
# How each job is executed. Its output is a file that other machines read, in which its last message
# must not appear before other output.
SETTINGS = {
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8:backslashreplace",
    PARENT: "1",
}
LOG_FILE = "output.log"
STARTS_FILE = ".starts.json"
COMMAND = ("-m", "lottery_ticket_pruner.cli")
# Environment variables that limit the thread pools of numerical libraries.
THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)
# Packages whose versions affect the results of a run.
_PACKAGES = ("lottery-ticket-pruner", "keras", "tensorflow", "jax", "torch")
_POLL = 1.0
# Seconds between two changes of the marker, after which the sweep counts as dead. Network file
# systems may show a change a minute late.
BEAT, PATIENCE = 10.0, 180.0
_GRACE = 10.0


@dataclasses.dataclass(frozen=True)
class Call:
    """A job as a worker receives it.

    Attributes:
        command: Arguments of Python that start `lottery-ticket`.
        arguments: Command-line arguments of `lottery-ticket`.
        folder: Its existing folder, as an absolute path.
        marker: File that is there, and changes, while the sweep is alive.
        directory: Working directory of the sweep, to which paths in the arguments are relative.
        environment: Environment variables of the run, next to those of the worker.
        starts: How often the job may be started, however often workers die.
        threads: Number of threads of the run. None for as many as the machine has cores.
    """

    command: tuple[str, ...]
    arguments: tuple[str, ...]
    folder: str
    marker: str
    directory: str
    environment: Mapping[str, str]
    starts: int
    threads: int | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The end of a job.

    Attributes:
        status: Exit status of the command. None if it was not executed to its end.
        host: Name of the machine.
        seconds: Elapsed time.
        unseen: Path that the worker does not see. Nothing was started then.
        refused: Why the worker cannot write in the folder. Nothing was started then, either.
        worn_out: Whether the job was started too often. Nothing was started then, either.
    """

    status: int | None
    host: str
    seconds: float = 0.0
    unseen: str = ""
    refused: str = ""
    worn_out: bool = False


def execute(call: Call) -> Outcome:
    """Executes a job, and ends it when its sweep ends.

    Returns:
        How it ended. An error of the command is an outcome, not an exception.
    """
    host = socket.gethostname()
    for path in (call.marker, call.folder, call.directory):
        if not os.path.exists(path):
            return Outcome(None, host, unseen=path)
    folder, marker = Path(call.folder), Path(call.marker)
    count = starts(folder, marker) + 1
    if count > call.starts:
        return Outcome(None, host, worn_out=True)
    facts = {"marker": marker.name, "count": count, "host": host, "pid": os.getpid()}
    try:
        _write_starts(folder, {**facts, "versions": versions()})
        output = (folder / LOG_FILE).open("wb" if count == 1 else "ab")
    except OSError as error:
        return Outcome(None, host, refused=str(error))
    threads = {} if call.threads is None else dict.fromkeys(THREADS, str(call.threads))
    environment = {
        **os.environ,
        **threads,
        **call.environment,
        **SETTINGS,
    }
    started = time.monotonic()
    with output:
        process = subprocess.Popen(
            [sys.executable, *call.command, *call.arguments],
            # Nothing is ever written: the run notices the end of this pipe if the worker is killed.
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=call.directory,
            env=environment,
        )
    try:
        status = _wait(process, marker)
    finally:
        _end(process)
    return Outcome(status, host, time.monotonic() - started)


def execute_on_dask(call: Call) -> Outcome:
    """Executes a job with the share of the cores that a thread of dask's workers has.

    The workers of a machine do not know each other, but the scheduler knows all of them.
    """
    from dask.system import CPU_COUNT
    from distributed import get_client, get_worker
    from distributed.comm import get_address_host

    host = get_address_host(get_worker().address)
    workers = get_client().nthreads().items()
    together = sum(count for address, count in workers if get_address_host(address) == host)
    threads = max(1, CPU_COUNT // max(1, together))
    return execute(dataclasses.replace(call, threads=threads))


def starts(folder: Path, marker: Path) -> int:
    """Returns how often workers have started a job for the sweep with a marker."""
    return last_start(folder, marker).get("count", 0)


def versions() -> dict[str, str]:
    """Returns the versions that affect the results of a run, without importing the packages."""
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def last_start(folder: Path, marker: Path) -> dict[str, Any]:
    """Returns where and how a job was last started. Empty if it was not."""
    try:
        found = json.loads((folder / STARTS_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("marker") == marker.name else {}


def _write_starts(folder: Path, values: Mapping[str, Any]) -> None:
    new = folder / f"{STARTS_FILE}.new"
    new.write_text(json.dumps(values))
    new.replace(folder / STARTS_FILE)


def _wait(process: subprocess.Popen[bytes], marker: Path) -> int | None:
    """Returns the exit status, or None if the sweep ended before the process did."""
    last, changed, missed = b"", time.monotonic(), 0
    while True:
        try:
            return process.wait(_POLL)
        except subprocess.TimeoutExpired:
            pass
        try:
            content = marker.read_bytes()
            missed = 0
        except FileNotFoundError:
            missed += 1
        except OSError:  # A network file system that is slow to answer.
            continue
        else:
            if content != last:
                last, changed = content, time.monotonic()
        # Twice, because a network file system may miss a file for a moment.
        if missed > 1 or time.monotonic() - changed > PATIENCE:
            return None


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
