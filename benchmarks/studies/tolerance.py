"""Compares `prune` with a ladder of pruning and training by hand, on the same models and data.

    python -m benchmarks.studies.tolerance --data-dir DIR

Each model is trained first. The ladder prunes a fifth of the kept weights of every layer and trains
for as many epochs as a step of `prune`, until the validation accuracy is more than `--max-drop`
below that of the dense model; the last rung before counts. The table shows the share of pruned
weights, the bytes of the served folder, the drop on the test data with its 95 % interval, and the
minutes without training the dense model.
"""

import argparse
import time

import keras
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, compression, prune, training
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


def job(name, data_dir, limit):
    """Returns data, as three pairs, and a trained model."""
    data = datasets.load(name, data_dir)
    pairs = [(data.x_train, data.y_train), (data.x_validation, data.y_validation)]
    pairs = [(x[:limit], y[:limit]) for x, y in pairs]
    keras.utils.set_random_seed(0)
    if name == "cifar10":
        model, epochs = small_cnn(data.input_shape, data.classes), 12
    else:
        model = networks.build("lenet-300-100", data.input_shape)
        epochs = 30 if name == "digits" else 8
    model.compile(keras.optimizers.Adam(1e-3), LOSS, metrics=["accuracy"])
    training.fit(model, *pairs[0], batch_size=64, epochs=epochs)
    return (*pairs, (data.x_test, data.y_test)), model


def ladder(model, data, max_drop, epochs):
    """Returns the sparsity of the last good rung and the model there."""
    masked = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(masked)
    floor = training.evaluate(masked, *data[1])["accuracy"] - max_drop
    best = ml.get_masks(masked), masked.get_weights()
    rungs = 0
    while True:
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", rate=0.2)
        pruner.treat("finetune")
        training.fit(masked, *data[0], batch_size=64, epochs=epochs, seed=rungs)
        rungs += 1
        if training.evaluate(masked, *data[1])["accuracy"] < floor - 1e-9:
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
    line(["data", "way", "trainings", "pruned", "bytes", "test", "drop (95 % interval)", "minutes"])
    line(["---"] * 8)
    for name in arguments.data:
        data, model = job(name, arguments.data_dir, arguments.limit)
        epochs = arguments.epochs or max(3, -(-400 // -(-len(data[0][0]) // 64)))
        started = time.perf_counter()
        result = prune(model, data, arguments.max_drop, epochs=epochs)
        minutes = (time.perf_counter() - started) / 60
        trainings = sum(row["method"] == "iterative" for row in result.rows)
        report(name, "prune", trainings, result.model, result.test, minutes)
        started = time.perf_counter()
        by_hand, rungs = ladder(model, data, arguments.max_drop, epochs)
        minutes = (time.perf_counter() - started) / 60
        test = compression.compare_models(model, by_hand, data[2])
        report(name, "ladder by hand", rungs, by_hand, test, minutes)


def report(name, way, trainings, model, test, minutes):
    low, high = test.interval
    line(
        [
            name,
            way,
            trainings,
            f"{ml.sparsity_report(model).sparsity:.1%}",
            f"{compression.served_size(model):,}",
            f"{test.dense:.2%} -> {test.pruned:.2%}",
            f"{100 * test.drop:+.2f} ({100 * low:+.2f} to {100 * high:+.2f})",
            f"{minutes:.1f}",
        ]
    )


if __name__ == "__main__":
    main()
