"""Jobs of a sweep, what all executors of them have in common, and what is shown meanwhile."""

import contextlib
import dataclasses
import re
import signal
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, Self

from rich.console import Console

from lottery_ticket_pruner.experiments import progress


class Job(Protocol):
    """The interface of a run to what executes it."""

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


class Executor(Protocol):
    """The interface of what executes jobs: processes of this machine, or a cluster."""

    def __enter__(self) -> Self:
        """Connects to the cluster, if there is one."""

    def __exit__(self, *_: object) -> None:
        """Ends the connection."""

    def pace(self, jobs: int) -> str:
        """Returns how many of so many jobs are executed at a time, and where."""

    def run(self, todo: Sequence[Job]) -> list[Failure]:
        """Executes jobs, and returns those that failed in the order of the jobs.

        On an interruption, ends the current ones, starts no more, and raises it again.
        """


class Board:
    """The number of jobs that have ended and of those that run, with a progress bar.

    Args:
        jobs: All jobs.
        console: Where to print.
    """

    def __init__(self, jobs: Sequence[Job], console: Console) -> None:
        self._jobs = jobs
        self._console = console
        self._ended: set[Job] = set()
        self._failures: list[Failure] = []
        # Runs report once per round, so the speed is averaged over a long time.
        self._bar = progress.bar(console, "{task.percentage:.0f} %", period=3600)
        self._task = self._bar.add_task(
            "",
            total=sum(job.work for job in jobs),
            completed=sum(job.work_done for job in jobs),
        )

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def failures(self) -> list[Failure]:
        """The failures, in the order of the jobs."""
        order = {job: number for number, job in enumerate(self._jobs)}
        return sorted(self._failures, key=lambda failure: order[failure.child])

    def say(self, text: str) -> None:
        """Prints a line above the progress bar."""
        progress.say(self._console, text)

    def end(self, job: Job, outcome: str | Failure) -> None:
        """Notes and prints how a job ended."""
        self._ended.add(job)
        if isinstance(outcome, Failure):
            self._failures.append(outcome)
            outcome = "failed"
        self.say(f"{len(self._ended)} of {len(self._jobs)}  {job.label}: {outcome}")

    def show(self, running: Collection[Job]) -> None:
        """Updates the progress bar."""
        done = sum(job.work if job in self._ended else job.work_done for job in self._jobs)
        text = f"{len(self._ended)} of {len(self._jobs)} runs, {len(running)} running"
        self._bar.update(self._task, completed=done, description=text)


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Treats SIGTERM as Ctrl-C, so that no run outlives its sweep."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def message_of(log: Path, status: int) -> str:
    """Returns the last message of a process, without the traceback above it."""
    try:
        text = log.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:  # Network file systems may show a new file late.
        text = ""
    lines = [line for line in text.splitlines() if line.strip()]
    # Below the message of the command, there may be the traceback of a user's function.
    said = [line for line in lines if re.match("lottery-ticket: (?!warning: )", line)] or lines
    last = said[-1].removeprefix("lottery-ticket: ") if said else ""
    if status < 0:
        named = {one.value: one.name for one in signal.Signals}  # Not all signals have a name.
        return f"ended by {named.get(-status, f'signal {-status}')}. {last}".strip()
    if not text.endswith("\n") and text and said[-1:] == lines[-1:]:
        return f"exit status {status}. Its log is cut, as by a full disk, after: {last}"
    return last or f"exit status {status}"
