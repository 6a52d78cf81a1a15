"""Compares ways to halve the multiply-adds of ResNet-20: channels, filters, a smaller network.

    python -m benchmarks.studies.channels --data-dir DIR --seeds 0 1

The arms, on CIFAR-10 with random crops and flips:

- `dense`: the whole network, trained for `--epochs` epochs.
- `dense, longer`: the same network, trained on for `--tuning` epochs, as the pruned ones are.
- `channels`: coupled channels of `dense` are pruned until half of the multiply-adds are left
  (`structure="channels"`), `shrink` removes them, and the smaller network is fine-tuned.
- `filters, same share`: the same share of the filters of every layer of `dense` is masked
  (`structure="filters"`), the masked network is fine-tuned, and then shrunk.
- `filters, half`: half of the filters are masked, otherwise as above.
- `small from scratch`: the network that `channels` has in the end, with new weights, trained for
  `--epochs` + `--tuning` epochs.

Filters and channels are ranked within their layers by the magnitude of weights. Each training
starts with a new optimizer, and its learning rate falls to 0 by half a cosine. Accuracies are on
the complete test set, in percent, at the end of training.

Each arm of a seed is a file in `--out`. Arms that have one are not trained again, so an interrupted
study goes on, and several processes can train different `--seeds` or `--arms` into one folder. The
table shows all seeds in the folder: means ± half the distance between the extremes. `--seeds`
without a number only prints it.
"""

import argparse
import json
import os
import time
from pathlib import Path

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, training
from lottery_ticket_pruner.experiments import datasets, networks

NETWORK = "resnet-20"
BUDGET = {"macs": 0.5}
ARMS = (
    "dense",
    "channels",
    "filters, same share",
    "small from scratch",
    "filters, half",
    "dense, longer",
)
# What the results in a folder have in common.
SETTINGS = ("epochs", "tuning", "images", "batch_size", "learning_rate", "tuning_rate")


