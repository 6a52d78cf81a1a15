"""Compares the time of a whole ticket search with that of as many steps of a hand-written loop.

    python -m benchmarks.ladder [--data-dir DIR] [--rounds 20] [--steps 20000]

LeNet-300-100 on MNIST (without --data-dir on as many random images, which take as long): the dense
network, then in every round the ticket and its random reinitialization, each trained for --steps,
with the validation and the tests of `lottery-ticket run`. `find_ticket` does all of this and is
timed from call to return, including compiling, pruning, rewinding and evaluating. The hand-written
loop is that of `benchmarks.peers`: an epoch of the same network as one XLA program that only
trains. The time of its step is the median of epochs before and after the search, measured in a
separate process that is idle during the search.
"""

import argparse
import statistics
import sys
import time

from benchmarks.timing import Contender, Worker

GOAL = 1.5
BATCH_SIZE = 60
EPOCHS = 5


def data(folder=None):
    """Returns MNIST, or random images with its splits and shapes."""
    import numpy as np

    from lottery_ticket_pruner.experiments import datasets

    if folder is not None:
        return datasets.load("mnist", folder)
    rng = np.random.default_rng(0)
    parts: list[np.ndarray] = []
    for count in (55_000, 5_000, 10_000):
        parts += [rng.random((count, 28, 28, 1), dtype=np.float32)]
        parts += [rng.integers(0, 10, count, dtype=np.int32)]
    return datasets.Dataset("random images", *parts)


def search(examples, rounds, steps):
    """Finds a ticket; returns its rows and the time in seconds."""
    from lottery_ticket_pruner import find_ticket
    from lottery_ticket_pruner.experiments import workbench
    from lottery_ticket_pruner.experiments.config import RunConfig

    config = RunConfig(data="mnist", rounds=rounds, steps=steps, batch_size=BATCH_SIZE, seeds=(0,))
    config = config.resolve(len(examples.x_train))
    model = workbench.compiled_network(config, examples, 0)
    started = time.perf_counter()
    found = find_ticket(
        model,
        examples.x_train,
        examples.y_train,
        rounds=rounds,
        steps=steps,
        batch_size=BATCH_SIZE,
        controls=("random_reinit",),
        validation_data=(examples.x_validation, examples.y_validation),
        test_data=(examples.x_test, examples.y_test),
        eval_every=config.eval_every,
        seed=0,
        **config.amount,
    )
    return found.rows, time.perf_counter() - started


def main(arguments=None):
    """Runs the benchmark; returns 1 if the goal was missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data-dir", metavar="DIR", help="folder with MNIST's published files")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20_000, help="steps of each training")
    options = parser.parse_args(arguments)

    examples = data(options.data_dir)
    work = {"steps": len(examples.x_train) // BATCH_SIZE, "batch_size": BATCH_SIZE}
    peer = Contender("benchmarks.peers:hand_written", "hand", work, {"TF_CPP_MIN_LOG_LEVEL": "3"})
    worker = Worker(peer)
    try:
        milliseconds = [worker.measure(peer.name) for _ in range(EPOCHS)]
        rows, seconds = search(examples, options.rounds, options.steps)
        milliseconds += [worker.measure(peer.name) for _ in range(EPOCHS)]
    finally:
        worker.close()

    steps = len(rows) * options.steps
    step = statistics.median(milliseconds)
    ratio = seconds / (steps * step / 1e3)
    print(f"{examples.name}: {len(rows)} trainings of {options.steps:,} steps of {BATCH_SIZE}")
    for row in rows:
        if row["round"] in (0, options.rounds):
            left, accuracy = 1 - row["sparsity"], row["test_accuracy"]
            print(f"  {row['arm']}: {left:.2%} of the weights, test accuracy {accuracy:.2%}")
    print(
        f"hand-written loop: {step:.3f} ms a step "
        f"({min(milliseconds):.3f} to {max(milliseconds):.3f}), {steps * step / 1e3:.0f} s for "
        f"{steps:,} steps\n"
        f"find_ticket: {seconds:.0f} s, {1e3 * seconds / steps:.3f} ms a step, "
        f"{sum(row['seconds'] for row in rows):.0f} s of it training and validating\n"
        f"ratio {ratio:.2f}, goal {GOAL}: {'met' if ratio <= GOAL else 'missed'}"
    )
    return int(ratio > GOAL)


if __name__ == "__main__":
    sys.exit(main())
