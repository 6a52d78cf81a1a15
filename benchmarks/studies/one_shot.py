"""Prunes trained networks in one shot, without training, with and without reconstruction.

    python -m benchmarks.studies.one_shot
    python -m benchmarks.studies.one_shot --data cifar10 --data-dir DIR
    python -m benchmarks.studies.one_shot --cost

On the digits, the network is the transformer of `benchmarks.studies.wanda`; on other image data it
is a network of six convolutions with batch normalization. All layers are pruned except the first
and the last. Masks are chosen by magnitude within each layer or by Wanda, and then the kept weights
are left as they are or fitted to the former outputs of their layers on `--examples` training
images. The table shows test accuracy in percent, as mean over seeds ± half the distance between the
extremes, and the loss of magnitude pruning that reconstruction regains.

`--cost` prints the time and the memory that reconstruction takes for ResNet-50 with new weights, on
random images of `--pixels` pixels in each direction.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from benchmarks.checks import large
from benchmarks.studies import wanda
from lottery_ticket_pruner import LotteryTicketPruner, training
from lottery_ticket_pruner.experiments import datasets

# Criterion, and arguments of `update_masks`.
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("smallest_weights", {}),
    "wanda, measured at once": ("wanda", {"sequential": False}),
    "wanda": ("wanda", {}),
    "magnitude, reconstructed at once": (
        "smallest_weights",
        {"reconstruct": True, "sequential": False},
    ),
    "magnitude, reconstructed": ("smallest_weights", {"reconstruct": True}),
    "wanda, reconstructed": ("wanda", {"reconstruct": True}),
}
SPARSITIES = {"digits": (0.3, 0.4, 0.5, 0.6), "images": (0.5, 0.7, 0.8)}


def convolutional(shape, classes):
    """Returns a network of six convolutions; its outputs are logits."""
    x = inputs = keras.Input(shape)
    for number, (filters, stride) in enumerate(
        [(32, 1), (32, 2), (64, 1), (64, 2), (128, 1), (128, 2)]
    ):
        name = "first" if number == 0 else f"convolution_{number}"
        x = layers.Conv2D(filters, 3, stride, padding="same", use_bias=False, name=name)(x)
        x = layers.ReLU()(layers.BatchNormalization(momentum=0.9)(x))
    outputs = layers.Dense(classes, name="output")(layers.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, outputs, name="convolutional")


def trained(options, data, seed):
    """Returns a trained masked model, and the images for it."""
    keras.utils.set_random_seed(seed)
    x_train, x_test = data.x_train[: options.images], data.x_test[: options.tests]
    if options.data == "digits":
        x_train, x_test = x_train[..., 0], x_test[..., 0]
        rows, width = x_train.shape[1:]
        plain = wanda.build(rows, width, data.classes)
        rate, dense = 1e-3, ["^rows$", "^output$"]
    else:
        plain = convolutional(data.input_shape, data.classes)
        rate = keras.optimizers.schedules.CosineDecay(2e-3, options.steps)
        dense = ["^first$", "^output$"]
    model = ml.convert_to_masked(plain, exclude=dense)
    model.compile(
        keras.optimizers.Adam(rate),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    y = data.y_train[: options.images]
    training.train(model, x_train, y, steps=options.steps, batch_size=64, seed=seed)
    return model, x_train, x_test


def compare(options):
    """Trains, prunes and prints the table."""
    data = datasets.load(options.data, options.data_dir)
    sparsities = SPARSITIES["digits" if options.data == "digits" else "images"]
    found: dict[str | tuple[str, float], list[float]] = {}
    for seed in range(options.seeds):
        model, x_train, x_test = trained(options, data, seed)

        def accuracy(model=model, x=x_test):
            return 100 * training.evaluate(model, x, data.y_test[: len(x)])["accuracy"]

        found.setdefault("dense", []).append(accuracy())
        weights = model.get_weights()
        pruner = LotteryTicketPruner(model)
        for title, (criterion, arguments) in CONTENDERS.items():
            for sparsity in sparsities:
                pruner.reset_masks()
                model.set_weights(weights)
                examples = x_train[: options.examples]
                pruner.update_masks(criterion, sparsity=sparsity, data=examples, **arguments)
                found.setdefault((title, sparsity), []).append(accuracy())
            shown = ", ".join(f"{found[title, share][-1]:.2f}" for share in sparsities)
            print(f"seed {seed}, {title}: {shown}", flush=True)
    size = ml.sparsity_report(model).size
    print(f"{size:,} of {model.count_params():,} weights pruned; dense: {cell(found['dense'])}")
    print("| | " + " | ".join(f"{share:.0%}" for share in sparsities) + " |")
    print("|---|" + "---|" * len(sparsities))
    for title in CONTENDERS:
        print(f"| {title} | " + " | ".join(cell(found[title, s]) for s in sparsities) + " |")
    dense = np.mean(found["dense"])
    regained = [
        (np.mean(found["magnitude, reconstructed", s]) - np.mean(found["magnitude", s]))
        / (dense - np.mean(found["magnitude", s]))
        for s in sparsities
    ]
    print("| loss regained | " + " | ".join(f"{share:.0%}" for share in regained) + " |")


def cell(accuracies):
    return f"{np.mean(accuracies):.2f} ± {np.ptp(accuracies) / 2:.2f}"


def cost(options):
    """Prints the time and the memory for ResNet-50."""
    keras.utils.set_random_seed(0)
    shape = (options.pixels, options.pixels, 3)
    model = keras.applications.ResNet50(weights=None, input_shape=shape)
    model = ml.convert_to_masked(model, exclude=["^conv1_conv$", "^predictions$"])
    x = np.random.default_rng(0).normal(size=(options.examples, *shape)).astype("float32")
    pruner = LotteryTicketPruner(model)
    model.predict(x, batch_size=32, verbose=0)
    large.return_freed_memory()
    held = large.collected()
    files = large.memory("RssFile") + large.memory("RssShmem")
    Path("/proc/self/clear_refs").write_text("5")
    started, used = time.perf_counter(), time.process_time()
    pruner.update_masks("smallest_weights", sparsity=0.7, reconstruct=True, data=x)
    seconds, processor = time.perf_counter() - started, time.process_time() - used
    peak = large.memory("VmHWM") - files - held
    largest = max(int(np.prod(ref.variable.shape[:-1])) for ref in ml.masked_refs(model))
    weights = sum(value.nbytes for value in model.get_weights())
    copies = (peak - weights) / (8 * largest**2)
    print(
        f"ResNet-50, {options.examples} images of {shape}: {seconds:.0f} s, {processor:.0f} s of "
        f"processor time; memory rose by {peak / 1e6:,.0f} MB, of which new weights took "
        f"{weights / 1e6:,.0f} MB and the rest is {copies:.1f} times X'X of the largest layer, "
        f"{8 * largest**2 / 1e6:,.0f} MB"
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits")
    parser.add_argument("--data-dir")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--pixels", type=int, default=96)
    parser.add_argument("--steps", type=int, default=1_500)
    parser.add_argument("--images", type=int, default=20_000, help="training images")
    parser.add_argument("--tests", type=int, default=10_000, help="test images")
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    (cost if options.cost else compare)(options)


if __name__ == "__main__":
    main()
