"""Compares sizes and accuracy of sparse SavedModels with exact, rounded and coded values.

    python -m benchmarks.coded_values lenet --data-dir DIR [--seeds 0 1] [--models DIR]
    python -m benchmarks.coded_values cifar10 --data-dir DIR [--seeds 0] [--images 20000]
    python -m benchmarks.coded_values resnet

`lenet` trains a LeNet-300-100 on MNIST, and prunes copies of it gradually while they train on, with
targets of which 70 % are the softened outputs of the dense network (Hinton et al., 2015). Each copy
is exported. The accuracy on the test images is that of the loaded folder, and its difference is
from the dense network of the same seed. Sizes are those of the whole folder. With `--models`,
trained models are kept in a folder and used again.

`cifar10` does the same with a network of three convolutions with strides and two dense layers
(356,810 weights) on CIFAR-10.

`resnet` exports a ResNet-50 with the weights of `benchmarks.serving`. Ratios are to the dense
folder of `benchmarks.serving`. Nothing is trained.
"""

import argparse
import dataclasses
import os
import tempfile
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

import masked_layers as ml
from benchmarks.serving import pruned, verdict, write_dense
from lottery_ticket_pruner import LotteryTicketPruner, schedules, training
from lottery_ticket_pruner.experiments import datasets, networks
from lottery_ticket_pruner.mask_schedules import GradualPruning
from masked_layers.files import file_sizes
from masked_layers.serving import export_sparse_saved_model

VALUES = ("float32", "int8", "codebook-5", "codebook-4", "codebook-3")
DATA = {"lenet": "mnist", "cifar10": "cifar10"}
SPARSITIES = {"lenet": (0.965, 0.985), "cifar10": (0.95,)}
RESNET_GOALS = {
    "int8": {0.8: 12.0, 0.9: 20.0, 0.95: 32.0},
    "codebook-5": {0.8: 16.0, 0.9: 25.0, 0.95: 38.0},
}
BATCH = 128
TEMPERATURE = 3


def fit(model, x, y, rate, epochs, seed, callbacks=()):
    rate = keras.optimizers.schedules.CosineDecay(rate, epochs * steps_of(x))
    model.compile(
        optimizer=keras.optimizers.Adam(rate),
        loss=keras.losses.CategoricalCrossentropy(from_logits=True),
    )
    training.fit(model, x, y, batch_size=BATCH, epochs=epochs, seed=seed, callbacks=callbacks)


