"""Compares steps of sparse trainings on the torch backend, of one thread.

    KERAS_BACKEND=torch python -m benchmarks.sparse_training [--networks mlp lenet] [--steps 5]

Networks of Dense layers with random masks are trained on random examples, in turns: with all
weights, with the smaller model that has a matrix of the kept weights, and with the one that has
PyTorch's sparse products where few weights are kept. Processor milliseconds per step, after a turn
that is not counted.
"""

import argparse
import sys
import time
from unittest import mock

import keras
import numpy as np

from benchmarks.late_tickets import one_thread, spread

BATCH_SIZE = 60
REPLACED = "lottery_ticket_pruner.training.late_training.products_for"
TURNS = 3
NETWORKS = {
    "lenet": ((784, 300, 100, 10), (0.012, 0.037, 0.108)),
    "mlp": ((2048, 2048, 2048, 2048, 10), (0.01, 0.05, 0.1)),
}


def masked(widths, share):
    """Returns a compiled model of Dense layers, with random masks that keep this share."""
    import masked_layers as ml

    keras.utils.set_random_seed(0)
    hidden = [keras.layers.Dense(width, "relu") for width in widths[1:-1]]
    model = keras.Sequential([keras.Input(widths[:1]), *hidden, keras.layers.Dense(widths[-1])])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(0)
    masks = {path: rng.random(mask.shape) < share for path, mask in ml.get_masks(model).items()}
    last = list(masks)[-1]
    masks[last] = rng.random(masks[last].shape) < max(share, 0.2)
    ml.set_masks(model, masks)
    return model


def compare(widths, share, steps):
    """Returns processor milliseconds per step of each training."""
    from lottery_ticket_pruner import training
    from lottery_ticket_pruner.training import kept_products

    rng = np.random.default_rng(0)
    x = rng.random((1_000, widths[0]), dtype=np.float32)
    data = training.ArrayDataset.of(x, rng.integers(0, widths[-1], len(x)))
    plan = training.TrainingPlan(steps=steps, batch_size=BATCH_SIZE)
    models = {kind: masked(widths, share) for kind in ("all weights", "matrix", "sparse")}
    times: dict[str, list[float]] = {kind: [] for kind in models}
    for _ in range(1 + TURNS):
        for kind, model in models.items():
            training.settings.least_savings = float("inf") if kind == "all weights" else -1e18
            products_for = kept_products.products_for if kind == "sparse" else lambda *_: None
            with mock.patch(REPLACED, products_for):
                started = time.process_time()
                history = training.train_by_plan(model, data, plan)
                times[kind].append(1e3 * (time.process_time() - started) / steps)
            if kind != "all weights" and not any(" of " in note for note in history.notes):
                raise RuntimeError(f"The smaller model was not trained: {history.notes}")
    return {kind: values[1:] for kind, values in times.items()}


def main(arguments=None):
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sparse_training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--steps", type=int, default=20, help="steps of each measurement")
    options = parser.parse_args(arguments)
    if keras.backend.backend() != "torch":
        parser.error("only the torch backend has sparse products: set KERAS_BACKEND=torch")

    one_thread()
    print(f"batches of {BATCH_SIZE}, processor milliseconds a step:")
    for name in options.networks:
        widths, shares = NETWORKS[name]
        for share in shares:
            times = compare(widths, share, options.steps)
            ratios = [a / b for a, b in zip(times["all weights"], times["sparse"], strict=True)]
            columns = ", ".join(f"{kind} {spread(values)}" for kind, values in times.items())
            print(
                f"  {name}, {share:.1%} left: {columns}; {spread(ratios)} times faster", flush=True
            )


if __name__ == "__main__":
    sys.exit(main())
