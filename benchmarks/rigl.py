"""Dynamic sparse training: RigL and SET against static sparse training from the same masks.

LeNet-300-100 on MNIST or Fashion-MNIST, test accuracy after the same number of steps, mean and
range over seeds. All three start from the same random masks.

    python -m benchmarks.rigl --data-dir DIR
"""

import argparse

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import DynamicSparseTraining, LotteryTicketPruner, training
from lottery_ticket_pruner.experiments import datasets, networks

BATCH = 100
METHODS = ("static", "SET", "RigL")
OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),  # the kind that RigL's paper uses
    "adam": lambda: keras.optimizers.Adam(1.2e-3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="fashion_mnist", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--optimizer", default="sgd", choices=list(OPTIMIZERS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95])
    arguments = parser.parse_args()
    data = datasets.load(arguments.data, arguments.data_dir)
    print(
        f"{arguments.data}, {arguments.optimizer}, {arguments.steps} steps, "
        f"{arguments.seeds} seeds, test accuracy"
    )
    print("sparsity  method      mean     least      most  moved", flush=True)
    for sparsity in arguments.sparsities:
        for method in METHODS:
            runs = [
                accuracy_of(method, sparsity, data, arguments.steps, seed, arguments.optimizer)
                for seed in range(arguments.seeds)
            ]
            scores, moved = np.array(runs).T
            print(
                f"{sparsity:8.2f}  {method:8}{scores.mean():8.4f}{scores.min():10.4f}"
                f"{scores.max():10.4f}{moved.mean():7.1%}",
                flush=True,
            )


def accuracy_of(method, sparsity, data, steps, seed, optimizer):
    """Test accuracy, and the share of the final masks that was not in the first ones."""
    keras.utils.set_random_seed(seed)
    model = ml.convert_to_masked(networks.build("lenet-300-100", data.input_shape, data.classes))
    model.compile(
        OPTIMIZERS[optimizer](),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=sparsity, seed=seed)
    first = ml.get_masks(model)
    frequency = 100
    advance = None
    if method != "static":
        rewiring = DynamicSparseTraining(
            pruner,
            steps,
            "random" if method == "SET" else "gradient",
            data=None if method == "SET" else (data.x_train, data.y_train),
            frequency=frequency,
            seed=seed,
        )
        advance = rewiring.advance
    training.train(
        model,
        data.x_train,
        data.y_train,
        steps=steps,
        batch_size=BATCH,
        seed=seed,
        eval_every=frequency,
        on_progress=advance,
    )
    last = ml.get_masks(model)
    moved = sum(int((last[path] & ~first[path]).sum()) for path in last)
    results = training.evaluate(model, data.x_test, data.y_test)
    return results["accuracy"], moved / sum(int(mask.sum()) for mask in last.values())


if __name__ == "__main__":
    main()
