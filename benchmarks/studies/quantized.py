"""Compares quantization-aware training under masks with rounding after training.

    python -m benchmarks.studies.quantized --data-dir DIR

A LeNet-300-100 and a small network of convolutions are trained on MNIST and pruned gradually to
95 %. Copies then train on for the same number of epochs, with floating-point weights or with
weights that are rounded in the forward pass. All are exported, and the accuracy on the test images
is that of the loaded folder. "int8 after" and "int4 after" round the floating-point copy. The
points lost are those against the floating-point copy of the same seed.

For every folder it is checked that pruned weights are exactly zero, and for weights that were
rounded in training, that the outputs of the folder are those of the model.
"""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

import masked_layers as ml
from benchmarks.coded_values import accuracy_of
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules, training
from lottery_ticket_pruner.experiments import datasets, networks
from masked_layers.serving import encoding

BATCH = 128
SPARSITY = 0.95


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
    fit(model, data, 1.2e-3, epochs, seed)
    masked = ml.convert_to_masked(model)
    updates = 3 * epochs * len(data.x_train) // BATCH // 400  # Of 100 steps, in three quarters.
    schedule = schedules.Polynomial(0.5, SPARSITY, begin_step=0, end_step=100 * updates)
    pruning = GradualPruning(LotteryTicketPruner(masked), schedule, scope="global")
    fit(masked, data, 1.2e-3, epochs, seed, [pruning])
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


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--epochs", type=int, default=5, help="of each of the three trainings")
    parser.add_argument("--images", type=int, default=20_000, help="of the training images")
    arguments = parser.parse_args()
    data = datasets.load("mnist", arguments.data_dir)
    part = slice(arguments.images)
    data = dataclasses.replace(data, x_train=data.x_train[part], y_train=data.y_train[part])
    print("network        seed  weights     accuracy  points lost  folder B", flush=True)
    for name in ("lenet-300-100", "small-cnn"):
        for seed in arguments.seeds:
            start = pruned(name, data, seed, arguments.epochs)
            floats = ml.convert_to_masked(start)
            fit(floats, data, 1e-3, arguments.epochs, seed)
            rows = {"float32": floats}
            for kind in ("int8", "int4"):
                rows[f"{kind} after"] = ml.convert_to_masked(floats, quantize=kind)
                rows[kind] = ml.convert_to_masked(start, quantize=kind)
                fit(rows[kind], data, 1e-3, arguments.epochs, seed)
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


if __name__ == "__main__":
    main()
