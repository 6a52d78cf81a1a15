"""Compares `prune` with a ladder of pruning and training by hand, on the same models and data.

    python -m benchmarks.studies.tolerance --data-dir DIR
    python -m benchmarks.studies.tolerance --data transformer
    python -m benchmarks.studies.tolerance --data HLA-A02:01 HLA-A03:01 HLA-B07:02

Each model is trained first, for the digits, MNIST and CIFAR-10, and for a transformer of KerasHub
that reads a digit row by row. The names of alleles stand for networks that others trained, of the
package mhcnuggets (an LSTM each, which predicts how well peptides bind), and are pruned as they
are, on the package's own data (`pip install --no-deps mhcnuggets`). They have seen all of that data
in their training.

The ladder prunes a fifth of the kept weights of every layer and trains for as many epochs as a step
of `prune`, until the validation accuracy is more than `--max-drop` below that of the dense model;
the last rung before counts. The table shows the share of pruned weights, the bytes of the served
folder and of that of the dense model, the drop on the test data with its 95 % interval, the latency
of both folders with one example, and the minutes without training the dense model, elapsed and of
the processor, which says more on a busy machine. The model of `prune` is found first, so it also
takes what TensorFlow does only once in a process.
"""

import argparse
import csv
import math
import tempfile
import time
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, compression, prune, training
from lottery_ticket_pruner.commands import served_latency
from lottery_ticket_pruner.experiments import datasets, networks

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def small_cnn(shape, classes):
    """Returns a network of three convolutions with normalization."""
    parts = []
    for width in (16, 32, 64):
        convolution = layers.Conv2D(width, 3, padding="same", use_bias=False)
        parts += [convolution, layers.BatchNormalization(), layers.ReLU(), layers.MaxPooling2D()]
    model = [keras.Input(shape), *parts, layers.Flatten(), layers.Dense(classes, name="output")]
    return keras.Sequential(model, name="cnn")


def transformer(rows, width, classes):
    """Returns a transformer of KerasHub over the rows of an image."""
    import keras_hub

    inputs = keras.Input((rows, width))
    x = layers.Dense(64, name="embedding")(inputs)
    x = x + keras_hub.layers.PositionEmbedding(rows)(x)
    for number in range(2):
        x = keras_hub.layers.TransformerEncoder(128, 4, name=f"block_{number}")(x)
    outputs = layers.Dense(classes, name="output")(layers.GlobalAveragePooling1D()(x))
    return keras.Model(inputs, outputs, name="transformer")


def job(name, data_dir, limit):
    """Returns data, as three pairs, and a trained model."""
    if name.startswith("HLA-"):
        return binding(name, limit)
    data = datasets.load("digits" if name == "transformer" else name, data_dir)
    pairs = [(data.x_train, data.y_train), (data.x_validation, data.y_validation)]
    pairs = [(x[:limit], y[:limit]) for x, y in pairs]
    test = data.x_test, data.y_test
    keras.utils.set_random_seed(0)
    if name == "cifar10":
        model, epochs = small_cnn(data.input_shape, data.classes), 12
    elif name == "transformer":
        pairs = [(x.reshape(-1, 8, 8), y) for x, y in pairs]
        test = test[0].reshape(-1, 8, 8), test[1]
        model, epochs = transformer(8, 8, data.classes), 40
    else:
        model = networks.build("lenet-300-100", data.input_shape)
        epochs = 30 if name == "digits" else 8
    model.compile(keras.optimizers.Adam(1e-3), LOSS, metrics=["accuracy"])
    training.fit(model, *pairs[0], batch_size=64, epochs=epochs)
    return (*pairs, test), model


# Concentrations in nM: up to the first one, a peptide binds, and the second has the target 0.
BINDS, WEAKEST = 500, 50_000


def binding_accuracy(y_true, y_pred):
    """Returns which peptides are rightly said to bind or not to bind."""
    limit = 1 - math.log(BINDS, WEAKEST)
    return ops.cast(ops.equal(y_true >= limit, y_pred >= limit), "float32")


