"""Runs commands in folders that are full, read-only, removed or in use, and then without the fault.

    python -m benchmarks.checks.environment [--commands NAME ...] [--faults NAME ...]

A full disk is a limit on the size of files, which the system enforces for every library, at several
sizes. In a read-only folder, the process has another user if this one is allowed to write
everywhere. A vanished folder is removed when its configuration has been written. A folder in use is
locked, and its repetition finds the lock of a process that ended without removing it. Each command
is expected to end with an error of one line (a function with an `OSError`, a sweep with a line for
each run). It is then repeated in what is left, without the fault, and its results are compared with
those of a whole execution, apart from logs of a folder that vanished. `report` and `compare` read
the folder of a whole `run`.
"""

import argparse
import contextlib
import functools
import io
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _lottery_ticket.jobs import LOG_FILE
from benchmarks.checks import kills
from benchmarks.checks.resume import compare
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.folders import FolderLock

NOBODY = 65534


def full(size: int) -> Callable[[Path], None]:
    """Returns a function that limits the size of files in bytes."""

    def limit(folder: Path) -> None:
        # The output of this process is a file as well, in which TensorFlow could not log.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(nowhere, descriptor)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


def read_only(folder: Path) -> None:
    """Makes a folder read-only, also for this process."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(NOBODY)


def vanishing(folder: Path) -> None:
    """Removes a folder as soon as a configuration or state was written in it, in a thread."""

    def written() -> bool:
        return any(file.name[0] != "." for file in folder.glob("out/**/*.json"))

    def remove() -> None:
        while not written():
            time.sleep(0.005)
        shutil.rmtree(folder / "out", ignore_errors=True)

    threading.Thread(target=remove, daemon=True).start()


def in_use(folder: Path) -> None:
    """Locks the folder of the results, or of the search, until this process ends."""
    searches = "-prune-" in f"-{folder.name}"  # `prune` locks the folder of its search.
    _LOCKS.append(FolderLock(folder / "out" / "search" if searches else folder / "out"))
    _LOCKS[-1].__enter__()


_LOCKS: list[FolderLock] = []
FAULTS = {
    "full at 1 kB": full(1_000),
    "full at 30 kB": full(30_000),
    "full at 300 kB": full(300_000),
    "read-only": read_only,
    "vanished": vanishing,
    "in use": in_use,
}
# Commands that read the folder of a run. `compare` writes only temporary files.
READERS = {"report": ("report",), "compare": ("compare", "--batch-size", "8")}


def line_of(name: str, folder: Path) -> list[str] | None:
    """Returns the line of a command for a folder, or None for functions."""
    run = folder.parent / "run" / "out"
    if name == "compare":
        return [*READERS[name], str(run)]
    out = ["--quiet", "--out", str(folder / "out")]
    if name == "report":
        return [*READERS[name], str(run), *out]
    return [*kills.LINES[name], *out] if name in kills.LINES else None


def execute(name: str, folder: Path) -> None:
    """Executes a command without a fault."""
    line = line_of(name, folder)
    if line is None:
        kills.commands()[name].work(folder)
    else:
        kills.command_line(*line)


def applies(name: str, fault: str) -> bool:
    """Returns whether a fault can be tried with a command."""
    if fault == "vanished":
        return name in kills.LINES  # The others write no configuration first.
    return fault != "in use" or name in kills.LINES


def attempt(name: str, fault: Callable[[Path], None], folder: Path, report: Path) -> None:
    """Executes a command with a fault, and writes how it ended."""
    with report.open("w") as written:  # Opened before the process loses its rights.
        fault(folder)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                line = line_of(name, folder)
                if line is not None:
                    code: Any = cli.main(line)
                else:
                    kills.commands()[name].work(folder)
                    code = 0
            except OSError as error:
                code = "OSError" if line is None else f"TRACEBACK of {error!r}"
                said.write(f"{error}\n")
            except BaseException as error:
                code = f"TRACEBACK of {error!r}"
        # Nor notices: where TensorFlow cannot write the code that it compiles, `fit` is used.
        notices = (": warning: ", " goes through `")
        lines = said.getvalue().splitlines()
        lines = [text for text in lines if not any(notice in text for notice in notices)]
        written.write(json.dumps([code, [line[:300] for line in lines[:5]]]))


def outcome(name: str, fault: str, whole: Path, folder: Path) -> tuple[str, str]:
    """Returns how a command ended with a fault, and how its repetition did."""
    folder.mkdir(mode=0o755)
    report, log = folder.with_suffix(".json"), folder.with_suffix(".log")
    kills.in_a_fork(lambda: attempt(name, FAULTS[fault], folder, report), log)
    try:
        code, lines = json.loads(report.read_text())
    except ValueError:
        return f"DIED: {log.read_text()[-500:]}", ""
    if code == 0:
        first = "not affected"
    elif code in (2, "OSError") and len(lines) == 1:
        first = f"one line: {lines[0]}"
    elif code == 1 and lines and all(line.startswith("failed: ") for line in lines):
        first = f"{len(lines)} runs failed: {lines[0]}"
    else:
        first = f"FAULT: {code} {lines}"
    folder.chmod(0o755)
    if wrong := kills.in_a_fork(lambda: execute(name, folder), log):
        return first, f"NOT REPEATED: {wrong}"
    if left := kills.leftovers(folder):
        return first, f"LEFT: {left}"
    differ = compare(kills.contents(whole), kills.contents(folder))
    if fault == "vanished":  # A run may have made its folder again, but not the log of its sweep.
        differ = [name for name in differ if not name.endswith(LOG_FILE)]
    return first, f"DIFFERS: {differ[:3]}" if differ else "identical"


def main(arguments: Any = None) -> int:
    """Tries all faults; returns 1 if anything was lost or not said in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.environment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [*kills.commands(), *READERS]
    parser.add_argument("--commands", nargs="+", choices=names, default=names)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args(arguments)
    tried = wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)
        # The readers need a run.
        first_of_all = ["run"] if set(options.commands) & READERS.keys() else []
        for name in dict.fromkeys([*first_of_all, *options.commands]):
            whole = Path(temporary, name)
            whole.mkdir()
            log = Path(temporary, "log")
            if failed := kills.in_a_fork(functools.partial(execute, name, whole), log):
                raise RuntimeError(f"{name}: {failed}")
            if name not in options.commands:
                continue
            for fault in options.faults:
                if not applies(name, fault):
                    continue
                folder = Path(temporary, f"{name}-{fault}".replace(" ", "-"))
                first, then = outcome(name, fault, whole, folder)
                tried += 1
                wrong += first[:3].isupper() or then != "identical"
                print(f"{name}, {fault}: {first[:300]}; repeated: {then[:300]}", flush=True)
    print(f"{tried} faults tried, {wrong} of them not ended or repeated as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
