"""Executes runs of `lottery-ticket` on a cluster, and starts those again whose workers die.

The cluster's own library decides where a job runs (`engines.py`). How far jobs are, and whether the
sweep is alive, are files in the folder of the sweep, which all workers have to see.
"""

import collections
import contextlib
import dataclasses
import os
import secrets
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import keras
from rich.console import Console

from _lottery_ticket.jobs import (
    BEAT,
    COMMAND,
    LOG_FILE,
    STARTS_FILE,
    THREADS,
    Call,
    Outcome,
    last_start,
    starts,
    versions,
)
from lottery_ticket_pruner.commands.engines import Engine, EngineError, LostError
from lottery_ticket_pruner.commands.jobs import (
    Board,
    Failure,
    Job,
    message_of,
    termination_interrupts,
)

# How often a job is started again after its worker died.
RETRIES = 2
MARKER = ".cluster-"
_POLL = 0.5
# Environment variables that runs on other machines get, too.
_PASSED_ON = ("KERAS_", "TF_", "JAX_", "XLA_")
# Seconds after which a sweep says that nothing has started; until cancelled jobs have ended; and
# that jobs of an interrupted sweep get to notice that another one begins.
_SILENCE, _CANCELLING, _LEFTOVERS = 60.0, 30.0, 15.0
# Seconds between two looks at the workers of a cluster; and after which the sweep ends if there was
# one, but none is left.
_LOOK, _DESERTED = 10.0, 900.0


class NotSharedError(ValueError):
    """A worker does not see the folder of a sweep or the working directory, or cannot write."""


@dataclasses.dataclass
class _Submitted:
    """A job on the cluster.

    Attributes:
        handle: What the engine calls it.
        times: How often it was submitted.
        shown: Number of starts that were shown.
        before: Number of starts before it was last submitted.
    """

    handle: Any
    times: int = 1
    shown: int = 1
    before: int = 0


