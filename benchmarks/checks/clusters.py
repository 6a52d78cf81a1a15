"""Executes one sweep by every executor, kills a worker of Ray meanwhile, and compares the tables.

    python -m benchmarks.checks.clusters [--executors NAME ...] [--jobs N] [--values N] [--seeds N]

The sweep has a run for each of several rates (`--values`, default 4) and seeds (`--seeds`, default
6) on the digits, of 20 steps each. It is executed by processes of this machine, by Ray with a
worker that is killed with SIGKILL while it executes a job, by submitit's local executor, and by
dask, each started on this machine, with `--jobs` at a time (default 2). Runs are deterministic. The
script compares all values of results.csv except the seconds, and prints the elapsed time of each,
with how often jobs were started again. It needs the extras `ray`, `slurm` and `dask`.
"""

import argparse
import csv
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from _lottery_ticket.jobs import STARTS_FILE
from masked_layers.text_tables import aligned

EXECUTORS = {
    "local": ["--executor", "local"],
    "ray": ["--executor", "ray"],
    "slurm": ["--executor", "slurm", "--executor-option", "cluster=local"],
    "dask": ["--executor", "dask"],
}
RUN = ["--rounds", "1", "--steps", "20", "--controls", "--deterministic"]
AGAIN = re.compile(r"because their workers died: (\d+)")


def kill_a_worker(folder, after, ended):
    """Kills the worker of a job as soon as so many jobs have ended."""
    while not ended.is_set():
        time.sleep(0.2)
        if sum(1 for _ in folder.glob("*/SHA256SUMS")) < after:
            continue
        for file in folder.glob(f"*/{STARTS_FILE}"):
            try:
                pid = json.loads(file.read_text())["pid"]
                os.kill(pid, signal.SIGKILL)
            except (OSError, ValueError):  # It has just ended.
                continue
            print(f"killed process {pid}, which executed {file.parent.name}", flush=True)
            return


def sweep(name, folder, options, runs):
    """Executes the sweep, and returns its elapsed time and how often jobs were started again."""
    command = [sys.executable, "-m", "lottery_ticket_pruner.cli", "sweep", *RUN, *options]
    command += [*EXECUTORS[name], "--out", str(folder)]
    ended = threading.Event()
    killer = threading.Thread(target=kill_a_worker, args=(folder, runs // 3, ended))
    if name == "ray":
        killer.start()
    started = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    finally:
        ended.set()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr}")
    found = AGAIN.search(done.stdout)
    return time.perf_counter() - started, int(found[1]) if found else 0


def table_of(folder):
    """Returns all values of the results except the seconds, as they were written."""
    with (folder / "results.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if name != "seconds"}
            for row in csv.DictReader(file)
        ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--executors", nargs="+", choices=EXECUTORS, default=list(EXECUTORS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--values", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=6)
    args = parser.parse_args()
    rates = ",".join(f"{0.2 + 0.1 * number:.1f}" for number in range(args.values))
    seeds = list(map(str, range(args.seeds)))
    options = ["--over", f"rate={rates}", "--seeds", *seeds, "--jobs", str(args.jobs)]
    runs = args.values * args.seeds
    lines, tables = [("executor", "seconds", "started again", "rows", "table")], []
    with tempfile.TemporaryDirectory() as place:
        for name in args.executors:
            seconds, again = sweep(name, Path(place, name), options, runs)
            tables.append(table_of(Path(place, name)))
            same = "identical" if tables[-1] == tables[0] else "DIFFERS"
            lines.append((name, f"{seconds:.0f}", str(again), str(len(tables[-1])), same))
            print(*lines[-1], flush=True)
    print(f"\n{runs} jobs, {args.jobs} at a time")
    print("\n".join(aligned(lines, left={0, 4})))
    return any(table != tables[0] for table in tables)


if __name__ == "__main__":
    sys.exit(main())
