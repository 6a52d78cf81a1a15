"""Measures untrained, dense, untrained-pruned and trained-pruned accuracy over four rounds.

Each round prunes half of the remaining weights by a strategy, rewinds the kept weights to their
initial values, and trains again with early stopping on validation data:

    python examples/example.py --which_set mnist --data-dir DIR --prune_strategy large_final
    python examples/example.py --which_set cifar10 --data-dir DIR --dwr --iterations 5
    python examples/example.py --quick
"""

import argparse
import csv
from collections import defaultdict

import keras

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from lottery_ticket_pruner.experiments import datasets, networks

ROUNDS = 4
RATE = 0.5


def run_once(data, strategy, dwr, epochs):
    """Yields (stage, round, sparsity, loss, accuracy), beginning with the untrained model."""
    network = "lenet-300-100" if data.input_shape[-1] == 1 else "conv-2"
    model = networks.build(network, data.input_shape, data.classes)
    model.compile(
        keras.optimizers.Adam(5e-4),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    if dwr:
        # From here on, every forward pass scales each layer by (all weights) / (kept weights).
        pruner.apply_dwr(model)

    def evaluate():
        return model.evaluate(data.x_test, data.y_test, verbose=0)

    def train():
        stop_early = keras.callbacks.EarlyStopping(patience=3, restore_best_weights=True)
        model.fit(
            data.x_train,
            data.y_train,
            batch_size=64,
            epochs=epochs,
            validation_data=(data.x_validation, data.y_validation),
            callbacks=[stop_early],
            verbose=0,
        )

    yield "untrained", 0, 0.0, *evaluate()
    train()
    yield "dense", 0, 0.0, *evaluate()
    for number in range(1, ROUNDS + 1):
        pruner.set_pretrained_weights()
        report = pruner.update_masks(strategy, rate=RATE, data=(data.x_train, data.y_train))
        pruner.rewind()
        yield "untrained-pruned", number, report.sparsity, *evaluate()
        train()
        yield "trained-pruned", number, report.sparsity, *evaluate()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--which_set", default="mnist", choices=datasets.IMAGES)
    parser.add_argument("--data-dir", help="folder with the data set's published files")
    parser.add_argument("--prune_strategy", default="large_final", choices=criteria.names())
    parser.add_argument("--dwr", action="store_true", help="scale layers by all / kept weights")
    parser.add_argument("--iterations", type=int, default=3, help="number of seeds")
    parser.add_argument("--epochs", type=int, default=50, help="maximum epochs per training")
    parser.add_argument("--csv", help="results file (default: named after the options)")
    parser.add_argument("--quick", action="store_true", help="digits, one iteration, three epochs")
    args = parser.parse_args(argv)
    if args.quick:
        args.which_set, args.iterations, args.epochs = "digits", 1, 3

    data = datasets.load(args.which_set, args.data_dir)
    dwr = "_dwr" if args.dwr else ""
    path = args.csv or f"results_{args.which_set}_{args.prune_strategy}{dwr}.csv"
    averages = defaultdict(list)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["iteration", "stage", "round", "sparsity", "loss", "accuracy"])
        for iteration in range(args.iterations):
            keras.utils.set_random_seed(iteration)
            for row in run_once(data, args.prune_strategy, args.dwr, args.epochs):
                stage, number, sparsity, _, accuracy = row
                writer.writerow([iteration, *row])
                file.flush()
                averages[stage, number, sparsity].append(accuracy)
                print(f"{iteration}: {stage:16} {sparsity:7.2%} pruned, accuracy {accuracy:.4f}")

    print(f"\nAverages over {args.iterations} iterations:")
    for (stage, _, sparsity), values in averages.items():
        print(f"{stage:16} {sparsity:7.2%} pruned, accuracy {sum(values) / len(values):.4f}")
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