class _Workers:
    """Watches whether a cluster that had workers still has one.

    The first one is waited for as long as it takes, because some clusters start workers on demand.

    Args:
        engine: The cluster's library.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._looked = -_LOOK
        self._had_some = self._said = False
        self._gone_since: float | None = None

    def are_gone(self, board: Board) -> bool:
        """Returns whether no worker was left at the last look, and says so after a minute.

        Raises:
            EngineError: If none has come back for too long.
        """
        if time.monotonic() - self._looked >= _LOOK:
            self._looked = time.monotonic()
            self._look(board)
        if self._gone_since is None:
            return False
        away = time.monotonic() - self._gone_since
        if away > _DESERTED:
            raise EngineError(
                f"No worker has come back for {_DESERTED / 60:.0f} minutes on "
                f"{self._engine.demand}. Finished runs stay; give the same command again when "
                "there are workers."
            )
        if away > _SILENCE and not self._said:
            self._said = True
            board.say(
                f"No worker is left on {self._engine.demand}. If none comes back, the sweep ends "
                f"{_DESERTED / 60:.0f} minutes after the last one left."
            )
        return True

    def _look(self, board: Board) -> None:
        count = self._engine.workers()
        if count:
            if self._said:
                board.say(f"There are workers again on {self._engine.description}.")
            self._had_some, self._said, self._gone_since = True, False, None
        elif count == 0 and self._had_some and self._gone_since is None:
            self._gone_since = time.monotonic()


class ClusterExecutor:
    """A cluster with a shared file system.

    Args:
        engine: The cluster's library.
        folder: Folder of the sweep.
        jobs: Number of jobs that are submitted at a time. None for the engine's choice.
        console: Where to print.

    Attributes:
        retries: How often jobs were started again.
    """

    def __init__(self, engine: Engine, folder: Path, jobs: int | None, console: Console) -> None:
        self.retries = 0
        self._engine = engine
        self._folder = folder.absolute()
        self._jobs = jobs
        self._console = console
        self._marker = self._folder / f"{MARKER}{secrets.token_hex(4)}"
        self._beats, self._beaten = 0, -BEAT
        self._workers = _Workers(engine)
        self._submitted: dict[Job, _Submitted] = {}
        self._hosts: set[str] = set()

    def __enter__(self) -> Self:
        self._engine.open()
        return self

    def __exit__(self, *_: object) -> None:
        self._marker.unlink(missing_ok=True)
        self._engine.close()

    def pace(self, jobs: int) -> str:
        """Returns how many of so many jobs are executed at a time, and where."""
        limit = self._limit(jobs)
        number = f"{limit} at a time" if limit < jobs else "as many at a time as there is room for"
        return f"{number} on {self._engine.description}"

    def run(self, todo: Sequence[Job]) -> list[Failure]:
        """Executes jobs, and returns those that failed.

        Raises:
            NotSharedError: If a worker does not see the folder, or cannot write in it.
            EngineError: If the cluster cannot execute any job, or its connection breaks.
        """
        if not todo:
            return []
        self._end_leftovers()
        self._beat()
        waiting, before = collections.deque(todo), self.retries
        board = Board(todo, self._console)
        with termination_interrupts(), board:
            try:
                self._work(waiting, self._limit(len(todo)), board)
            except BaseException:
                self._cancel(board)
                raise
        if self.retries > before:
            board.say(f"Jobs started again because their workers died: {self.retries - before}")
        return board.failures

    def _limit(self, jobs: int) -> int:
        return min(self._jobs or self._engine.at_once or jobs, jobs)

    def _work(self, waiting: collections.deque[Job], limit: int, board: Board) -> None:
        idle_since: float | None = time.monotonic()
        while waiting or self._submitted:
            while waiting and len(self._submitted) < limit:
                job = waiting.popleft()
                job.folder.mkdir(parents=True, exist_ok=True)
                self._submitted[job] = _Submitted(self._engine.submit(self._call(job)))
            self._beat()
            for job in list(self._submitted):
                self._look_at(job, board)
            gone = self._workers.are_gone(board)
            # A job that was started counts as running until its worker is missed.
            running = [
                job
                for job, submitted in self._submitted.items()
                if not gone and starts(job.folder, self._marker) > submitted.before
            ]
            board.show(running)
            if running or gone:
                idle_since = time.monotonic()
            elif idle_since is not None and time.monotonic() - idle_since > _SILENCE:
                idle_since = None  # Said once.
                board.say(f"No job has started for {_SILENCE:.0f} s on {self._engine.demand}.")
            time.sleep(_POLL)

    def _call(self, job: Job) -> Call:
        environment = {
            # On a GPU, jobs may share its memory.
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            **{
                name: value
                for name, value in os.environ.items()
                if name.startswith(_PASSED_ON) and name not in THREADS
            },
            "KERAS_BACKEND": keras.backend.backend(),
        }
        return Call(
            COMMAND,
            job.arguments,
            str(job.folder.absolute()),
            str(self._marker),
            os.getcwd(),
            environment,
            starts=1 + RETRIES,
            threads=self._engine.threads,
        )

    def _look_at(self, job: Job, board: Board) -> None:
        """Notes whether a job has ended, or was started again."""
        submitted = self._submitted[job]
        lost, outcome = "", None
        try:
            outcome = self._engine.outcome(submitted.handle)
        except LostError as error:
            lost = str(error)
        start = last_start(job.folder, self._marker)
        self._compare_versions(start, board)
        if (count := start.get("count", 0)) > submitted.shown:
            # Some clusters start jobs again by themselves.
            self.retries += count - submitted.shown
            submitted.shown = count
            where = start["host"]
            board.say(f"{job.label}: its worker died; start {count} of {1 + RETRIES}, on {where}")
        if outcome is not None:
            self._end(job, outcome, board)
        elif lost and submitted.times > RETRIES:
            self._fail(job, f"its worker died {submitted.times} times: {lost}", board)
        elif lost:
            submitted.handle = self._engine.submit(self._call(job))
            board.say(f"{job.label}: lost with its worker, and submitted again: {lost}")
            submitted.times += 1
            submitted.before = count

    def _compare_versions(self, start: Mapping[str, Any], board: Board) -> None:
        """Says once for each machine which of its versions differ from those of this process."""
        host = start.get("host", "")
        if not host or host in self._hosts:
            return
        self._hosts.add(host)
        here, there = versions(), start.get("versions", {})
        names = [name for name, version in there.items() if here.get(name, version) != version]
        if names:
            found = ", ".join(f"{name} {there[name]} (here {here[name]})" for name in names)
            board.say(f"{host} has other versions, with which results may differ: {found}")

    def _end(self, job: Job, outcome: Outcome, board: Board) -> None:
        if outcome.unseen:
            raise NotSharedError(
                f"{outcome.host}, a worker of {self._engine.description}, does not see "
                f"'{outcome.unseen}'. All workers need the folder of the results and the working "
                "directory at the same paths: choose a shared file system with --out, and start "
                "the command there."
            )
        if outcome.refused:
            raise NotSharedError(
                f"{outcome.host}, a worker of {self._engine.description}, cannot write in "
                f"'{job.folder}': {outcome.refused}. Finished runs stay; give the same command "
                "again when it can, or choose another folder with --out."
            )
        log = job.folder / LOG_FILE
        if outcome.worn_out:
            self._fail(job, f"its worker died {1 + RETRIES} times", board)
        elif outcome.status is None:
            self._fail(job, f"ended by {outcome.host}, which lost sight of the sweep", board)
        elif outcome.status:
            self._fail(job, message_of(log, outcome.status), board)
        else:
            self._forget(job)
            board.end(job, f"{outcome.seconds:.0f} s on {outcome.host}")

    def _fail(self, job: Job, message: str, board: Board) -> None:
        self._forget(job)
        log = job.folder / LOG_FILE
        if not log.exists():  # It never started.
            log.write_text(f"{message}\n")
        board.end(job, Failure(job, message, log))

    def _forget(self, job: Job) -> None:
        del self._submitted[job]
        (job.folder / STARTS_FILE).unlink(missing_ok=True)

    def _beat(self) -> None:
        """Shows the workers that the sweep is alive."""
        if time.monotonic() - self._beaten < BEAT:
            return
        self._beats, self._beaten = self._beats + 1, time.monotonic()
        # In place: workers on network file systems could miss a file that is replaced.
        self._marker.write_text(f"{self._beats}\n")

    def _end_leftovers(self) -> None:
        """Ends jobs of a sweep that was killed, which would still hold their folders."""
        others = [path for path in self._folder.glob(f"{MARKER}*") if path != self._marker]
        for path in others:
            path.unlink(missing_ok=True)
        if others:
            text = f"Ending the jobs of an earlier sweep that was killed: {_LEFTOVERS:.0f} s"
            self._console.print(text, highlight=False, markup=False)
            time.sleep(_LEFTOVERS)

    def _cancel(self, board: Board) -> None:
        """Ends all jobs on the cluster, and waits until they have ended."""
        with contextlib.suppress(OSError):  # Such as a folder that was removed.
            self._marker.unlink(missing_ok=True)  # Running jobs end without it.
        for submitted in self._submitted.values():
            with contextlib.suppress(Exception):  # The cluster itself may be gone.
                self._engine.cancel(submitted.handle)
        count = len(self._submitted)
        deadline = time.monotonic() + _CANCELLING
        while self._submitted and time.monotonic() < deadline:
            for job in list(self._submitted):
                if _has_ended(self._engine, self._submitted[job].handle):
                    self._forget(job)
            time.sleep(_POLL)
        waiting = len(self._submitted)
        left = f", of which {waiting} have not confirmed it" if waiting else ""
        board.say(f"Cancelled {count} jobs on {self._engine.description}{left}.")


def _has_ended(engine: Engine, handle: Any) -> bool:
    try:
        return engine.outcome(handle) is not None
    except Exception:  # Whatever a library says of a job that it has cancelled.
        return True
