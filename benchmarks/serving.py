"""Compares sizes, latency, load time and memory of sparse SavedModels with dense ones.

    python -m benchmarks.serving [sizes] [latency] [load] [--rounds 9] [--values codebook-5]

The weights (seed 0) are Keras' initial weights (`fresh`), or drawn from a normal distribution with
He's standard deviation (`normal`), whose exponents compress less well. Trained weights and non-zero
biases can take more space than either. In every kernel, including that of the output layer, the
weights with the smallest magnitudes are pruned; biases and BatchNormalization are newly
initialized. The dense folder is written by `tf.saved_model.save` for the same function with one
copy of the weights.

For latency, both folders are loaded into one process and called in turns. For load time, new
processes with only TensorFlow load them in turns. Ratios are those of the medians over the rounds.
The load average at the start is printed; on a busy machine the processor time of loading is more
reliable than the wall time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.experiments import networks
from masked_layers.files import file_sizes
from masked_layers.serving import export_sparse_saved_model
from masked_layers.serving.tracing import effective_values, trace

SIZE_GOALS = {
    ("ResNet50", "fresh"): {0.8: 5.2, 0.9: 9.7, 0.95: 16.9, 0.99: 45.0},
    ("ResNet50", "normal"): {0.8: 4.7, 0.9: 9.0, 0.95: 15.0, 0.99: 40.0},
}
LENET_GOAL = 70_000
LATENCY_GOAL = 1.03
LOAD_GOAL = 1.1
SPARSITIES = {"lenet-300-100": 0.95, "conv-6": 0.9, "ResNet50": 0.9}

# Runs with only TensorFlow. Memory is that of the process, in KiB.
LOAD = """
import json, sys, time
import numpy as np
import tensorflow as tf
path, shape = sys.argv[1], json.loads(sys.argv[2])
memory = lambda key: int(next(l for l in open("/proc/self/status") if key in l).split()[1])
base = memory("VmRSS")
clocks = lambda: np.array([time.perf_counter(), time.process_time()])
start = clocks()
model = tf.saved_model.load(path)
v2 = clocks() - start
loaded = memory("VmRSS")
model.serve(tf.zeros(shape))
peak = memory("VmHWM")  # Not `ru_maxrss`, which a child takes over from its parent.
start = clocks()
with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    tf.compat.v1.saved_model.loader.load(session, ["serve"], path)
    v1 = clocks() - start
