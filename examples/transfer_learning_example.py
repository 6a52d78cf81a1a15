"""Prune a pretrained network while it is fine-tuned on another task.

A pretrained base gets a new head. The head is trained first, then everything is fine-tuned,
then pruned step by step, with fine-tuning after each step (no rewinding: pretrained weights are
the ones to keep). By default the base is a small network that this script trains itself on the
first half of the classes; the new task is the other half:

    python examples/transfer_learning_example.py --which_set cifar10 --data-dir DIR
    python examples/transfer_learning_example.py --which_set cifar10 --base mobilenet_v2
    python examples/transfer_learning_example.py --quick
"""

import argparse

import keras
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.experiments import datasets

SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def of_classes(x, y, wanted):
    """The examples of some classes, relabelled from 0."""
    chosen = (y >= wanted.start) & (y < wanted.stop)
    return x[chosen], y[chosen] - wanted.start


def compile_model(model, learning_rate):
    optimizer = keras.optimizers.Adam(learning_rate)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])


def fit(model, train, validation, epochs):
    stop_early = keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True)
    model.fit(
        *train,
        batch_size=64,
        epochs=epochs,
        validation_data=validation,
        callbacks=[stop_early],
        verbose=0,
    )


def with_head(base, classes):
    return keras.Sequential([base, layers.Dense(classes, activation="softmax", name="head")])


def own_base(input_shape, train, validation, epochs):
    """A small convolutional network, trained here on another task."""
    base = keras.Sequential(
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
    model = with_head(base, int(train[1].max()) + 1)
    compile_model(model, 1e-3)
    fit(model, train, validation, epochs)
    return base


def mobilenet_base(input_shape):
    """MobileNetV2 with ImageNet weights (a download), on images scaled up to 96 x 96."""
    inputs = keras.Input(input_shape)
    x = layers.Rescaling(2.0, offset=-1.0)(layers.Resizing(96, 96)(inputs))
    mobilenet = keras.applications.MobileNetV2(
        (96, 96, 3), include_top=False, weights="imagenet", pooling="avg"
    )
    return keras.Model(inputs, mobilenet(x), name="base")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--which_set", default="cifar10_reduced_10x", choices=datasets.NAMES)
    parser.add_argument("--data-dir", help="folder with the data set's published files")
    parser.add_argument("--base", default="own", choices=["own", "mobilenet_v2"])
    parser.add_argument("--epochs", type=int, default=20, help="at most, for each training")
    parser.add_argument("--out", default="transferred.keras", help="file for the sparse model")
    parser.add_argument("--quick", action="store_true", help="digits, own base, five epochs")
    args = parser.parse_args(argv)
    if args.quick:
        args.which_set, args.base, args.epochs = "digits", "own", 5

    data = datasets.load(args.which_set, args.data_dir)
    half = data.classes // 2
    old, new = range(half), range(half, data.classes)
    parts = [
        (data.x_train, data.y_train),
        (data.x_validation, data.y_validation),
        (data.x_test, data.y_test),
    ]
    keras.utils.set_random_seed(0)
    if args.base == "own":
        old_train, old_validation, _ = (of_classes(*part, old) for part in parts)
        base = own_base(data.input_shape, old_train, old_validation, args.epochs)
    else:
        base = mobilenet_base(data.input_shape)
    train, validation, test = (of_classes(*part, new) for part in parts)

    model = with_head(base, len(new))
    base.trainable = False
    compile_model(model, 1e-3)
    fit(model, train, validation, args.epochs)
    print(f"new head on the frozen base: accuracy {model.evaluate(*test, verbose=0)[1]:.4f}")
    base.trainable = True
    compile_model(model, 3e-4)
    fit(model, train, validation, args.epochs)
    print(f"fine-tuned, dense:           accuracy {model.evaluate(*test, verbose=0)[1]:.4f}")

    model = ml.convert_to_masked(model, exclude="head")
    pruner = LotteryTicketPruner(model)
    for sparsity in SPARSITIES:
        pruner.set_pretrained_weights()
        report = pruner.update_masks("large_final", sparsity=sparsity, scope="global")
        pruned = model.evaluate(*test, verbose=0)[1]
        fit(model, train, validation, args.epochs)
        tuned = model.evaluate(*test, verbose=0)[1]
        print(
            f"{report.sparsity:6.1%} of the base pruned:     accuracy {pruned:.4f}, "
            f"fine-tuned {tuned:.4f}"
        )
    # Plain Keras layers with zeros for pruned weights: loads without this library.
    ml.strip_masks(model).save(args.out)
    print(f"Written to {args.out}")


if __name__ == "__main__":
    main()
