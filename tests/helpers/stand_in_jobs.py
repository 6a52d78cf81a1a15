"""Jobs of a sweep that end at once, for executors: a script in place of `lottery-ticket`."""

import dataclasses
import os
import threading
import time
import types
from pathlib import Path

# Arguments: what to do, and the folder.
SCRIPT = """
import os, pathlib, signal, sys, time
what, folder = sys.argv[1], pathlib.Path(sys.argv[2])
with (folder / "starts").open("a") as file:
    file.write(f"{os.getpid()} {os.getppid()}\\n")
print("this is", what, os.environ["KERAS_BACKEND"], os.environ.get("OMP_NUM_THREADS"), flush=True)
first = len((folder / "starts").read_text().splitlines()) == 1
if what == "fail":
    sys.exit("lottery-ticket: this one is bad")
if what == "wait" or (what == "wait first" and first):
    os.read(0, 1)  # As runs do, which end with the worker.
    sys.exit(9)
if what == "kill worker" and first:
    os.kill(os.getppid(), signal.SIGKILL)
    os.read(0, 1)
    sys.exit(9)
(folder / "result").write_text(what)
"""


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A job that does what its name says."""

    label: str
    folder: Path
    work: int = 1

    @property
    def arguments(self):
        return (self.label.rpartition(": ")[2], str(self.folder))

    @property
    def work_done(self):
        return 0

    @property
    def is_done(self):
        return (self.folder / "result").exists()

    @property
    def starts(self):
        """The process, and its parent, of each start."""
        file = self.folder / "starts"
        lines = file.read_text().splitlines() if file.exists() else []
        return [tuple(map(int, line.split())) for line in lines]


def jobs_of(folder, *what):
    """Returns jobs that each do what a word says."""
    return [StandIn(f"{i}: {word}", folder / f"job-{i}") for i, word in enumerate(what)]


def is_running(process):
    """Returns whether a process is alive, and not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition):
    """Waits until something is the case, however slow the machine is."""
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "It has not happened in five minutes."
        time.sleep(0.05)


def looks(monkeypatch):
    """Returns a list with an entry for every time that a sweep has looked at its whole cluster.

    A job may have started before the sweep, in another thread, has noted that it was submitted.
    """
    done = []

    def sleep(seconds):
        done.append(seconds)
        time.sleep(seconds)

    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=sleep)
    monkeypatch.setattr("lottery_ticket_pruner.commands.clusters.time", clock)
    return done


def when(condition, action):
    """Does something in a thread as soon as something is the case."""
    import signal

    # A shell that starts the tests in the background has them ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def wait():
        while not condition():
            time.sleep(0.05)
        action()

    threading.Thread(target=wait, daemon=True).start()


def interrupt_this_process():
    """Does what Ctrl-C does."""
    import signal

    os.kill(os.getpid(), signal.SIGINT)
