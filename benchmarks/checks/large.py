"""Prunes, saves and exports one very large model, and measures the memory of each step.

    python -m benchmarks.checks.large [--weights 1e9] [--layers 16] [--skip STEP ...] [--until STEP]

The model consists of dense layers of equal size, with float32 weights. Each step prints its
seconds, the processor seconds of all threads, the peak of resident memory above what was resident
before it, in GB (1e9 bytes) and in units of the largest layer, and how much more is resident after
it. The peak is the kernel's
(`VmHWM`), which is reset before every step. A step is within its limit if its peak is at most what
stays, plus two copies of the largest layer, plus all masks before and after the step (a byte for
each weight).

Needs Linux. Exits with 1 if a step exceeds its limit, or a count is not exact.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import gc
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# With oneDNN, TensorFlow keeps freed memory for itself, which would hide what a step holds.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import lottery_ticket_pruner as ltp
import masked_layers as ml

GB = 1e9


def memory(field: str) -> int:
    """Returns a field of `/proc/self/status` in bytes, such as `VmHWM`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"This system does not report {field}.")


def collected() -> int:
    """Returns the resident memory of the process after freeing what is unused."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return memory("RssAnon")


def return_freed_memory() -> None:
    """Makes the C library return arrays of 1 MB and more to the system when they are freed.

    glibc keeps freed arrays of up to 32 MB, which would hide what a step holds.
    """
    threshold = -3  # M_MMAP_THRESHOLD
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(threshold, 1 << 20)


@dataclasses.dataclass
class Row:
    """What a step took.

    Attributes:
        name: Name of the step.
        seconds: Its time.
        processor: Processor time of all threads, in seconds.
        peak: Largest resident memory in bytes, above what was resident before.
        stays: Resident memory in bytes after the step, above what was resident before.
        limit: Largest peak that is allowed.
    """

    name: str
    seconds: float
    processor: float
    peak: int
    stays: int
    limit: float

    def line(self, layer: float) -> str:
        """Returns the row of the table."""
        verdict = "" if self.peak <= self.limit else "  ABOVE ITS LIMIT"
        times = f"{self.seconds:10.1f}{self.processor:10.1f}"
        return (
            f"{self.name:24}{times}{self.peak / GB:10.2f}{self.peak / layer:10.1f}"
            f"{self.stays / GB:10.2f}{self.limit / GB:10.2f}{verdict}"
        )


class Meter:
    """Measures steps and prints a row for each.

    Args:
        layer: Bytes of the largest layer.
        masks: Bytes of all masks.
    """

    # Of allocators, thread stacks, code that is loaded and graphs that are traced.
    slack = 60e6

    def __init__(self, layer: int, masks: int) -> None:
        self.layer, self.masks = layer, masks
        self.rows: list[Row] = []

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Measures a block."""
        before = collected()
        files = memory("RssFile") + memory("RssShmem")
        Path("/proc/self/clear_refs").write_text("5")
        start, worked = time.perf_counter(), time.process_time()
        yield
        seconds, processor = time.perf_counter() - start, time.process_time() - worked
        # The peak of all resident memory; file pages only grow within a step, so that this is the
        # most that anonymous memory can have been.
        peak = memory("VmHWM") - files - before
        stays = collected() - before
        limit = max(stays, 0) + 2 * self.layer + 2 * self.masks + self.slack
        self.rows.append(Row(name, seconds, processor, peak, stays, limit))
        print(self.rows[-1].line(self.layer), flush=True)


