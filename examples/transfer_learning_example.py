"""Compares lottery tickets from a pretrained and from a random start on a new task.

A pretrained base gets a new head and is trained on a new task. Its smallest weights are pruned, the
kept weights are rewound to their starting values and trained again, step by step down to 5 % of the
base. The same is done from random weights. The accuracies of the two tickets show the value of
pretrained weights for a sparse network. By default the base is a small network that this script
trains on the first half of the classes, and the new task is the other half:

    python examples/transfer_learning_example.py --which_set cifar10 --data-dir DIR --seeds 0 1 2
    python examples/transfer_learning_example.py --which_set cifar10 --base mobilenet_v2
    python examples/transfer_learning_example.py --quick
"""

import argparse
import statistics

import keras
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.experiments import datasets

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def of_classes(x, y, wanted):
    """Returns the examples of some classes, with labels from 0."""
    chosen = (y >= wanted.start) & (y < wanted.stop)
    return x[chosen], y[chosen] - wanted.start


def compile_model(model, learning_rate):
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])


def fit(model, train, validation, epochs):
    stop_early = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    model.fit(
        *train,
        batch_size=32,
        epochs=epochs,
        validation_data=validation,
        callbacks=[stop_early],
        verbose=0,
    )


def with_head(base, classes):
    return keras.Sequential([base, layers.Dense(classes, activation="softmax", name="head")])


def own_base(input_shape):
    """Returns a small convolutional network."""
    return keras.Sequential(
        [
            keras.Input(input_shape),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
        ],
        name="base",
    )


def mobilenet_base(input_shape, weights):
    """Returns MobileNetV2 for images upscaled to 96 x 96; downloads the ImageNet weights."""
    inputs = keras.Input(input_shape)
    x = layers.Rescaling(2.0, offset=-1.0)(layers.Resizing(96, 96)(inputs))
    mobilenet = keras.applications.MobileNetV2(
        (96, 96, 3), include_top=False, weights=weights, pooling="avg"
    )
    return keras.Model(inputs, mobilenet(x), name="base")


def base_and_starts(name, data, classes, epochs):
    """Returns the base and its pretrained and random weights, by name of the start."""
    if name == "mobilenet_v2":
        base = mobilenet_base(data.input_shape, "imagenet")
        random = mobilenet_base(data.input_shape, None).get_weights()
    else:
        base = own_base(data.input_shape)
        random = base.get_weights()
        model = with_head(base, len(classes))
        compile_model(model, 1e-3)
        train = of_classes(data.x_train, data.y_train, classes)
        fit(model, train, of_classes(data.x_validation, data.y_validation, classes), epochs)
    return base, {"pretrained": base.get_weights(), "random": random}


def find_tickets(model, train, validation, test, epochs):
    """Returns test accuracies of the dense model and its tickets, by sparsity of the base."""
    pruner = LotteryTicketPruner(model)  # records the initial weights
    pruner.reset_masks()
    accuracies = {}
    for sparsity in (0.0, *SPARSITIES):
        if sparsity:
            pruner.set_pretrained_weights()
            pruner.update_masks("large_final", sparsity=sparsity, scope="global")
        pruner.rewind()
        fit(model, train, validation, epochs)
        accuracies[sparsity] = model.evaluate(*test, verbose=0)[1]
        print(f"  {sparsity:6.1%} of the base pruned: accuracy {accuracies[sparsity]:.4f}")
    return accuracies


def table(found):
    """Returns a Markdown table: sparsities by starts, mean ± standard deviation over seeds."""
    starts = list(found[0])
    lines = [f"| base pruned | {' | '.join(f'{start} start' for start in starts)} |"]
    lines.append("| --: " * (1 + len(starts)) + "|")
    for sparsity in (0.0, *SPARSITIES):
        cells = [f"{sparsity:.0%}"]
        for start in starts:
            percent = [100 * of_seed[start][sparsity] for of_seed in found]
            spread = f" ± {statistics.stdev(percent):.2f}" if len(percent) > 1 else ""
            cells.append(f"{statistics.mean(percent):.2f}{spread}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--which_set", default="cifar10_reduced_10x", choices=datasets.IMAGES)
    parser.add_argument("--data-dir", help="folder with the data set's published files")
    parser.add_argument("--base", default="own", choices=["own", "mobilenet_v2"])
    parser.add_argument("--epochs", type=int, default=20, help="maximum epochs per training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", default="transferred.keras", help="file of the sparse model")
    parser.add_argument("--quick", action="store_true", help="digits, own base, five epochs")
    args = parser.parse_args(argv)
    if args.quick:
        args.which_set, args.base, args.epochs = "digits", "own", 5

    data = datasets.load(args.which_set, args.data_dir)
    half = data.classes // 2
    old, new = range(half), range(half, data.classes)
    train = of_classes(data.x_train, data.y_train, new)
    validation = of_classes(data.x_validation, data.y_validation, new)
    test = of_classes(data.x_test, data.y_test, new)
    found: list[dict[str, dict[float, float]]] = []
    for seed in args.seeds:
        keras.utils.set_random_seed(seed)
        base, starts = base_and_starts(args.base, data, old, args.epochs)
        model = ml.convert_to_masked(with_head(base, len(new)), exclude="head")
        compile_model(model, 1e-4 if args.base == "mobilenet_v2" else 1e-3)
        head = model.get_layer("head").get_weights()
        accuracies = {}
        for start, weights in starts.items():
            print(f"seed {seed}, {start} start")
            model.get_layer("base").set_weights(weights)
            model.get_layer("head").set_weights(head)
            accuracies[start] = find_tickets(model, train, validation, test, args.epochs)
            if start == "pretrained" and not found:
                # Plain Keras layers with zeros for pruned weights, which load without this library.
                ml.strip_masks(model).save(args.out)
        found.append(accuracies)
    print(
        f"\nTest accuracy on the new task, %, {len(found)} seed{'s' if len(found) > 1 else ''}:\n"
    )
    print(table(found))
    print(f"\nThe sparsest ticket of the first pretrained start is in {args.out}")


if __name__ == "__main__":
    main()
