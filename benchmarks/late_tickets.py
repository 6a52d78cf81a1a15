"""Compares trainings of sparse tickets with all weights and with the weights that are left.

    python -m benchmarks.late_tickets [--data-dir DIR] [--rounds 20] [--steps 1000]

LeNet-300-100 on MNIST (without --data-dir on as many random images, of which no input is unread):
a search of `--rounds` rounds with trainings of `--search-steps` makes masks. Then, at several
rounds, the ticket is trained by `training.train` with batches of 60, in the same process and in
turns: with the masked model, and with the smaller model that replaces it in long trainings. Times
are processor seconds per step, of one thread on TensorFlow and torch, after compiling, which is
timed separately.
"""

import argparse
import statistics
import sys
import time

import keras

from benchmarks.ladder import BATCH_SIZE, data

GOAL = 3.0
TURNS = 5
COMPILED = 300  # From so many steps on, TensorFlow compiles by XLA.


def one_thread():
    """Makes TensorFlow and PyTorch compute in one thread."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    elif keras.backend.backend() == "torch":
        import torch

        torch.set_num_threads(1)


def tickets(examples, rounds, steps):
    """Returns a compiled masked model and the masks of each round."""
    from lottery_ticket_pruner import find_ticket
    from lottery_ticket_pruner.experiments import workbench
    from lottery_ticket_pruner.experiments.config import RunConfig

    config = RunConfig(data="mnist", rounds=rounds, steps=steps, batch_size=BATCH_SIZE, seeds=(0,))
    config = config.resolve(len(examples.x_train))
    found = find_ticket(
        workbench.compiled_network(config, examples, 0),
        *(examples.x_train, examples.y_train),
        rounds=rounds,
        steps=steps,
        batch_size=BATCH_SIZE,
        controls=(),
        **config.amount,
    )
    return found.ticket, found.masks


class Training:
    """A training of a copy of the model, with a value of `training.settings.least_savings`."""

    def __init__(self, model, masks, examples, steps, least_savings):
        import masked_layers as ml

        self.model = ml.convert_to_masked(ml.strip_masks(model))
        ml.set_masks(self.model, masks)
        self.examples, self.steps, self.least_savings = examples, steps, least_savings

    def __call__(self, steps=None):
        """Trains, and returns processor seconds."""
        from lottery_ticket_pruner import training

        training.settings.least_savings = self.least_savings
        plan = training.TrainingPlan(
            steps=steps or self.steps, batch_size=BATCH_SIZE, deterministic=True
        )
        started = time.process_time()
        training.train_by_plan(self.model, self.examples, plan)
        return time.process_time() - started


def compare(model, masks, examples, steps):
    """Returns the times of both trainings per step, in milliseconds, and of the first steps."""
    from lottery_ticket_pruner.training import ArrayDataset

    # One data set, as in a search, whose copy on the device is made once.
    examples = ArrayDataset.of(examples.x_train, examples.y_train)
    dense = Training(model, masks, examples, steps, float("inf"))
    smaller = Training(model, masks, examples, steps, 0)
    compiling = [training(steps=COMPILED) for training in (dense, smaller)]
    times: dict[Training, list[float]] = {dense: [], smaller: []}
    for turn in range(TURNS):
        for training in (dense, smaller) if turn % 2 else (smaller, dense):
            times[training].append(1e3 * training() / steps)
    return times[dense], times[smaller], compiling


def main(arguments=None):
    """Runs the benchmark; returns 1 if the goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.late_tickets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's published files")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--search-steps", type=int, default=1_000, help="steps that make masks")
    parser.add_argument("--steps", type=int, default=1_000, help="steps of each measurement")
    options = parser.parse_args(arguments)
    one_thread()
    examples = data(options.data_dir)
    model, masks = tickets(examples, options.rounds, options.search_steps)
    met = False
    print(f"{examples.name}, batches of {BATCH_SIZE}, processor milliseconds a step:")
    for number in sorted({options.rounds * part // 4 for part in (2, 3, 4)}):
        dense, smaller, compiling = compare(model, masks[number], examples, options.steps)
        ratios = [a / b for a, b in zip(dense, smaller, strict=True)]
        kept = sum(int(mask.sum()) for mask in masks[number].values())
        share = kept / sum(mask.size for mask in masks[number].values())
        met = statistics.median(ratios) >= GOAL
        print(
            f"  {share:.1%} left: masked {spread(dense)}, smaller {spread(smaller)}, "
            f"{spread(ratios)} times faster; "
            f"first {COMPILED} steps: {compiling[0]:.1f} and {compiling[1]:.1f} s"
        )
    print(f"goal at the last round: {GOAL} times faster, {'met' if met else 'missed'}")
    return int(not met)


def spread(values):
    """Returns the median, the least and the greatest of values as text."""
    return f"{statistics.median(values):.3g} ({min(values):.3g} to {max(values):.3g})"


if __name__ == "__main__":
    sys.exit(main())