def binding(allele, limit):
    """Returns peptides and their binding to an allele, and the network that mhcnuggets ships."""
    import h5py
    import mhcnuggets
    from mhcnuggets.src import aa_embeddings as encoding

    folder = Path(mhcnuggets.__file__).parent
    alphabet, longest = encoding.AA_SOFTHOT, encoding.MHCI_MASK_LEN
    with (folder / "data" / "production" / "mhcI" / "curated_training_data.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["mhc"].replace("*", "") == allele]
    rows = [row for row in rows if len(row["peptide"]) <= longest][:limit]
    rows = [row for row in rows if set(row["peptide"]) <= set(alphabet)]
    x = np.array(
        [[alphabet[letter] for letter in row["peptide"].ljust(longest, "Z")] for row in rows],
        "float32",
    )
    strengths = np.clip([float(row["IC50(nM)"]) for row in rows], 1, WEAKEST)
    y = (1 - np.log(strengths) / math.log(WEAKEST)).astype("float32")[:, None]
    order = np.random.default_rng(0).permutation(len(x))
    parts = np.split(order, [int(0.6 * len(x)), int(0.8 * len(x))])
    model = keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Masking(encoding.MASK_VALUE),
            layers.LSTM(64, dropout=0.2, recurrent_dropout=0.2),
            layers.Dense(64),
            layers.Dropout(0.2),
            layers.Activation("tanh"),
            layers.Dense(1),
            layers.Activation("sigmoid"),
        ],
        name="mhcnuggets",
    )
    arrays = []
    with h5py.File(folder / "saves" / "production" / f"{allele}_BA.h5") as file:
        weights = file.get("model_weights", file)
        for layer in weights.attrs["layer_names"]:
            group = weights[layer]
            arrays += [np.array(group[name]) for name in group.attrs["weight_names"]]
    model.set_weights(arrays)
    model.compile(keras.optimizers.Adam(1e-3), "mse", metrics=[binding_accuracy])
    return tuple((x[part], y[part]) for part in parts), model


def ladder(model, data, name, max_drop, epochs):
    """Returns the model of the last good rung, and the number of all rungs."""
    masked = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(masked)
    floor = training.evaluate(masked, *data[1])[name] - max_drop
    best = ml.get_masks(masked), masked.get_weights()
    rungs = 0
    while True:
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", rate=0.2)
        pruner.treat("finetune")
        training.fit(masked, *data[0], batch_size=64, epochs=epochs, seed=rungs)
        rungs += 1
        if training.evaluate(masked, *data[1])[name] < floor - 1e-9:
            break
        best = ml.get_masks(masked), masked.get_weights()
    ml.set_masks(masked, best[0])
    masked.set_weights(best[1])
    return masked, rungs


def line(cells):
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["digits", "mnist", "cifar10"])
    parser.add_argument("--data-dir")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--epochs", type=int, default=None)
    parser.add_argument("--limit", type=int, default=None, help="training examples at most")
    arguments = parser.parse_args()
    heads = ["data", "way", "trainings", "pruned", "bytes", "test", "drop (95 % interval)"]
    line([*heads, "milliseconds a call", "minutes, of a processor"])
    line(["---"] * (len(heads) + 2))
    for name in arguments.data:
        study(name, arguments)


def study(name, arguments):
    """Prints the lines of a model."""
    data, model = job(name, arguments.data_dir, arguments.limit)
    metric = "binding_accuracy" if name.startswith("HLA-") else "accuracy"
    epochs = arguments.epochs or max(3, -(-400 // -(-len(data[0][0]) // 64)))
    with Minutes() as minutes:
        result = prune(
            model, data, arguments.max_drop, metric=metric, mode="max", trained=True, epochs=epochs
        )
    trainings = sum(row["method"] == "iterative" for row in result.rows)
    report(name, "prune", trainings, model, result.model, data, metric, minutes.found)
    with Minutes() as minutes:
        by_hand, rungs = ladder(model, data, metric, arguments.max_drop, epochs)
    report(name, "ladder by hand", rungs, model, by_hand, data, metric, minutes.found)


class Minutes:
    """Measures the elapsed minutes of a block, and those of all processors together."""

    def __enter__(self):
        self._before = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        now = time.perf_counter(), time.process_time()
        self.found = [(end - start) / 60 for start, end in zip(self._before, now, strict=True)]


def report(name, way, trainings, dense, model, data, metric, minutes):
    """Prints a line of the table."""
    test = compression.compare_models(dense, model, data[2], metric=metric, mode="max")
    assert test.interval is not None
    low, high = test.interval
    with tempfile.TemporaryDirectory() as folder, served_latency.DenseFolder(dense) as served:
        place = Path(folder, "served")
        compared = served.timed(served.compare(model, place), place, data[2][0])
    assert compared.milliseconds is not None
    line(
        [
            name,
            way,
            trainings,
            f"{ml.sparsity_report(model).sparsity:.1%}",
            "{:,} of {:,}".format(*compared.nbytes),
            f"{test.dense:.2%} -> {test.pruned:.2%}",
            f"{100 * test.drop:+z.2f} ({100 * low:+z.2f} to {100 * high:+z.2f})",
            "{:.2f}, dense {:.2f}".format(*compared.milliseconds),
            "{:.1f}, {:.2f}".format(*minutes),
        ]
    )


if __name__ == "__main__":
    main()
