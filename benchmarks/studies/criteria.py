"""Prints a table of the test accuracy of LeNet-300-100 for every criterion at four sparsities.

    python -m benchmarks.studies.criteria --data digits mnist --data-dir DIR

Criteria for untrained models (`snip`, `grasp`, `synflow`, and `random` as their control) prune
before any training, and the kept weights are trained for `--steps` steps from their initial values.
All others prune a model that was trained for `--steps` steps, in one shot, and the kept weights are
trained for `--steps` more steps from their final values, with a new optimizer. All layers have the
same sparsity unless the criterion ranks them together. Numbers are the mean over seeds ± half the
distance between the extremes, in percent.
"""

import argparse

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria, training
from lottery_ticket_pruner.experiments import datasets, networks

AT_INITIALIZATION = ("random", "snip", "grasp", "synflow")
SPARSITIES = (0.80, 0.90, 0.95, 0.98)
BATCH = 60
EXAMPLES = 1_000  # for criteria that need data


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", nargs="+", default=["digits"], choices=datasets.NAMES)
    parser.add_argument("--data-dir")
    parser.add_argument("--steps", type=int, default=1_000, help="steps of each training")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--criteria", nargs="+", choices=criteria.names(), default=criteria.names())
    arguments = parser.parse_args()

    names = sorted(arguments.criteria, key=lambda name: name not in AT_INITIALIZATION)
    found = {
        data: accuracies(names, datasets.load(data, arguments.data_dir), arguments)
        for data in arguments.data
    }
    print(f"LeNet-300-100, {arguments.steps} steps of {BATCH}, {arguments.seeds} seeds")
    print(f"{'':40}" + "".join(f"{f'{data}, pruned':>{14 * len(SPARSITIES)}}" for data in found))
    shares = "".join(f"{share:>14.0%}" for share in SPARSITIES)
    print(f"{'criterion':30}{'model':10}" + shares * len(found))
    for name in names:
        when = "new" if name in AT_INITIALIZATION else "trained"
        cells = (_cell(each[name, share]) for each in found.values() for share in SPARSITIES)
        print(f"{name:30}{when:10}" + "".join(f"{cell:>14}" for cell in cells))
    dense = ", ".join(f"{data} {_cell(each['none'])}" for data, each in found.items())
    print(f"not pruned: {dense}")


def accuracies(names, data, arguments):
    """Returns test accuracies of all seeds, for `"none"` and by criterion and sparsity."""
    model = ml.convert_to_masked(networks.build("lenet-300-100", data.input_shape, data.classes))
    model.compile(
        keras.optimizers.Adam(1.2e-3),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    pruner = LotteryTicketPruner(model)

    def train(seed):
        training.train(
            model, data.x_train, data.y_train, steps=arguments.steps, batch_size=BATCH, seed=seed
        )
        return 100 * training.evaluate(model, data.x_test, data.y_test)["accuracy"]

    found: dict[str | tuple[str, float], list[float]] = {}
    for seed in range(arguments.seeds):
        keras.utils.set_random_seed(seed)
        fresh = networks.build("lenet-300-100", data.input_shape, data.classes)
        pruner.reset_masks()
        model.set_weights(fresh.get_weights())
        pruner.set_initial_weights()
        pruner.rewind()
        found.setdefault("none", []).append(train(seed))
        final = model.get_weights()
        for name in names:
            for sparsity in SPARSITIES:
                pruner.reset_masks()
                pruner.rewind()
                if name not in AT_INITIALIZATION:
                    model.set_weights(final)
                    pruner.set_pretrained_weights()
                pruner.update_masks(
                    name,
                    sparsity=sparsity,
                    seed=seed,
                    data=(data.x_train[:EXAMPLES], data.y_train[:EXAMPLES]),
                )
                found.setdefault((name, sparsity), []).append(train(seed + arguments.seeds))
    return found


def _cell(accuracies):
    return f"{np.mean(accuracies):.2f} ±{np.ptp(accuracies) / 2:.2f}"


if __name__ == "__main__":
    main()
