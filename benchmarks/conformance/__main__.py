"""Measures the conformance table, and writes its page.

    KERAS_BACKEND=jax python -m benchmarks.conformance                # all rows of a backend
    python -m benchmarks.conformance --only "MobileNet" LoRA --again  # some rows, again
    python -m benchmarks.conformance --peer tfmot                     # what a peer masks
    python -m benchmarks.conformance --page                           # docs/conformance.md

Rows are checked in processes of their own, a few in each, so that a crash or a lack of memory is
one row's. Each is written to `benchmarks/conformance/results/` when it is known. Rows that are
there, from the same versions, are not measured again.
"""

import argparse
import gc
import importlib.metadata
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.conformance.makers import Maker

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[2] / "docs" / "conformance.md"
LIBRARIES = {"tensorflow": "tensorflow", "jax": "jax", "torch": "torch"}
# Rows of one process; importing a backend takes longer than checking a small model.
GROUP = 24
MARK = "conformance: "


def makers() -> "list[Maker]":
    """Returns all rows in the order in which they are measured: every family early."""
    from benchmarks.conformance import applications, hub, own

    first = [m for m in applications.makers() if m.name in applications.FIRST]
    second = [m for m in applications.makers() if m.name not in applications.FIRST]
    rows = [*own.makers(), *first, *hub.makers(), *second]
    names = [maker.name for maker in rows]
    if len(set(names)) < len(names):
        raise ValueError(
            f"Names that two rows have: {sorted({n for n in names if names.count(n) > 1})}"
        )
    return rows


def versions(backend: str) -> str:
    """Returns the versions that a row depends on, in one line."""
    packages = ["keras", LIBRARIES[backend], "keras-hub", "numpy"]
    found = []
    for package in packages:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{package} not installed")
    return ", ".join(found)


# --- In the process of a few rows -----------------------------------------------------------------


def work(names: list[str], peer: str | None) -> None:
    """Prints the cells of rows, each in a line as soon as it is known."""
    if peer is not None:
        from benchmarks.conformance import peers

        cells = peers.prepared(peer)
    else:
        from benchmarks.conformance.checks import cells
    import keras

    by_name = {maker.name: maker for maker in makers()}
    for name in names:
        start = time.process_time()
        for column, cell in cells(by_name[name]):
            told = {"row": name, "column": column, "cell": cell}
            print(MARK + json.dumps(told), flush=True)
        seconds = round(time.process_time() - start, 1)
        print(MARK + json.dumps({"row": name, "seconds": seconds}), flush=True)
        keras.backend.clear_session()
        gc.collect()


# --- In the process of the command ----------------------------------------------------------------


def lines(stream: IO[str], limit: float) -> Iterator[dict[str, Any] | None]:
    """Yields what a worker tells, and None when it has told nothing for `limit` seconds."""
    told: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in stream:
            told.put(line)
        told.put(None)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = told.get(timeout=limit)
        except queue.Empty:
            yield None
            continue
        if line is None:
            return
        if line.startswith(MARK):
            yield json.loads(line.removeprefix(MARK))


class Table:
    """The rows of one file, written whenever one is complete."""

    def __init__(self, name: str, version: str) -> None:
        self.path, self.version = RESULTS / f"{name}.json", version
        self.rows: dict[str, Any] = {}
        if self.path.exists():
            self.rows = json.loads(self.path.read_text("utf-8"))

    def missing(self, names: list[str]) -> list[str]:
        return [n for n in names if self.rows.get(n, {}).get("versions") != self.version]

    def add(self, name: str, cells: dict[str, Any], seconds: float | None) -> None:
        self.rows[name] = {"versions": self.version, "seconds": seconds, "cells": cells}
        self.path.parent.mkdir(exist_ok=True)
        written = self.path.with_suffix(".tmp")
        text = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.rows.items())
        written.write_text(f"{{\n{text}\n}}\n", "utf-8")
        written.replace(self.path)


def measure(names: list[str], table: Table, peer: str | None, limit: float) -> None:
    """Measures rows in a process; of a row that ends it, the cells so far are kept."""
    left = list(names)
    while left:
        command = [sys.executable, "-m", "benchmarks.conformance", "--worker", *left]
        command += ["--peer", peer] if peer else []
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        errors: list[str] = []
        drain = threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True)
        drain.start()
        cells: dict[str, Any] = {}
        ended = ""
        for told in lines(process.stdout, limit):
            if told is None:
                ended = f"nothing for {limit:.0f} seconds"
                process.kill()
            elif "seconds" in told:
                table.add(told["row"], cells, told["seconds"])
                print(f"{told['row']:45}{summary(cells)} ({told['seconds']} s)", flush=True)
                left.remove(told["row"])
                cells = {}
            else:
                cells[told["column"]] = told["cell"]
        status = process.wait()
        drain.join()
        if left:
            last = errors[-1].strip() if errors and status == 1 else ""
            why = ended or f"the process ended with status {status}" + f": {last}" * bool(last)
            print(f"{left[0]:45}{why}", flush=True)
            table.add(left.pop(0), cells | {"ended": ["error", why]}, None)


def summary(cells: dict[str, Any]) -> str:
    return ", ".join(
        answer if answer == "yes" else f"{key}: {answer}" for key, (answer, _) in cells.items()
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.conformance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="rows to measure (default: all)")
    parser.add_argument("--again", action="store_true", help="also rows that are known")
    parser.add_argument("--peer", choices=("tfmot", "pquant"), help="what another library masks")
    parser.add_argument("--page", action="store_true", help=f"only write {PAGE.name}")
    parser.add_argument(
        "--limit", type=float, default=900, help="seconds for one cell (%(default)s)"
    )
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        work(options.worker, options.peer)
        return 0
    if options.page:
        from benchmarks.conformance.page import page

        PAGE.write_text(page(RESULTS), "utf-8")
        return 0
    names = [maker.name for maker in makers()]
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"unknown rows: {sorted(unknown)}; known: {names}")
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if options.peer:
        from benchmarks.conformance import peers

        table = Table(options.peer, peers.versions(options.peer))
    else:
        table = Table(backend, versions(backend))
    names = [name for name in names if name in (options.only or names)]
    wanted = names if options.again else table.missing(names)
    print(f"{len(wanted)} of {len(names)} rows, {table.version}", flush=True)
    for start in range(0, len(wanted), GROUP):
        measure(wanted[start : start + GROUP], table, options.peer, options.limit)
    return 0


if __name__ == "__main__":
    sys.exit(main())
