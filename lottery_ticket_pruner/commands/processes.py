"""Executes runs of `lottery-ticket` in parallel, each in a process with a share of the cores."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import rich.progress
from rich.console import Console

from lottery_ticket_pruner.experiments import progress
from lottery_ticket_pruner.experiments.parent import PARENT

LOG_FILE = "output.log"
_COMMAND = (sys.executable, "-m", "lottery_ticket_pruner.cli")
# Environment variables that limit the thread pools of numerical libraries.
_THREADS = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
)


class Job(Protocol):
    """The interface of a run to its process."""

    @property
    def label(self) -> str:
        """Description of what the run tries."""

    @property
    def arguments(self) -> tuple[str, ...]:
        """Command-line arguments of `lottery-ticket`."""

    @property
    def folder(self) -> Path:
        """Folder of its results and of a file with its output."""

    @property
    def work(self) -> int:
        """Amount of work, in a unit that all jobs share."""

    @property
    def work_done(self) -> int:
        """Amount of work that is done."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """A job that ended with an error.

    Attributes:
        child: The job.
        message: Its last message.
        log: File with its complete output.
    """

    child: Job
    message: str
    log: Path


class Pool:
    """Processes that work on a list of children, one at a time for each share of the cores."""

    def __init__(
        self, todo: Sequence[Job], shares: Sequence[Sequence[int]], console: Console
    ) -> None:
        self._todo = collections.deque(todo)
        self._children = todo
        self._shares = shares
        self._console = console
        self._running: dict[Job, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._ended = 0
        self._failures: list[Failure] = []
        # Runs report once per round, so the speed is averaged over a long time.
        self._bar = progress.bar(console, "{task.percentage:.0f} %", period=3600)

    def run(self) -> list[Failure]:
        """Executes all runs. On an interruption, stops the current ones and raises it again."""
        if not self._children:
            return []
        total = sum(child.work for child in self._children)
        done = sum(child.work_done for child in self._children)
        task = self._bar.add_task("", total=total, completed=done)
        with (
            _termination_interrupts(),
            concurrent.futures.ThreadPoolExecutor(len(self._shares)) as threads,
            self._bar,
        ):
            workers = [threads.submit(self._work, share) for share in self._shares]
            try:
                waiting = set(workers)
                while waiting:
                    _, waiting = concurrent.futures.wait(waiting, timeout=0.5)
                    self._show(task)
            except BaseException:
                self._stop()
                raise
        for worker in workers:
            worker.result()
        order = {child: number for number, child in enumerate(self._children)}
        return sorted(self._failures, key=lambda failure: order[failure.child])

    def _work(self, cores: Sequence[int]) -> None:
        # A process inherits the cores of the thread that starts it, and all backends size their
        # thread pools by these cores. Other systems use the environment variables.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        environment = dict.fromkeys(_THREADS, str(len(cores)))
        # On a GPU, the processes share its memory.
        environment |= {
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        environment = os.environ | (environment if len(self._shares) > 1 else {})
        # Without this, output of a run could appear after its last message, the error.
        environment["PYTHONUNBUFFERED"] = "1"
        environment[PARENT] = "1"
        while True:
            with self._lock:
                if not self._todo:
                    return
                child = self._todo.popleft()
                process, log = self._start(child, environment)
                self._running[child] = process
            started = time.perf_counter()
            status = process.wait()
            self._end(child, status, time.perf_counter() - started, log)

    def _start(
        self, child: Job, environment: dict[str, str]
    ) -> tuple[subprocess.Popen[bytes], Path]:
        child.folder.mkdir(parents=True, exist_ok=True)
        log = child.folder / LOG_FILE
        with log.open("wb") as output:
            process = subprocess.Popen(
                [*_COMMAND, *child.arguments],
                # Nothing is ever written: a run notices the end of this pipe if its sweep is
                # killed.
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        return process, log

    def _end(self, child: Job, status: int, seconds: float, log: Path) -> None:
        with self._lock:
            pipe = self._running.pop(child).stdin
            if pipe is not None:
                pipe.close()
            if self._stopped:
                return
            self._ended += 1
            if status:
                self._failures.append(Failure(child, _message(log, status), log))
        outcome = "failed" if status else f"{seconds:.0f} s"
        text = f"{self._ended} of {len(self._children)}  {child.label}: {outcome}"
        self._console.print(text, highlight=False, markup=False)

    def _show(self, task: rich.progress.TaskID) -> None:
        with self._lock:
            running, ended = list(self._running), self._ended
            left = {*running, *self._todo}
        done = sum(c.work_done if c in left else c.work for c in self._children)
        text = f"{ended} of {len(self._children)} runs, {len(running)} running"
        self._bar.update(task, completed=done, description=text)

    def _stop(self) -> None:
        with self._lock:
            self._todo.clear()
            self._stopped = True
            for process in self._running.values():
                process.terminate()


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C, so that no run outlives its sweep."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def available_cores() -> list[int]:
    """Returns the numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def shares_of(cores: Sequence[int], jobs: int) -> list[Sequence[int]]:
    """Returns the cores of each job: all of them, and none twice if there are enough."""
    if not jobs or jobs >= len(cores):
        return [[cores[number % len(cores)]] for number in range(jobs)]
    edges = [len(cores) * number // jobs for number in range(jobs + 1)]
    return [cores[start:end] for start, end in itertools.pairwise(edges)]


def _message(log: Path, status: int) -> str:
    """Returns the last message of a process, without the traceback above it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    # Below the message of the command, there may be the traceback of a user's function.
    said = [line for line in lines if line.startswith("lottery-ticket: ")] or lines
    last = said[-1].removeprefix("lottery-ticket: ") if said else ""
    if status < 0:
        return f"ended by {signal.Signals(-status).name}. {last}".strip()
    return last or f"exit status {status}"