seconds = {"v2": [*v2], "v1": [*v1]}
print(json.dumps({"base": base, "loaded": loaded, "peak": peak, **seconds}))
"""


def pruned(name, weights, sparsity):
    """Returns a masked model of a network, with `weights` and each kernel at `sparsity`."""
    keras.utils.set_random_seed(0)
    if name in networks.NAMES:
        model = networks.build(name, (28, 28, 1) if name.startswith("lenet") else (32, 32, 3))
    else:
        model = getattr(keras.applications, name)(weights=None, classifier_activation=None)
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    masks = {}
    for ref in ml.masked_refs(model):
        value = keras.ops.convert_to_numpy(ref.variable)
        if weights == "normal":
            std = np.sqrt(2 / np.prod(value.shape[:-1]))
            value = (std * rng.standard_normal(value.shape)).astype("float32")
            ref.variable.assign(value)
        magnitude = np.abs(value)
        masks[ref.path] = magnitude > np.quantile(magnitude, sparsity)
    ml.set_masks(model, masks)
    return model


def write_dense(model, path):
    """Writes a dense SavedModel with one copy of the weights, using only TensorFlow."""
    import tensorflow as tf

    traced = trace(model, effective_values(model))
    root = tf.Module()
    root.serve = traced.function
    root.weights = list(traced.variables.values())
    signatures = {"serve": traced.function, "serving_default": traced.function}
    tf.saved_model.save(root, str(path), signatures=signatures)


def both(name, weights, sparsity, folder, values="float32"):
    """Writes the sparse and the dense folder; returns the report and the dense size in bytes."""
    model = pruned(name, weights, sparsity)
    report = export_sparse_saved_model(model, folder / "sparse", values=values)
    write_dense(model, folder / "dense")
    return report, sum(file_sizes(folder / "dense").values())


def verdict(value, goal, below=True):
    met = value <= goal if below else value >= goal
    return f"goal {goal:g}: {'met' if met else 'MISSED'}"


def sizes():
    print("network        weights  sparsity  dense kB  folder kB   ratio  payload/reference  error")
    cases = [("lenet-300-100", weights, 0.95) for weights in ("fresh", "normal")]
    cases += [("conv-6", weights, 0.9) for weights in ("fresh", "normal")]
    cases += [(*key, sparsity) for key, goals in SIZE_GOALS.items() for sparsity in goals]
    for name, weights, sparsity in cases:
        with tempfile.TemporaryDirectory() as folder:
            report, dense = both(name, weights, sparsity, Path(folder))
        ratio = dense / report.disk_nbytes
        reference = report.nbytes / report.reference_nbytes
        goals = [verdict(reference, 1.0)]
        if (name, weights) in SIZE_GOALS:
            goals.append(verdict(ratio, SIZE_GOALS[name, weights][sparsity], below=False))
        if name.startswith("lenet"):
            goals.append(verdict(report.disk_nbytes, LENET_GOAL))
        print(
            f"{name:13}  {weights:7}  {sparsity:8.2f}  {dense / 1e3:8.0f}  "
            f"{report.disk_nbytes / 1e3:9.1f}  {ratio:6.2f}  {reference:17.3f}  "
            f"{report.output_error:5.2g}   {'; '.join(goals)}",
            flush=True,
        )


def input_shape(name):
    if name.startswith("lenet"):
        return (28, 28, 1)
    return (32, 32, 3) if name in networks.NAMES else (224, 224, 3)


def latency(rounds, values):
    import tensorflow as tf

    print("network        batch  dense ms  sparse ms   ratio  largest difference of outputs")
    for name, sparsity in SPARSITIES.items():
        with tempfile.TemporaryDirectory() as folder:
            both(name, "fresh", sparsity, Path(folder), values)
            models = {kind: tf.saved_model.load(f"{folder}/{kind}") for kind in ("dense", "sparse")}
            for batch in (1, 32):
                rng = np.random.default_rng(0)
                x = tf.constant(rng.standard_normal((batch, *input_shape(name))), tf.float32)
                outputs = {kind: model.serve(x).numpy() for kind, model in models.items()}
                start = time.perf_counter()
                models["dense"].serve(x)
                calls = max(1, int(0.2 / (time.perf_counter() - start)))
                times: dict[str, list[float]] = {"dense": [], "sparse": []}
                for number in range(rounds):
                    # The order alternates.
                    for kind in sorted(models, reverse=bool(number % 2)):
                        start = time.perf_counter()
                        for _ in range(calls):
                            models[kind].serve(x)
                        times[kind].append((time.perf_counter() - start) / calls)
                dense, sparse = (np.median(times[kind]) * 1e3 for kind in ("dense", "sparse"))
                difference = np.abs(outputs["dense"] - outputs["sparse"]).max()
                print(
                    f"{name:13}  {batch:5}  {dense:8.3f}  {sparse:9.3f}  {sparse / dense:6.3f}  "
                    f"{difference:.3g} of {np.abs(outputs['dense']).max():.3g}   "
                    f"{verdict(sparse / dense, LATENCY_GOAL)}",
                    flush=True,
                )


def load(rounds, values):
    print("network        measure                  dense   sparse   ratio")
    for name, sparsity in SPARSITIES.items():
        with tempfile.TemporaryDirectory() as folder:
            both(name, "fresh", sparsity, Path(folder), values)
            found: dict[str, list[Any]] = {"dense": [], "sparse": []}
            for number in range(rounds):
                for kind in sorted(found, reverse=bool(number % 2)):
                    shape = json.dumps([1, *input_shape(name)])
                    command = [sys.executable, "-c", LOAD, f"{folder}/{kind}", shape]
                    result = subprocess.run(command, capture_output=True, text=True, check=True)
                    found[kind].append(json.loads(result.stdout.splitlines()[-1]))
        for measure, unit, key in (
            ("tf.saved_model.load", "s", lambda run: run["v2"][0]),
            ("its processor time", "s", lambda run: run["v2"][1]),
            ("v1 loader", "s", lambda run: run["v1"][0]),
            ("its processor time", "s", lambda run: run["v1"][1]),
            ("peak memory", "MB", lambda run: run["peak"] * 1024 / 1e6),
            ("memory after loading", "MB", lambda run: run["loaded"] * 1024 / 1e6),
            ("peak above TensorFlow", "MB", lambda run: (run["peak"] - run["base"]) * 1024 / 1e6),
        ):
            dense, sparse = (np.median([key(run) for run in found[k]]) for k in found)
            goal = "" if "above" in measure else verdict(sparse / dense, LOAD_GOAL)
            print(
                f"{name:13}  {measure:21} {unit:2}  {dense:7.2f}  {sparse:7.2f}  "
                f"{sparse / dense:6.3f}   {goal}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=["sizes", "latency", "load"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--values", default="float32", help="of `latency` and `load`")
    arguments = parser.parse_args()
    print(
        f"Keras {keras.__version__}, {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    )
    for part in arguments.parts:
        print()
        {
            "sizes": sizes,
            "latency": lambda: latency(arguments.rounds, arguments.values),
            "load": lambda: load(arguments.rounds, arguments.values),
        }[part]()


if __name__ == "__main__":
    main()
