"""Compares dynamic sparse training (RigL and SET) with static sparse training.

    python -m benchmarks.studies.rigl --data-dir DIR

LeNet-300-100 on MNIST or Fashion-MNIST. All three methods start from the same weights and the same
random masks with ERK densities, and train for the same number of steps in the same order.

The recipe follows Evci et al., arXiv 1911.11134: SGD with momentum 0.9 and a learning rate that
drops twice, a weight decay of 1e-4, and masks that change every 100 steps, by a share that
decreases from 0.3 to 0 over 75 % of the training. Two parts are more important than they seem.
Weights of pixels that are always black have no gradient; only weight decay makes them small, so
that they are dropped. And the gain increases with the number of mask changes. The paper has 250
(ImageNet) and 750 (CIFAR-10) changes, and the training here is long enough for 250.

Accuracies, in percent, are measured on the validation images, on which no method has trained, and
on the test images; they are means over seeds, with the extremes in parentheses. "over static" is
the difference in validation accuracy from static training with the same seed.
"""

import argparse

import keras

import masked_layers as ml
from lottery_ticket_pruner import DynamicSparseTraining, LotteryTicketPruner, training
from lottery_ticket_pruner.experiments import datasets, networks

BATCH = 100
FREQUENCY = 100
METHODS = {"static": None, "SET": "random", "RigL": "gradient"}
LEARNING_RATES = {"sgd": 0.1, "adam": 1.2e-3}
DECAY = 1e-4


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, default=33_400)
    parser.add_argument("--optimizer", default="sgd", choices=list(LEARNING_RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95])
    arguments = parser.parse_args()
    data = datasets.load(arguments.data, arguments.data_dir)
    print(
        f"{arguments.data}, LeNet-300-100, {arguments.steps} steps of {BATCH}, "
        f"{arguments.optimizer}, {arguments.seeds} seeds"
    )
    print(f"pruned  method  {'validation':>22}{'over static':>26}{'test':>24}   moved", flush=True)
    for sparsity in arguments.sparsities:
        static = None
        for method, growth in METHODS.items():
            runs = [
                accuracies(growth, sparsity, data, arguments.steps, seed, arguments.optimizer)
                for seed in range(arguments.seeds)
            ]
            validation, test, moved = zip(*runs, strict=True)
            static = static or validation
            gains = [a - b for a, b in zip(validation, static, strict=True)]
            print(
                f"{sparsity:6.0%}  {method:8}{_spread(validation):>22}{_spread(gains, '+'):>26}"
                f"{_spread(test):>24}{sum(moved) / len(moved):8.1%}",
                flush=True,
            )


def accuracies(growth, sparsity, data, steps, seed, optimizer):
    """Returns validation and test accuracy, and the share of the final masks that is new."""
    keras.utils.set_random_seed(seed)
    plain = networks.build("lenet-300-100", data.input_shape, data.classes)
    for layer in plain.layers:
        if hasattr(layer, "kernel"):
            # The gradient of this penalty is the decay times the weight.
            layer.kernel_regularizer = keras.regularizers.L2(DECAY / 2)
    model = ml.convert_to_masked(plain)
    model.compile(
        networks.optimizer(optimizer, LEARNING_RATES[optimizer], steps),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=sparsity, distribution="erk", seed=seed)
    first = ml.get_masks(model)
    rewiring = None
    if growth is not None:
        rewiring = DynamicSparseTraining(
            pruner,
            steps,
            growth,
            data=(data.x_train, data.y_train) if growth == "gradient" else None,
            frequency=FREQUENCY,
            seed=seed,
        )
    training.train(
        model,
        data.x_train,
        data.y_train,
        steps=steps,
        batch_size=BATCH,
        seed=seed,
        eval_every=FREQUENCY,
        on_progress=rewiring and rewiring.advance,
    )
    last = ml.get_masks(model)
    moved = sum(int((last[path] & ~first[path]).sum()) for path in last)
    images = ((data.x_validation, data.y_validation), (data.x_test, data.y_test))
    found = [100 * training.evaluate(model, *pair)["accuracy"] for pair in images]
    return *found, moved / sum(int(mask.sum()) for mask in last.values())


def _spread(values, sign=""):
    mean = sum(values) / len(values)
    return f"{mean:{sign}.2f} ({min(values):{sign}.2f} to {max(values):{sign}.2f})"


if __name__ == "__main__":
    main()
