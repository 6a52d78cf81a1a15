"""Runs commands in folders that are full, read-only or removed, and then without the fault.

    python -m benchmarks.checks.environment [--commands NAME ...] [--faults NAME ...]

A full disk is a limit on the size of files, which the system enforces for every library, at several
sizes. In a read-only folder, the process has another user if this one is allowed to write
everywhere. A vanished folder is removed when its configuration has been written. Each command is
expected to end with an error of one line (a function with an `OSError`). It is then repeated in
what is left, without the fault, and its results are compared with those of a whole execution.
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

from benchmarks.checks import kills
from benchmarks.checks.resume import compare
from lottery_ticket_pruner import cli

NOBODY = 65534


def full(size: int) -> Callable[[Path], None]:
    """Returns a function that limits the size of files in bytes."""
    return lambda folder: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def read_only(folder: Path) -> None:
    """Makes a folder read-only, also for this process."""
    folder.chmod(0o555)
    if os.getuid() == 0:
        os.setuid(NOBODY)


def vanishing(folder: Path) -> None:
    """Removes a folder as soon as something was written in it, in another thread."""

    def remove() -> None:
        while not list(folder.glob("out/*.json")):
            time.sleep(0.005)
        shutil.rmtree(folder / "out", ignore_errors=True)

    threading.Thread(target=remove, daemon=True).start()


FAULTS = {
    "full at 1 kB": full(1_000),
    "full at 30 kB": full(30_000),
    "full at 300 kB": full(300_000),
    "read-only": read_only,
    "vanished": vanishing,
}


def attempt(name: str, fault: Callable[[Path], None], folder: Path, report: Path) -> None:
    """Executes a command with a fault, and writes how it ended."""
    with report.open("w") as written:  # Opened before the process loses its rights.
        fault(folder)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                if name in kills.LINES:
                    line = [name, *kills.LINES[name], "--quiet", "--out", str(folder / "out")]
                    code: Any = cli.main(line)
                else:
                    kills.commands()[name].work(folder)
                    code = 0
            except OSError as error:
                code = "OSError" if name not in kills.LINES else f"TRACEBACK of {error!r}"
                said.write(f"{error}\n")
            except BaseException as error:
                code = f"TRACEBACK of {error!r}"
        lines = [text for text in said.getvalue().splitlines() if ": warning: " not in text]
        written.write(json.dumps([code, lines])[:900])


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
    else:
        first = f"FAULT: {code} {lines}"
    folder.chmod(0o755)
    if wrong := kills.in_a_fork(lambda: kills.commands()[name].work(folder), log):
        return first, f"NOT REPEATED: {wrong}"
    if left := kills.leftovers(folder):
        return first, f"LEFT: {left}"
    differ = compare(kills.contents(whole), kills.contents(folder))
    return first, f"DIFFERS: {differ[:3]}" if differ else "identical"


def main(arguments: Any = None) -> int:
    """Tries all faults; returns 1 if anything was lost or not said in one line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.environment",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = [name for name in kills.commands() if name != "sweep"]
    parser.add_argument("--commands", nargs="+", choices=names, default=names)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    options = parser.parse_args(arguments)
    tried = wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        os.chmod(temporary, 0o755)
        for name in options.commands:
            whole = Path(temporary, name)
            whole.mkdir()
            log = Path(temporary, "log")
            if failed := kills.in_a_fork(
                functools.partial(kills.commands()[name].work, whole), log
            ):
                raise RuntimeError(f"{name}: {failed}")
            for fault in options.faults:
                if fault == "vanished" and name not in kills.LINES:
                    continue  # They write no configuration first.
                folder = Path(temporary, f"{name}-{fault}".replace(" ", "-"))
                first, then = outcome(name, fault, whole, folder)
                tried += 1
                wrong += first[:3].isupper() or then != "identical"
                print(f"{name}, {fault}: {first[:300]}; repeated: {then[:300]}", flush=True)
    print(f"{tried} faults tried, {wrong} of them not ended or repeated as expected")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
