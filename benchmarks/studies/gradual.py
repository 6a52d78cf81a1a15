"""Compares gradual pruning with TensorFlow Model Optimization: accuracy, zeros, seconds per epoch.

    python -m benchmarks.studies.gradual --data-dir DIR

The same network, LeNet-300-100, is pruned with the same polynomial schedule up to 90 %, once as a
Keras 3 model with `GradualPruning(regrowth=True)` in `training.fit` and once as a `tf_keras` model
with `prune_low_magnitude` in `fit`. Masks change after every step or after every 100 steps. "none"
is the masked model in `training.fit` without pruning.

A second training from the same seed counts the zeros of each layer's `kernel` at the end of every
batch at which the schedule is above 0. "exact" is the share of these batches at which every kernel
has exactly the requested number of zeros. "zeros" is the share of the requested zeros that are
present, the smallest over the batches. The requested number is the one from the schedule for this
library, and the number of weights that its own masks prune for tfmot.

Epochs are timed in turns, each library in a separate process (tfmot turns `tf.keras` into Keras 2).
The first epoch, which includes compilation, is left out. Numbers are medians, with the extremes in
parentheses.
"""

import argparse
import contextlib
import statistics
import time

import numpy as np

from benchmarks.timing import Contender, MissingError, Worker

BATCH = 60  # as in the paper on lottery tickets
SPARSITY = 0.9
LIBRARIES = (
    ("none", "tensorflow"),
    ("ours", "tensorflow"),
    ("none", "jax"),
    ("ours", "jax"),
    ("tfmot", "tensorflow"),
)
FREQUENCIES = (1, 100)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--examples", type=int, help="number of training images (default: all)")
    arguments = parser.parse_args()
    if arguments.epochs < 2:
        parser.error("--epochs must be at least 2: the first one is not timed")

    print("every  library  backend     accuracy  sparsity   exact   zeros  seconds per epoch")
    for frequency in FREQUENCIES:
        seconds: dict[tuple[str, str], list[float]] = {}
        with contextlib.ExitStack() as stack:
            workers = {}
            for library, backend in LIBRARIES:
                task = {**vars(arguments), "library": library, "frequency": frequency}
                environment = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
                contender = Contender("benchmarks.studies.gradual:contest", "", task, environment)
                try:
                    worker = stack.enter_context(contextlib.closing(Worker(contender)))
                except MissingError as error:
                    print(f"{frequency:5}  {library:9}{backend:12}{error} is not installed")
                else:
                    workers[library, backend] = worker
            for epoch in range(arguments.epochs):
                for key in list(workers)[:: 1 if epoch % 2 == 0 else -1]:
                    seconds.setdefault(key, []).append(workers[key].measure("epoch"))
            for (library, backend), worker in workers.items():
                accuracy, sparsity = worker.measure("result")
                counted = f"{'':16}"
                if library != "none":
                    exact, zeros = worker.measure("zeros")
                    counted = f"{exact:8.1%}{zeros:8.1%}"
                print(
                    f"{frequency:5}  {library:9}{backend:12}{accuracy:8.4f}{sparsity:10.4f}"
                    f"{counted}  {_spread(seconds[library, backend][1:])}",
                    flush=True,
                )
        for backend in [backend for library, backend in workers if library == "ours"]:
            ours = seconds["ours", backend][1:]
            for other, found in (("none", backend), ("tfmot", "tensorflow")):
                theirs = seconds.get((other, found), [])[1:]
                ratios = [a / b for a, b in zip(ours, theirs, strict=False)]
                if ratios:
                    print(f"{frequency:5}  ours on {backend} / {other}: {_spread(ratios)}")