def steps_of(x):
    return -(-len(x) // BATCH)


def small_network(shape):
    """Returns a network for small images, with strides so that training is fast on a CPU."""
    parts = [
        keras.layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")
        for width in (32, 64, 128)
    ]
    dense = keras.layers.Dense(128, activation="relu")
    parts += [keras.layers.Flatten(), dense, keras.layers.Dense(10)]
    return keras.Sequential([keras.Input(shape), *parts])


def dense_network(part, data, seed, epochs):
    keras.utils.set_random_seed(seed)
    shape = data.x_train.shape[1:]
    model = networks.build("lenet-300-100", shape) if part == "lenet" else small_network(shape)
    fit(model, data.x_train, one_hot(data.y_train), 1.2e-3, epochs, seed)
    return model


def sparse_network(dense, data, sparsity, seed, epochs):
    model = ml.convert_to_masked(dense)
    logits = dense.predict(data.x_train, batch_size=1000, verbose=0) / TEMPERATURE
    soft = keras.ops.convert_to_numpy(keras.ops.softmax(logits))
    end = epochs * steps_of(data.x_train) // 2
    schedule = schedules.Polynomial(0.5, sparsity, begin_step=0, end_step=end)
    pruning = GradualPruning(LotteryTicketPruner(model), schedule, scope="global")
    targets = 0.3 * one_hot(data.y_train) + 0.7 * soft
    fit(model, data.x_train, targets, 2e-3, epochs, seed, [pruning])
    return model


def one_hot(labels):
    return np.eye(10, dtype="float32")[labels]


def kept(path, make):
    if path is not None and path.exists():
        return keras.models.load_model(path, compile=False)
    model = make()
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        model.save(path)
    return model


def accuracy_of(folder, data):
    import tensorflow as tf

    served = tf.saved_model.load(str(folder))
    outputs = served.serve(tf.constant(data.x_test, tf.float32)).numpy()
    return 100 * np.mean(outputs.argmax(axis=-1) == data.y_test)


def trained(part, arguments):
    data = datasets.load(DATA[part], arguments.data_dir)
    images = slice(arguments.images)
    data = dataclasses.replace(data, x_train=data.x_train[images], y_train=data.y_train[images])
    print(f"{part}, {len(data.x_train)} training images")
    print("seed  sparsity  values      folder B  graph B  accuracy  points lost  output error")
    for seed in arguments.seeds:
        root = arguments.models and arguments.models / part / str(seed)
        dense = kept(
            root and root / "dense.keras",
            lambda s=seed: dense_network(part, data, s, arguments.epochs),
        )
        with tempfile.TemporaryDirectory() as folder:
            write_dense(dense, Path(folder) / "dense")
            size = sum(file_sizes(Path(folder) / "dense").values())
            reference = accuracy_of(Path(folder) / "dense", data)
        print(f"{seed:4}  {0:8.3f}  dense       {size:8}  {'':7}  {reference:8.2f}", flush=True)
        for sparsity in arguments.sparsities or SPARSITIES[part]:
            model = kept(
                root and root / f"{sparsity}.keras",
                lambda s=seed, p=sparsity, d=dense: sparse_network(
                    d, data, p, s, arguments.sparse_epochs
                ),
            )
            for values in VALUES:
                with tempfile.TemporaryDirectory() as folder:
                    report = export_sparse_saved_model(
                        model, Path(folder) / "out", values=values, level=9,
                        sample_inputs=data.x_train[:256],
                    )  # fmt: skip
                    accuracy = accuracy_of(Path(folder) / "out", data)
                print(
                    f"{seed:4}  {sparsity:8.3f}  {values:10}  {report.disk_nbytes:8}  "
                    f"{report.files['saved_model.pb']:7}  {accuracy:8.2f}  "
                    f"{reference - accuracy:11.2f}  {report.output_error:12.3g}  "
                    f"{size / report.disk_nbytes:5.1f} times",
                    flush=True,
                )


def resnet(arguments):
    print("weights  sparsity  values      dense kB  folder kB  graph kB   ratio  output error")
    for weights in arguments.weights:
        for sparsity in (0.8, 0.9, 0.95):
            model = pruned("ResNet50", weights, sparsity)
            with tempfile.TemporaryDirectory() as folder:
                write_dense(model, Path(folder) / "dense")
                dense = sum(file_sizes(Path(folder) / "dense").values())
                for values, goals in RESNET_GOALS.items():
                    report = export_sparse_saved_model(model, Path(folder) / values, values=values)
                    ratio = dense / report.disk_nbytes
                    goal = verdict(ratio, goals[sparsity], below=False)
                    print(
                        f"{weights:7}  {sparsity:8.2f}  {values:10}  {dense / 1e3:8.0f}  "
                        f"{report.disk_nbytes / 1e3:9.1f}  "
                        f"{report.files['saved_model.pb'] / 1e3:8.1f}  {ratio:6.2f}  "
                        f"{report.output_error:12.3g}   {goal}",
                        flush=True,
                    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=["lenet", "cifar10", "resnet"])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--models", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--epochs", type=int, default=10, help="of the dense network")
    parser.add_argument("--sparsities", type=float, nargs="+", help="of trained networks")
    parser.add_argument("--images", type=int, help="number of training images (default: all)")
    parser.add_argument("--sparse-epochs", type=int, default=16)
    parser.add_argument("--weights", nargs="+", default=["fresh", "normal"])
    arguments = parser.parse_args()
    for part in arguments.parts:
        print()
        if part == "resnet":
            resnet(arguments)
        else:
            trained(part, arguments)


if __name__ == "__main__":
    main()
