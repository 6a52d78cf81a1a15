"""Kills commands with SIGKILL at random moments, repeats them, and compares with whole ones.

    python -m benchmarks.checks.kills [--kills N] [--commands NAME ...] [--seed N]

The commands are `run`, `supermask`, `sweep`, `sweep --search optuna`, `instability`, `prune` with a
log, `export` and `save` (masks, a pruner, a ticket and a `.keras` file, again and again). Each is
first executed without interruption. Then a process is killed after a random part of that time, in
turns for all commands, and the same command is repeated in the folder that is left. A kill is
survived if the files of the killed
process can be read or are absent, the repetition succeeds, and no temporary files are left. The
results are identical if all numbers (except seconds) and arrays are those of the whole execution.

Processes are forks of one that has imported everything, so that the kills hit the work.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import lottery_ticket_pruner as ltp
import masked_layers as ml
from benchmarks.checks.resume import arrays_of, compare
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import prune, repeat, report, saved_models, sweep  # noqa: F401
from lottery_ticket_pruner.compression.result import save_model
from lottery_ticket_pruner.experiments import catalogue
from masked_layers import serving

# fmt: off
LINES = {
    "run": ("run", "--rounds", "2", "--steps", "60", "--seeds", "0", "1", "--controls",
            "random_mask", "--deterministic"),
    "supermask": ("supermask", "--criteria", "large_final", "random", "--sparsities", "0.5",
                  "--steps", "60", "--seeds", "0", "1", "--deterministic"),
    "instability": ("instability", "--steps", "60", "--rewind-to", "0", "10", "--points", "3",
                    "--seeds", "0", "1", "--deterministic"),
    "sweep": ("sweep", "--over", "rate=0.3,0.6", "--rounds", "1", "--steps", "40", "--seeds", "0",
              "--controls", "random_mask", "--deterministic", "--jobs", "1"),
    "optuna": ("sweep", "--over", "rate=0.3,0.6", "--search", "optuna", "--trials", "2", "--rounds",
               "1", "--steps", "40", "--seeds", "0", "--controls", "--deterministic", "--jobs",
               "1"),
    "prune": ("prune", "lenet-300-100", "--sparsity", "0.8", "--epochs", "1", "--log",
              "tensorboard"),
}
# fmt: on


@dataclasses.dataclass
class Command:
    """A command to kill.

    Attributes:
        work: Function that executes it in a folder.
        check: Function that raises an error if files that a killed process left cannot be read.
    """

    work: Callable[[Path], None]
    check: Callable[[Path], object]


def command_line(*line: str) -> None:
    """Executes a line of the command line.

    Raises:
        RuntimeError: If it fails.
    """
    if cli.main([*line]):
        raise RuntimeError(f"lottery-ticket {' '.join(line)} failed")


def execute(line: Sequence[str], folder: Path) -> None:
    """Executes an experiment, a sweep or `prune` in a folder."""
    command_line(*line, "--quiet", "--out", str(folder / "out"))


def model() -> keras.Model:
    """Returns a masked model, which is always the same."""
    keras.utils.set_random_seed(0)
    plain = keras.Sequential(
        [keras.Input((64,)), keras.layers.Dense(300, "relu"), keras.layers.Dense(10)]
    )
    masked = ml.convert_to_masked(plain)
    ltp.LotteryTicketPruner(masked).update_masks("smallest_weights", rate=0.9)
    return masked


def export(folder: Path) -> None:
    """Exports a model as a sparse SavedModel, whether there is one or not."""
    for _ in range(3):
        ml.export_sparse_saved_model(model(), folder / "served")


def check_export(folder: Path) -> None:
    """Reads a SavedModel, if there is one."""
    if (folder / "served").exists():
        serving.inspect(folder / "served")


def save(folder: Path) -> None:
    """Writes the files of the library again and again."""
    masked = model()
    pruner = ltp.LotteryTicketPruner(masked)
    for _ in range(20):
        ml.save_masks(masked, folder / "masks.npz")
        pruner.save(folder / "pruner.npz")
        ml.save_ticket(masked, folder / "ticket.safetensors")
        save_model(masked, folder / "model.keras")


def check_save(folder: Path) -> None:
    """Reads those of the files that exist."""
    masked = model()
    for name, read in {
        "masks.npz": lambda file: ml.load_masks(masked, file),
        "pruner.npz": lambda file: ltp.LotteryTicketPruner.load(file, masked),
        "ticket.safetensors": ml.load_ticket,
        "model.keras": keras.models.load_model,
    }.items():
        if (folder / name).exists():
            read(folder / name)


def check_folder(folder: Path) -> None:
    """Reads the files of an experiment that have a format of their own."""
    for file in folder.rglob("*.npz"):
        np.load(file).close()
    for file in folder.rglob("*.safetensors"):
        ml.load_ticket(file)
    for file in folder.rglob("*.keras"):
        if (damaged := zipfile.ZipFile(file).testzip()) is not None:
            raise ValueError(f"{file}: {damaged}")


def commands() -> dict[str, Command]:
    """Returns all commands by name."""
    found = {
        name: Command(functools.partial(execute, line), check_folder)
        for name, line in LINES.items()
    }
    assert set(catalogue.KINDS) <= set(found)
    return found | {"export": Command(export, check_export), "save": Command(save, check_save)}


def contents(folder: Path) -> dict[str, Any]:
    """Returns everything that must be equal, by name."""
    found: dict[str, Any] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if not file.is_file():
            continue
        if file.suffix == ".npz":
            with np.load(file) as arrays:
                found |= {f"{name}: {key}": arrays[key].tobytes() for key in arrays.files}
        elif file.suffix in (".keras", ".safetensors"):
            found |= {f"{name}: {key}": value for key, value in arrays_of(file)}
        elif file.suffix == ".csv":
            heading, *rows = [line.split(",") for line in file.read_text().splitlines()]
            kept = [place for place, column in enumerate(heading) if column != "seconds"]
            found[name] = [[row[place] for place in kept] for row in (heading, *rows)]
        elif file.suffix == ".mlsp":
            found[name] = file.read_bytes()
        elif not file.name.startswith(("events.", "sparsity.")):  # With times and sizes.
            found[name] = "exists"
    return found


def leftovers(folder: Path) -> list[str]:
    """Returns temporary files and folders in a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*")]