def _spread(values):
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def contest(library, frequency, data, data_dir, epochs, examples):
    """Returns functions that time an epoch, evaluate the model, and count zeros in each batch."""
    from lottery_ticket_pruner import schedules
    from lottery_ticket_pruner.experiments import datasets

    loaded = datasets.load(data, data_dir)
    x, y = loaded.x_train[:examples], loaded.y_train[:examples]
    x, x_test = x.reshape(len(x), -1), loaded.x_test.reshape(len(loaded.x_test), -1)
    steps = epochs * -(-len(x) // BATCH)
    arguments = {
        "initial_sparsity": 0.0,
        "final_sparsity": SPARSITY,
        "begin_step": 0,
        "end_step": max(steps // 100 * 100, 1),  # updates in every epoch that is timed
        "frequency": frequency,
    }
    keras, make = (_tfmot if library == "tfmot" else _ours)(x.shape[1], arguments)
    schedule = schedules.Polynomial(**arguments)
    model, pruning, _, masks = make()

    callbacks = [] if library == "none" else [pruning]

    def epoch():
        started = time.perf_counter()
        if library == "tfmot":
            model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=callbacks)
        else:
            from lottery_ticket_pruner import training

            training.fit(model, x, y, batch_size=BATCH, callbacks=callbacks, deterministic=True)
        return time.perf_counter() - started

    def result():
        accuracy = model.evaluate(x_test, loaded.y_test, batch_size=1000, verbose=0)[1]
        pruned = sum(np.count_nonzero(mask == 0) for mask in masks())
        return accuracy, pruned / sum(mask.size for mask in masks())

    def zeros():
        model, pruning, kernels, masks = make()
        exact: list[bool] = []
        shares: list[float] = []

        # Of one of two packages.
        class Watch(keras.callbacks.Callback):  # type: ignore[name-defined]
            step = 0

            def on_train_batch_end(self, batch, logs=None):
                self.step += 1
                if library == "ours":
                    last = min(self.step, schedule.end_step) // frequency * frequency
                    asked = [int(schedule(last) * k.size + 1e-6) for k in kernels()]
                else:
                    asked = [int(np.count_nonzero(mask == 0)) for mask in masks()]
                found = [int(np.count_nonzero(kernel == 0)) for kernel in kernels()]
                if sum(asked):
                    exact.append(found == asked)
                    there = [min(pair) for pair in zip(found, asked, strict=True)]
                    shares.append(sum(there) / sum(asked))

        model.fit(x, y, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[pruning, Watch()])
        return statistics.mean(exact), min(shares)

    return {"epoch": epoch, "result": result, "zeros": zeros}


def _ours(inputs, schedule):
    import keras

    import masked_layers as ml
    from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules

    def make():
        keras.utils.set_random_seed(0)
        model = ml.convert_to_masked(_network(keras, inputs))
        _compile(keras, model)
        pruner = LotteryTicketPruner(model)
        # As in tfmot, pruned weights may come back.
        pruning = GradualPruning(pruner, schedules.Polynomial(**schedule), regrowth=True)
        refs = ml.masked_refs(model)

        def kernels():
            if hasattr(model, "jax_state_sync"):
                model.jax_state_sync()
            return [keras.ops.convert_to_numpy(ref.layer.kernel) for ref in refs]

        return model, pruning, kernels, lambda: list(ml.get_masks(model).values())

    return keras, make


def _tfmot(inputs, schedule):
    import tf_keras

    from lottery_ticket_pruner.interop.tfmot import import_tfmot

    tfmot = import_tfmot().sparsity.keras

    def make():
        tf_keras.utils.set_random_seed(0)
        decay = tfmot.PolynomialDecay(**schedule)
        model = tfmot.prune_low_magnitude(_network(tf_keras, inputs), decay)
        _compile(tf_keras, model)
        variables = [pair for layer in model.layers for pair in layer.pruning_vars]
        return (
            model,
            tfmot.UpdatePruningStep(),
            lambda: [kernel.numpy() for kernel, _, _ in variables],
            lambda: [mask.numpy() for _, mask, _ in variables],
        )

    return tf_keras, make


def _network(library, inputs):
    layers = library.layers
    return library.Sequential(
        [
            layers.Input((inputs,)),
            layers.Dense(300, "relu"),
            layers.Dense(100, "relu"),
            layers.Dense(10),
        ]
    )


def _compile(library, model):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(library.optimizers.Adam(1.2e-3), loss, metrics=["accuracy"])


if __name__ == "__main__":
    main()
