"""Compares load time and peak memory of every export format with those of the dense model.

    python -m benchmarks.loading [NETWORK ...] [--rounds 7] [--formats NAME ...]

A network has Keras' initial weights (seed 0), of which those with the smallest magnitudes are
pruned in every kernel (lenet-300-100: 95 %, conv-6 and ResNet50: 90 %). Its formats are written and
their table printed as by `lottery-ticket export --format all`, and the dense model is written for
the same runtime: a SavedModel with one copy of the weights, Keras' ONNX and LiteRT files, a trace
of PyTorch, and for the ticket a `.keras` file of the plain model.

Every file is loaded in new processes, in turns with the dense one, by its runtime alone, and called
once with one row. Load time is the wall time and the processor time until the model can be called;
peak memory is that of the process after the first call, with the runtime and without what it took
before. Ratios are those of the medians over the rounds. On a busy machine, processor time is more
reliable than wall time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np

import masked_layers as ml
from benchmarks.serving import LOAD_GOAL, SPARSITIES, input_shape, pruned, verdict, write_dense
from lottery_ticket_pruner.commands.all_formats import Options, export_all

# `load` and `call` of each runtime, which are executed in a new process.
RUNTIMES = {
    "SavedModel": """
import tensorflow as tf
load = tf.saved_model.load
call = lambda model, x: model.serve(x)
""",
    "ONNX": """
import onnxruntime
load = lambda path: onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
call = lambda model, x: model.run(None, {model.get_inputs()[0].name: x})
""",
    "TorchScript": """
import torch
load = torch.jit.load
call = lambda model, x: model(torch.from_numpy(x))
""",
    "LiteRT": """
import tensorflow as tf
def load(path):
    model = tf.lite.Interpreter(path)
    (source,) = model.get_input_details()
    model.resize_tensor_input(source["index"], x.shape)
    model.allocate_tensors()
    return model
def call(model, x):
    model.set_tensor(model.get_input_details()[0]["index"], x)
    model.invoke()
""",
    "ticket": """
import keras
import masked_layers
def load(path):
    keras_file = path.endswith(".keras")
    return (keras.models.load_model if keras_file else masked_layers.load_ticket)(path)
call = lambda model, x: model(x)
""",
}
# Memory is that of the process, in KiB. `VmHWM`, not `ru_maxrss`, which a child takes over.
MEASURE = """
import json, sys, time
import numpy as np
path, shape = sys.argv[1], json.loads(sys.argv[2])
memory = lambda key: int(next(l for l in open("/proc/self/status") if key in l).split()[1])
clocks = lambda: np.array([time.perf_counter(), time.process_time()])
x = np.zeros(shape, "float32")
{runtime}
base, start = memory("VmRSS"), clocks()
model = load(path)
seconds = clocks() - start
call(model, x)
print(json.dumps([*seconds, memory("VmHWM"), memory("VmHWM") - base]))
"""
TRACE = """
import sys, keras, numpy, torch
model = keras.models.load_model(sys.argv[1], compile=False)
with torch.inference_mode():
    x = torch.zeros(*map(int, sys.argv[3:]))
    torch.jit.save(torch.jit.trace(model.eval(), x, check_trace=False), sys.argv[2])
"""
MEASURES = ("load, wall s", "load, CPU s", "peak MB", "peak above the runtime MB")


def dense_files(model: Any, name: str, folder: Path) -> dict[str, Path]:
    """Writes the dense model for each runtime, and returns the paths."""
    plain = ml.strip_masks(model)
    files = {
        "SavedModel": folder / "saved_model",
        "ONNX": folder / "dense.onnx",
        "TorchScript": folder / "dense.pt",
        "LiteRT": folder / "dense.tflite",
        "ticket": folder / "dense.keras",
    }
    write_dense(model, files["SavedModel"])
    plain.export(files["ONNX"], format="onnx", verbose=False)
    plain.export(files["LiteRT"], format="litert", verbose=False)
    plain.save(files["ticket"])
    shape = map(str, (1, *input_shape(name)))
    child([TRACE, str(files["ticket"]), str(files["TorchScript"]), *shape], backend="torch")
    return files


def child(arguments: list[str], backend: str = "tensorflow") -> str:
    """Executes code in a new process, and returns the last line that it prints.

    Raises:
        RuntimeError: If it fails.
    """
    command = [sys.executable, "-c", *arguments]
    environment = os.environ | {"KERAS_BACKEND": backend}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode:
        raise RuntimeError(result.stderr[-600:])
    return (result.stdout.splitlines() or [""])[-1]


def compare(name: str, rounds: int, chosen: list[str] | None) -> None:
    """Prints the measures of every format of a network."""
    model = pruned(name, "fresh", SPARSITIES[name])
    options = Options(
        tolerance=None, level=6, include=None, sample_inputs=None, batch_size=1, threads=None
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        table = export_all(model, folder / "all", options, overwrite=False)
        print(table)
        print(
            f"{'network':13}  {'format':19}  {'measure':25}     dense    sparse   ratio", flush=True
        )
        dense = dense_files(model, name, folder)
        for row in table.rows:
            if chosen and row.format not in chosen:
                continue
            if row.nbytes is None:
                print(f"{name:13}  {row.format:19}  not written: {row.note}", flush=True)
                continue
            runtime = row.format.partition(" ")[0]
            code = MEASURE.replace("{runtime}", RUNTIMES[runtime])
            shape = json.dumps([1, *input_shape(name)])
            paths = {"dense": dense[runtime], "sparse": folder / "all" / row.path}
            found: dict[str, list[Any]] = {"dense": [], "sparse": []}
            for number in range(rounds):
                for kind in sorted(found, reverse=bool(number % 2)):  # The order alternates.
                    found[kind].append(json.loads(child([code, str(paths[kind]), shape])))
            for place, measure in enumerate(MEASURES):
                scale = 1024 / 1e6 if "MB" in measure else 1
                one, other = (
                    scale * float(np.median([values[place] for values in found[kind]]))
                    for kind in ("dense", "sparse")
                )
                goal = "" if "above" in measure else verdict(other / one, LOAD_GOAL)
                print(
                    f"{name:13}  {row.format:19}  {measure:25}  {one:8.3f}  {other:8.3f}  "
                    f"{other / one:6.3f}   {goal}",
                    flush=True,
                )


def main() -> None:
    """Compares the networks of the arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = ["lenet-300-100", "conv-6"]
    parser.add_argument("networks", nargs="*", metavar="NETWORK", default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--formats", nargs="+", metavar="NAME", help="default: all")
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}")
    for name in arguments.networks:
        compare(name, arguments.rounds, arguments.formats)


if __name__ == "__main__":
    main()