def in_a_fork(function: Callable[[], object], log: Path, kill_after: float | None = None) -> str:
    """Executes a function in another process, and returns why it failed, or an empty text.

    Args:
        function: The function.
        log: File for its output.
        kill_after: Seconds after which it is killed, or None.
    """
    pid = os.fork()
    if not pid:
        code = 1
        with log.open("w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    started = time.perf_counter()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            failed = bool(status) and kill_after is None
            return log.read_text()[-600:] or f"status {status}" if failed else ""
        if kill_after is not None and time.perf_counter() - started > kill_after:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return ""
        time.sleep(0.002)


def trial(command: Command, whole: Path, folder: Path, seconds: float) -> list[str]:
    """Kills a command, repeats it, and returns what is wrong."""
    folder.mkdir()
    log = folder.with_suffix(".log")
    in_a_fork(lambda: command.work(folder), log, kill_after=seconds)
    if wrong := in_a_fork(lambda: command.check(folder), log):
        return [f"unreadable: {wrong}"]
    wrong = in_a_fork(lambda: command.work(folder), log)
    if wrong:
        return [f"not repeated: {wrong}"]
    if left := leftovers(folder):
        return [f"left: {left}"]
    differ = compare(contents(whole), contents(folder))
    return [f"DIFFERS: {name}" for name in differ]


def main(arguments: Any = None) -> int:
    """Kills the commands; returns 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.kills",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=60, help="number of kills of all commands")
    parser.add_argument("--commands", nargs="+", choices=list(commands()), help="default: all")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    options = parser.parse_args(arguments)
    rng = random.Random(options.seed)
    chosen = {name: commands()[name] for name in options.commands or commands()}
    counts = {name: [0, 0, 0] for name in chosen}  # Killed, survived, identical.
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(sys.stdout):
        place, seconds = Path(temporary), {}
        for number in range(options.kills):
            name = list(chosen)[number % len(chosen)]
            whole = place / name
            if name not in seconds:
                whole.mkdir()
                started = time.perf_counter()
                if failed := in_a_fork(functools.partial(chosen[name].work, whole), place / "log"):
                    raise RuntimeError(f"{name}: {failed}")
                seconds[name] = time.perf_counter() - started
                print(f"{name}: {seconds[name]:.1f} s without interruption", flush=True)
            folder = place / f"{name}-{number}"
            moment = rng.uniform(0, seconds[name])
            wrong = trial(chosen[name], whole, folder, moment)
            counts[name][0] += 1
            counts[name][1] += not any(not text.startswith("DIFFERS") for text in wrong)
            counts[name][2] += not wrong
            for text in wrong[:5] or ["identical"]:
                print(f"  {name}, killed after {moment:.2f} s: {text}", flush=True)
            shutil.rmtree(folder)
    print(f"{'':12} killed  survived  identical")
    counts["all"] = [sum(column) for column in zip(*counts.values(), strict=True)]
    for name, (killed, survived, identical) in counts.items():
        print(f"{name:12} {killed:6}  {survived:8}  {identical:9}")
    return int(counts["all"][2] < options.kills)


if __name__ == "__main__":
    sys.exit(main())