class Study:
    """The arms of one seed. Models and results are files in the folder."""

    def __init__(self, seed, data, options):
        self.seed, self.data, self.options = seed, data, options
        chosen = slice(options.images)
        self.x, self.y = data.x_train[chosen], data.y_train[chosen]

    def file(self, arm, ending):
        return self.options.out / f"{arm.replace(', ', '-').replace(' ', '-')}-{self.seed}{ending}"

    def model(self, arm):
        return keras.models.load_model(self.file(arm, ".keras"), compile=False)

    def result(self, arm):
        return json.loads(self.file(arm, ".json").read_text())

    def train(self, model, epochs, learning_rate):
        """Trains a model with a new optimizer, and returns the test accuracy."""
        steps = epochs * -(-len(self.x) // self.options.batch_size)
        rate = keras.optimizers.schedules.CosineDecay(learning_rate, steps)
        model.compile(
            keras.optimizers.SGD(rate, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
        )
        training.train(
            model,
            self.x,
            self.y,
            steps=steps,
            batch_size=self.options.batch_size,
            seed=(self.seed, epochs),
            augment=networks.augmentation(NETWORK),
        )
        return 100 * training.evaluate(model, self.data.x_test, self.data.y_test)["accuracy"]

    def run(self, arm):
        """Trains an arm and writes its files."""
        started = time.perf_counter()
        keras.utils.set_random_seed(self.seed)
        kind, _, which = arm.partition(", ")
        if arm == "dense":
            model, found = self.dense()
        elif arm == "dense, longer":
            model = self.model("dense")
            found = {"accuracy": self.train(model, self.options.tuning, self.options.tuning_rate)}
        elif kind == "channels":
            model, found = self.channels()
        elif kind == "filters":
            share = self.result("channels")["pruned"] if which == "same share" else 0.5
            model, found = self.filters(share)
        else:
            keras.utils.set_random_seed(1_000 + self.seed)
            model = keras.models.clone_model(self.model("channels"))
            epochs = self.options.epochs + self.options.tuning
            found = {"accuracy": self.train(model, epochs, self.options.learning_rate)}
        found |= {"arm": arm, "seed": self.seed}
        found |= {"weights": model.count_params(), "macs": multiply_adds(model)}
        found |= {"settings": settings(self.options), "seconds": time.perf_counter() - started}
        model.save(self.file(arm, ".keras"))
        unfinished = self.file(arm, ".part")
        unfinished.write_text(json.dumps(found, indent=1))
        os.replace(unfinished, self.file(arm, ".json"))
        return found

    def dense(self):
        axes = tuple(range(self.x.ndim - 1))
        moments = {"mean": self.x.mean(axes).tolist(), "variance": self.x.var(axes).tolist()}
        model = networks.build(NETWORK, self.data.input_shape, self.data.classes, **moments)
        accuracy = self.train(model, self.options.epochs, self.options.learning_rate)
        return model, {"accuracy": accuracy}

    def channels(self):
        masked = ml.convert_to_masked(self.model("dense"))
        LotteryTicketPruner(masked).update_masks(
            "smallest_weights", budget=BUDGET, structure="channels"
        )
        smaller, report = ml.shrink(masked, return_report=True)
        hidden = [row for row in report if row.layer != "output"]
        pruned = 1 - sum(row.after for row in hidden) / sum(row.before for row in hidden)
        accuracy = self.train(smaller, self.options.tuning, self.options.tuning_rate)
        return smaller, {"accuracy": accuracy, "pruned": pruned}

    def filters(self, share):
        masked = ml.convert_to_masked(self.model("dense"), exclude=["^output$"])
        LotteryTicketPruner(masked).update_masks(
            "smallest_weights", sparsity=share, structure="filters"
        )
        accuracy = self.train(masked, self.options.tuning, self.options.tuning_rate)
        smaller = ml.shrink(masked, return_report=True)[0]
        return smaller, {"accuracy": accuracy, "pruned": share}


def multiply_adds(model):
    """Returns the multiply-adds of a plain model for one example."""
    return ml.shrink(model, return_report=True)[1].macs_before


def settings(options):
    return {name: getattr(options, name) for name in SETTINGS}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir")
    parser.add_argument("--out", type=Path, default=Path("runs/channels"), metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--tuning", type=int, default=2, help="epochs after pruning")
    parser.add_argument("--images", type=int, default=8_000, help="training images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=0.05)
    parser.add_argument("--tuning-rate", type=float, default=0.02)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for file, found in results(options.out):
        if found["settings"] != settings(options):
            parser.error(f"{file} has other settings: {found['settings']}. Choose another --out.")
    if options.seeds:
        data = datasets.load("cifar10", options.data_dir)
    for seed in options.seeds:
        study = Study(seed, data, options)
        for arm in ARMS:
            if arm in options.arms and not study.file(arm, ".json").exists():
                found = study.run(arm)
                took = f"{found['accuracy']:.2f}, {found['seconds']:.0f} s"
                print(f"seed {seed}, {arm}: {took}", flush=True)
    print_table([found for _, found in results(options.out)], options)


def print_table(found, options):
    print(
        f"{NETWORK}, {options.images} training images, {options.epochs} + {options.tuning} epochs"
        f" of batches of {options.batch_size}"
    )
    print("| | seeds | accuracy | multiply-adds | weights |")
    print("|---|---|---|---|---|")
    for arm in ARMS:
        of_arm = [each for each in found if each["arm"] == arm]
        if of_arm:
            accuracies, macs, weights = (
                [each[key] for each in of_arm] for key in ("accuracy", "macs", "weights")
            )
            spread = f"{np.mean(accuracies):.2f} ± {np.ptp(accuracies) / 2:.2f}"
            counts = f"{np.mean(macs):,.0f} | {np.mean(weights):,.0f}"
            print(f"| {arm} | {len(of_arm)} | {spread} | {counts} |")


def results(folder):
    """Returns (file, result) of all arms in a folder."""
    return [(file, json.loads(file.read_text())) for file in sorted(folder.glob("*.json"))]


if __name__ == "__main__":
    main()
