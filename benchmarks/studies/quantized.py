"""Compares quantization-aware training under masks with rounding after training.

    python -m benchmarks.studies.quantized --data-dir DIR

A LeNet-300-100 and a small network of convolutions are trained on MNIST and pruned gradually to
95 %. Copies then train on for the same number of epochs, with floating-point weights or with
weights that are rounded in the forward pass. All are exported, and the accuracy on the test images
is that of the loaded folder. "int8 after" and "int4 after" round the floating-point copy. The
points lost are those against the floating-point copy of the same seed.

For every folder it is checked that pruned weights are exactly zero, and for weights that were
rounded in training, that the outputs of the folder are those of the model.

    python -m benchmarks.studies.quantized --data-dir DIR --peers tfmot pquant

compares LeNet-300-100 with TensorFlow Model Optimization (PQAT, from the same pruned weights and
compared with the same floating-point copy) and PQuantML (pquant-ml, which prunes by itself, and is
compared with its own training without rounding). All take the same numbers of steps.
"""

import argparse
import contextlib
import dataclasses
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from benchmarks.coded_values import accuracy_of
from benchmarks.quantization_peers import BATCH, FIRST_RATE, LAST_RATE
from benchmarks.timing import Contender, MissingError, Worker
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules, training
from lottery_ticket_pruner.experiments import datasets, networks
from masked_layers.serving import encoding

SPARSITY = 0.95
PEERS = {"tfmot": "tensorflow-model-optimization tf_keras", "pquant": "pquant-ml tensorflow"}


def small_cnn(shape):
    """Returns a network of two convolutions, with strides so that training is fast on a CPU."""
    parts = [layers.Conv2D(n, 3, strides=2, activation="relu") for n in (16, 32)]
    return keras.Sequential([keras.Input(shape), *parts, layers.Flatten(), layers.Dense(10)])


def fit(model, data, rate, epochs, seed, callbacks=()):
    steps = epochs * -(-len(data.x_train) // BATCH)
    model.compile(
        keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(rate, steps)),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    arrays = data.x_train, data.y_train
    training.fit(
        model, *arrays, batch_size=BATCH, epochs=epochs, seed=seed, callbacks=list(callbacks)
    )


def pruned(name, data, seed, epochs):
    """Returns a trained model that was pruned to `SPARSITY`."""
    keras.utils.set_random_seed(seed)
    shape = data.x_train.shape[1:]
    model = networks.build(name, shape) if name == "lenet-300-100" else small_cnn(shape)
    fit(model, data, FIRST_RATE, epochs, seed)
    masked = ml.convert_to_masked(model)
    stretch = 3 * epochs * -(-len(data.x_train) // BATCH) // 4
    every = min(100, max(1, stretch // 4))  # In short trainings, several updates nevertheless.
    schedule = schedules.Polynomial(
        0.5, SPARSITY, begin_step=0, end_step=stretch // every * every, frequency=every
    )
    pruning = GradualPruning(LotteryTicketPruner(masked), schedule, scope="global")
    fit(masked, data, FIRST_RATE, epochs, seed, [pruning])
    return masked


def exported(model, data, values, folder):
    """Exports a model and checks it; returns the accuracy on the test images and the bytes."""
    report = ml.export_sparse_saved_model(
        model, folder, values=values, sample_inputs=data.x_test[:256]
    )
    masks = ml.get_masks(model)
    for path, array in encoding.decode((folder / "assets" / "weights.mlsp").read_bytes()).items():
        assert path not in masks or not array[~masks[path]].any(), path
    assert report.output_error is not None
    assert report.output_error < 1e-5
    return accuracy_of(folder, data), report.disk_nbytes


def compare(name, data, seed, epochs):
    """Returns the start of the last training, and the accuracy of floats, after printing all."""
    start = pruned(name, data, seed, epochs)
    floats = ml.convert_to_masked(start)
    fit(floats, data, LAST_RATE, epochs, seed)
    rows = {"float32": floats}
    for kind in ("int8", "int4"):
        rows[f"{kind} after"] = ml.convert_to_masked(floats, quantize=kind)
        rows[kind] = ml.convert_to_masked(start, quantize=kind)
        fit(rows[kind], data, LAST_RATE, epochs, seed)
    reference = None
    for label, model in rows.items():
        with tempfile.TemporaryDirectory() as root:
            values = "float32" if label == "float32" else "int8"
            accuracy, nbytes = exported(model, data, values, Path(root) / "1")
        reference = accuracy if reference is None else reference
        lost = reference - accuracy
        print(
            f"{name:13}  {seed:4}  {label:10}  {accuracy:8.2f}  {lost:11.2f}  {nbytes:8}",
            flush=True,
        )
    return start, reference


def trained_by(peer, **arguments):
    """Returns what a peer measured, from a process of its own."""
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"}
    if peer == "tfmot":
        environment["TF_USE_LEGACY_KERAS"] = "1"
    contender = Contender(f"benchmarks.quantization_peers:{peer}", "result", arguments, environment)
    with contextlib.closing(Worker(contender)) as worker:
        return worker.measure("result")


def compare_peer(peer, start, reference, **arguments):
    """Trains with a peer and prints its rows, or why there are none."""
    try:
        if peer == "tfmot":
            with tempfile.TemporaryDirectory() as root:
                path = Path(root) / "start.npz"
                np.savez(path, *ml.strip_masks(start).get_weights())
                rows = {"tfmot int8": trained_by("tfmot", start=str(path), **arguments)}
        else:
            arguments["sparsity"] = SPARSITY
            rows = {"pquant float32": trained_by("pquant", quantized=False, **arguments)}
            reference = rows["pquant float32"]["accuracy"]
            rows["pquant int8"] = trained_by("pquant", quantized=True, **arguments)
    except MissingError as error:
        print(f"{peer}: {error} is not installed; `pip install {PEERS[peer]}`", flush=True)
        return
    except RuntimeError as error:
        print(f"{peer} failed: {str(error).strip().splitlines()[-1]}", flush=True)
        return
    for label, row in rows.items():
        size = f"{row['bytes']} bytes, deflated {row['deflated']}" if row["bytes"] else "no file"
        print(
            f"lenet-300-100  {arguments['seed']:4}  {label:14}  {row['accuracy']:.2f}, lost "
            f"{reference - row['accuracy']:.2f}; {size}; "
            f"{row['nonzero']} of {row['pruned']} pruned weights are not zero "
            f"({row['pruned'] / row['weights']:.2%} are pruned)",
            flush=True,
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=5, help="of each of the three trainings")
    parser.add_argument("--images", type=int, default=20_000, help="of the training images")
    parser.add_argument(
        "--peers",
        nargs="+",
        choices=list(PEERS),
        default=[],
        help="compare LeNet-300-100 with them",
    )
    arguments = parser.parse_args()
    data = datasets.load("mnist", arguments.data_dir)
    part = slice(arguments.images)
    data = dataclasses.replace(data, x_train=data.x_train[part], y_train=data.y_train[part])
    print("network        seed  weights     accuracy  points lost  folder B", flush=True)
    task = {key: getattr(arguments, key) for key in ("data_dir", "images", "epochs")}
    for name in ("lenet-300-100",) if arguments.peers else ("lenet-300-100", "small-cnn"):
        for seed in arguments.seeds:
            start, reference = compare(name, data, seed, arguments.epochs)
            for peer in arguments.peers:
                compare_peer(peer, start, reference, seed=seed, **task)


if __name__ == "__main__":
    main()
