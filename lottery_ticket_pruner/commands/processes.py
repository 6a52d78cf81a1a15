"""Executes runs of `lottery-ticket` in parallel, each in a process with a share of the cores."""

import collections
import concurrent.futures
import itertools
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from rich.console import Console

from _lottery_ticket.jobs import COMMAND, LOG_FILE, SETTINGS, THREADS
from lottery_ticket_pruner.commands.jobs import (
    Board,
    Failure,
    Job,
    message_of,
    termination_interrupts,
)

_COMMAND = (sys.executable, *COMMAND)


class LocalExecutor:
    """Processes of this machine.

    Args:
        jobs: Number of jobs at a time. None for one per core.
        console: Where to print.
    """

    def __init__(self, jobs: int | None, console: Console) -> None:
        self._jobs = jobs
        self._console = console
        self._cores = available_cores()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def pace(self, jobs: int) -> str:
        """Returns how many of so many jobs are executed at a time, and where."""
        return f"{self._at_once(jobs)} at a time on {len(self._cores)} cores"

    def run(self, todo: Sequence[Job]) -> list[Failure]:
        """Executes jobs, and returns those that failed."""
        return Pool(todo, shares_of(self._cores, self._at_once(len(todo))), self._console).run()

    def _at_once(self, jobs: int) -> int:
        return min(self._jobs or len(self._cores), jobs)


class Pool:
    """Processes that work on a list of children, one at a time for each share of the cores."""

    def __init__(
        self, todo: Sequence[Job], shares: Sequence[Sequence[int]], console: Console
    ) -> None:
        self._todo = collections.deque(todo)
        self._shares = shares
        self._running: dict[Job, subprocess.Popen[bytes]] = {}
        self._lock = threading.Lock()
        self._stopped = False
        self._board = Board(todo, console)

    def run(self) -> list[Failure]:
        """Executes all runs. On an interruption, stops the current ones and raises it again."""
        if not self._todo:
            return []
        with (
            termination_interrupts(),
            concurrent.futures.ThreadPoolExecutor(len(self._shares)) as threads,
            self._board,
        ):
            workers = [threads.submit(self._work, share) for share in self._shares]
            try:
                waiting = set(workers)
                while waiting:
                    _, waiting = concurrent.futures.wait(waiting, timeout=0.5)
                    with self._lock:
                        running = list(self._running)
                    self._board.show(running)
            except BaseException:
                self._stop()
                raise
        for worker in workers:
            worker.result()
        return self._board.failures

    def _work(self, cores: Sequence[int]) -> None:
        # A process inherits the cores of the thread that starts it, and all backends size their
        # thread pools by these cores. Other systems use the environment variables.
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, cores)
        environment = dict.fromkeys(THREADS, str(len(cores)))
        # On a GPU, the processes share its memory.
        environment |= {
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        environment = os.environ | (environment if len(self._shares) > 1 else {})
        environment |= SETTINGS
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
            failed = Failure(child, message_of(log, status), log) if status else None
            self._board.end(child, failed or f"{seconds:.0f} s")

    def _stop(self) -> None:
        with self._lock:
            self._todo.clear()
            self._stopped = True
            for process in self._running.values():
                process.terminate()


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
