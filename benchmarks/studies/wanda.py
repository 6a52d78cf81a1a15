"""Compares Wanda with magnitude pruning of a transformer, without training afterwards.

    python -m benchmarks.studies.wanda

A small transformer is trained on scikit-learn's digits as sequences of eight rows of eight pixels.
Then the projections of its attention layers and its feed-forward layers are pruned (but not the
embedding of the rows and the output layer). Wanda's calibration data are `--examples` training
images, and all of its norms are measured before pruning; `one_shot` has the other ways. The table
shows test accuracy in percent, as mean over seeds ± half the distance between the extremes.
"""

import argparse

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, training
from lottery_ticket_pruner.experiments import datasets

SPARSITIES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
CONTENDERS = {
    "magnitude, within each layer": ("smallest_weights", None),
    "magnitude, within each output": ("smallest_weights", "output"),
    "wanda": ("wanda", None),
}


def build(rows, width, classes, *, blocks=2, units=32):
    """Returns a transformer encoder over the rows of an image; its outputs are logits."""
    inputs = keras.Input((rows, width))
    # Constants, because nothing here depends on an input: the model has no such layer.
    positions = layers.Embedding(rows, units, name="positions")(keras.ops.arange(rows))
    x = layers.Dense(units, name="rows")(inputs) + positions
    for number in range(blocks):
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(4, units // 4, name=f"attention_{number}")(y, y)
        y = layers.LayerNormalization()(x)
        y = layers.Dense(4 * units, activation="gelu", name=f"up_{number}")(y)
        x = x + layers.Dense(units, name=f"down_{number}")(y)
    x = layers.GlobalAveragePooling1D()(layers.LayerNormalization()(x))
    return keras.Model(inputs, layers.Dense(classes, name="output")(x), name="transformer")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--examples", type=int, default=128)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()

    data = datasets.load("digits")
    x_train, x_test = (images[..., 0] for images in (data.x_train, data.x_test))
    found: dict[str | tuple[str, float], list[float]] = {}
    rows, width = x_train.shape[1:]
    for seed in range(arguments.seeds):
        keras.utils.set_random_seed(seed)
        plain = build(rows, width, data.classes)
        model = ml.convert_to_masked(plain, exclude=["^rows$", "^output$"])
        model.compile(
            keras.optimizers.Adam(1e-3),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        steps = arguments.steps
        training.train(model, x_train, data.y_train, steps=steps, batch_size=64, seed=seed)

        def accuracy(model=model):
            return 100 * training.evaluate(model, x_test, data.y_test)["accuracy"]

        found.setdefault("dense", []).append(accuracy())
        pruner = LotteryTicketPruner(model)
        for title, (criterion, scope) in CONTENDERS.items():
            for sparsity in SPARSITIES:
                pruner.reset_masks()
                calibration = x_train[: arguments.examples]
                pruner.update_masks(
                    criterion, sparsity=sparsity, scope=scope, data=calibration, sequential=False
                )
                found.setdefault((title, sparsity), []).append(accuracy())

    size = ml.sparsity_report(model).size
    print(f"{size:,} of {model.count_params():,} weights pruned; dense: {_cell(found['dense'])}")
    print(f"{'':32}" + "".join(f"{share:>14.0%}" for share in SPARSITIES))
    for title in CONTENDERS:
        cells = "".join(f"{_cell(found[title, share]):>14}" for share in SPARSITIES)
        print(f"{title:32}{cells}")


def _cell(accuracies):
    return f"{np.mean(accuracies):.2f} ±{np.ptp(accuracies) / 2:.2f}"


if __name__ == "__main__":
    main()
