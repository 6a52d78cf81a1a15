"""Gradual pruning beside TensorFlow Model Optimization: accuracy, zeros, time.

The same network and the same schedule, once as a Keras 3 model with `GradualPruning`, once as a
`tf_keras` model under `prune_low_magnitude`. "zeros" is how many weights are exactly zero at the
end of a batch, over how many the masks prune then: the least of 40 batches, which are trained after
those that are timed. Times are the least of all epochs but the first, on the clock and summed over
the threads of the process: on a machine with other work compare the latter.

    python -m benchmarks.gradual --data-dir DIR

With MNIST or Fashion-MNIST in DIR (`--data`); TensorFlow Model Optimization must be installed.
"""

import argparse
import json
import os
import subprocess
import sys
import time

BATCH = 128
SPARSITY = 0.9


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", default="mnist", choices=["mnist", "fashion_mnist"])
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--examples", type=int, default=10_000)
    arguments = parser.parse_args()
    print("library  backend     frequency  accuracy  sparsity    zeros  s/epoch  cpu s", flush=True)
    runs = [("ours", "tensorflow"), ("ours", "jax"), ("tfmot", "tensorflow")]
    for library, backend in runs:
        for frequency in (1, 100):
            task = {**vars(arguments), "library": library, "frequency": frequency}
            # In a process of its own: tfmot turns `tf.keras` into Keras 2.
            code = f"from benchmarks.gradual import measure; measure({json.dumps(task)!r})"
            environment = {**os.environ, "KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
            result = subprocess.run(
                [sys.executable, "-c", code],
                env=environment,
                check=True,
                stdout=subprocess.PIPE,
                text=True,
            )
            row = json.loads(result.stdout.splitlines()[-1])
            print(
                f"{library:9}{backend:12}{frequency:9}{row['accuracy']:10.4f}"
                f"{row['sparsity']:10.4f}{row['zeros']:9.4f}{row['seconds']:9.2f}"
                f"{row['processor']:7.2f}",
                flush=True,
            )


def measure(task):
    """Trains in this process and prints a row as JSON."""
    task = json.loads(task)
    from lottery_ticket_pruner.experiments import datasets

    data = datasets.load(task["data"], task["data_dir"])
    x, y = data.x_train[: task["examples"]], data.y_train[: task["examples"]]
    x, x_test = x.reshape(len(x), -1), data.x_test.reshape(len(data.x_test), -1)
    measure_with = _ours if task["library"] == "ours" else _tfmot
    row = measure_with((x, y), (x_test, data.y_test), task["epochs"], task["frequency"])
    print(json.dumps(row))


def _ours(train, test, epochs, frequency):
    import keras

    import masked_layers as ml
    from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules

    keras.utils.set_random_seed(0)
    model = ml.convert_to_masked(_network(keras, train[0].shape[1]))
    _compile(keras, model)
    pruner = LotteryTicketPruner(model)
    schedule = schedules.Polynomial(**_schedule(train, epochs, frequency))
    refs = ml.masked_refs(model)

    def kernels():
        if hasattr(model, "jax_state_sync"):
            model.jax_state_sync()
        return [keras.ops.convert_to_numpy(getattr(ref.layer, ref.name)) for ref in refs]

    def masks():
        return list(ml.get_masks(model).values())

    pruning = GradualPruning(pruner, schedule, regrowth=True)  # as tfmot does
    return _run(keras, model, [pruning], train, test, epochs, kernels, masks)


def _tfmot(train, test, epochs, frequency):
    from lottery_ticket_pruner.interop.tfmot import import_tfmot

    tfmot = import_tfmot().sparsity.keras
    import tf_keras

    tf_keras.utils.set_random_seed(0)
    schedule = tfmot.PolynomialDecay(**_schedule(train, epochs, frequency))
    model = tfmot.prune_low_magnitude(_network(tf_keras, train[0].shape[1]), schedule)
    _compile(tf_keras, model)
    variables = [pair for layer in model.layers for pair in layer.pruning_vars]

    def kernels():
        return [kernel.numpy() for kernel, _, _ in variables]

    def masks():
        return [mask.numpy() for _, mask, _ in variables]

    update = tfmot.UpdatePruningStep()
    return _run(tf_keras, model, [update], train, test, epochs, kernels, masks)


def _schedule(train, epochs, frequency):
    steps = epochs * -(-len(train[0]) // BATCH)
    return {
        "initial_sparsity": 0.0,
        "final_sparsity": SPARSITY,
        "begin_step": 0,
        "end_step": steps // 100 * 100,  # updates in every epoch that is timed
        "frequency": frequency,
    }


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


def _run(library, model, pruning, train, test, epochs, kernels, masks):
    shares = []

    class Zeros(library.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            pairs = zip(kernels(), masks(), strict=True)
            found = [((kernel == 0).sum(), (mask == 0).sum()) for kernel, mask in pairs]
            zeros, pruned = (sum(counts) for counts in zip(*found, strict=True))
            if pruned:
                shares.append(min(zeros / pruned, 1.0))

    class Clock(library.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            self.started = time.perf_counter(), time.process_time()

        def on_epoch_end(self, epoch, logs=None):
            if epoch:  # the first one compiles
                now = time.perf_counter(), time.process_time()
                times.append([end - start for end, start in zip(now, self.started, strict=True)])

    times = []
    arguments = {"batch_size": BATCH, "verbose": 0}
    model.fit(*train, epochs=epochs, callbacks=[*pruning, Clock()], **arguments)
    accuracy = model.evaluate(*test, batch_size=1000, verbose=0)[1]
    sparsity = sum((m == 0).sum() for m in masks()) / sum(m.size for m in masks())
    short = [array[: 40 * BATCH] for array in train]
    model.fit(*short, callbacks=[*pruning, Zeros()], **arguments)
    return {
        "accuracy": accuracy,
        "sparsity": float(sparsity),
        "zeros": float(min(shares)),
        "seconds": min(seconds for seconds, _ in times),
        "processor": min(processor for _, processor in times),
    }


if __name__ == "__main__":
    main()