def large_model(weights: int, count: int) -> keras.Model:
    """Returns a model of `count` square dense layers with about `weights` weights together."""
    width = math.isqrt(weights // count)
    initializer = [keras.initializers.RandomUniform(-0.1, 0.1, seed=i) for i in range(count)]
    layers = [
        keras.layers.Dense(width, kernel_initializer=initializer[i], name=f"dense_{i}")
        for i in range(count)
    ]
    return keras.Sequential([keras.Input((width,)), *layers], name="large")


def train(model: keras.Model) -> None:
    """Changes every kernel, one after the other, as a training would."""
    rng = np.random.default_rng(0)
    for ref in ml.masked_refs(model):
        value = rng.standard_normal(ref.variable.shape, dtype="float32")
        ref.variable.assign(value)
        del value


class Study:
    """The steps, in their order, on one model.

    Args:
        weights: Number of weights.
        count: Number of layers.
        folder: Folder for files.
    """

    def __init__(self, weights: int, count: int, folder: Path) -> None:
        self.weights, self.count, self.folder = weights, count, folder
        self.model: keras.Model = None
        self.pruner: Any = None
        self.faults: list[str] = []

    def steps(self) -> dict[str, Callable[[], None]]:
        """Returns the steps by name."""
        return {
            "create": self.create,
            "convert_to_masked": self.convert,
            "LotteryTicketPruner": self.record,
            "train": lambda: train(self.model),
            "set_pretrained_weights": lambda: self.pruner.set_pretrained_weights(),
            "large_final": lambda: self.prune("large_final", 0.8),
            "smallest_weights": lambda: self.prune("smallest_weights", 0.9),
            "sparsity_report": lambda: ml.sparsity_report(self.model) and None,
            "rewind": lambda: self.pruner.rewind(),
            "save_masks": lambda: ml.save_masks(self.model, self.folder / "masks.npz"),
            "load_masks": lambda: ml.load_masks(self.model, self.folder / "masks.npz"),
            "pruner.save": lambda: self.pruner.save(self.folder / "pruner.npz"),
            "forget the pruner": self.forget,
            "pruner.load": self.load_pruner,
            "forget it again": self.forget,
            "save_ticket": lambda: ml.save_ticket(self.model, self.folder / "t.safetensors"),
            "save .keras": lambda: self.model.save(self.folder / "model.keras"),
            "export_sparse": self.export,
            "strip_masks": self.strip,
            "forget the model": self.forget_model,
            "load_ticket": lambda: self.load("t.safetensors"),
            "forget its model": self.forget_model,
            "load .keras": lambda: self.load("model.keras"),
        }

    def create(self) -> None:
        self.model = large_model(self.weights, self.count)

    def convert(self) -> None:
        ml.convert_to_masked(self.model, inplace=True)

    def record(self) -> None:
        self.pruner = ltp.LotteryTicketPruner(self.model)

    def prune(self, criterion: str, sparsity: float) -> None:
        report = self.pruner.update_masks(criterion, sparsity=sparsity, scope="global")
        wanted = report.size - math.floor(sparsity * report.size + 1e-6)
        if report.alive != wanted:
            self.faults.append(f"{criterion} keeps {report.alive} weights, expected {wanted}")

    def forget(self) -> None:
        self.pruner = None

    def forget_model(self) -> None:
        self.model = None

    def load_pruner(self) -> None:
        self.pruner = ltp.LotteryTicketPruner.load(self.folder / "pruner.npz", self.model)
        (self.folder / "pruner.npz").unlink()

    def export(self) -> None:
        ml.export_sparse_saved_model(self.model, self.folder / "exported")

    def strip(self) -> None:
        ml.strip_masks(self.model, inplace=True)

    def load(self, name: str) -> None:
        path = self.folder / name
        ticket = path.suffix == ".safetensors"
        self.model = ml.load_ticket(path) if ticket else keras.models.load_model(path)
        path.unlink()


def main() -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=float, default=1e9, help="default: %(default)g")
    parser.add_argument("--layers", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--skip", nargs="*", default=[], metavar="STEP", help="steps to leave out")
    parser.add_argument("--until", metavar="STEP", help="last step; default: all steps")
    parser.add_argument("--folder", type=Path, help="folder for files; default: a temporary one")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    return_freed_memory()
    study = Study(int(options.weights), options.layers, folder)
    named = {*options.skip, *([options.until] if options.until else [])}
    if unknown := named - study.steps().keys():
        parser.error(f"unknown steps: {sorted(unknown)}; known: {list(study.steps())}")
    width = math.isqrt(int(options.weights) // options.layers)
    meter = Meter(4 * width**2, options.layers * width**2)
    print(
        f"Keras {keras.version()} on {keras.backend.backend()}: {meter.masks:,} weights in "
        f"{options.layers} layers of {meter.layer / GB:.2f} GB, masks of {meter.masks / GB:.2f} GB"
    )
    heads = ("seconds", "processor", "peak GB", "in layers", "stays GB", "limit GB")
    print(f"{'step':24}" + "".join(f"{head:>10}" for head in heads), flush=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, work in study.steps().items():
                if name not in options.skip:
                    with meter.step(name):
                        work()
                if name == options.until:
                    break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    above = [row.name for row in meter.rows if row.peak > row.limit]
    print(f"above their limits: {', '.join(above) or 'none'}")
    print("\n".join(study.faults) or "all counts are exact")
    return int(bool(above or study.faults))


if __name__ == "__main__":
    sys.exit(main())
