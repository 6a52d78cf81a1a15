"""Prunes and rewinds one model hundreds of times, and evaluates many models one after another.

    python -m benchmarks.checks.rounds [--rounds 500] [--models 50]

Each round trains a small model for a few steps, prunes one or two of its weights and rewinds the
others, once with `training.fit` and once with `model.fit`. Printed are the resident memory, the
number of traces or compilations and the processor time of a round at a tenth of the rounds and at
the end. Then models of different sizes are made, pruned by gradients, evaluated and deleted, and
those that stay in memory are counted. Even when nothing in Python stays, TensorFlow keeps a little
for each operation of a function that it has traced. Therefore, plain models of Keras are
evaluated and deleted afterwards, to compare. JAX keeps the programs of deleted models, 10 MB for a
small one, until `jax.clear_caches()` is called, as is done here before memory is read.

Left to itself, `training.fit` compares its compiled loop with `fit` once for each model, after some
seconds in the loop, and therefore compiles `fit` late: one program on JAX, two functions on
TensorFlow. The round in which this happens depends on the machine, so it is switched off here.

Exits with 1 if memory grows by more than 10 MB, a function is compiled after the first tenth of the
rounds, rounds get slower by half, a deleted model stays, or TensorFlow warns of retracing.
"""

import argparse
import contextlib
import ctypes
import gc
import logging
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np

import lottery_ticket_pruner as ltp
import masked_layers as ml
from lottery_ticket_pruner import training

_MB = 1e6
_MOST_GROWTH = 10 * _MB
_SLOWER = 1.5
_SPARSEST = 0.9

RNG = np.random.default_rng(0)
X = RNG.normal(size=(256, 20)).astype("float32")
Y = RNG.integers(0, 4, 256)


def small(units: int = 32) -> keras.Model:
    """Returns a compiled masked model."""
    layers = [
        keras.layers.Dense(units, "relu"),
        keras.layers.Dropout(0.1, seed=1),
        keras.layers.Dense(4),
    ]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((20,)), *layers]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def resident() -> int:
    """Returns the resident memory in bytes, without what is free."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096


def resident_without_programs() -> int:
    """Returns the resident memory after JAX has forgotten the programs of deleted models."""
    if keras.backend.backend() == "jax":
        import jax

        jax.clear_caches()
    return resident()


class Compilations:
    """Notes the functions that the backend traces or compiles, in all of the process."""

    def __init__(self) -> None:
        self.names: list[str] = []
        if keras.backend.backend() == "jax":
            import jax.monitoring

            jax.monitoring.register_event_duration_secs_listener(self._heard)
        elif keras.backend.backend() == "tensorflow":
            from tensorflow.python.framework import func_graph

            original = func_graph.FuncGraph.__init__

            def counting(graph: object, *args: object, **kwargs: object) -> None:
                name = str(args[0] if args else kwargs["name"])
                # Every call of `fit` makes a pipeline of data, with small functions of its own.
                if not name.startswith("Dataset_"):
                    self.names.append(name)
                original(graph, *args, **kwargs)

            func_graph.FuncGraph.__init__ = counting

    def _heard(self, event: str, seconds: float, **kwargs: object) -> None:
        if event.endswith("backend_compile_duration"):
            self.names.append(str(kwargs.get("fun_name", "a function")))


class Warnings(logging.Handler):
    """Counts TensorFlow's warnings of retracing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.count = 0
        logging.getLogger("tensorflow").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "retracing" in record.getMessage()


def trained_by_engine(model: keras.Model, number: int) -> None:
    """Trains with `training.fit`."""
    training.fit(model, X, Y, epochs=1, batch_size=64, seed=number)


def trained_by_keras(model: keras.Model, number: int) -> None:
    """Trains with `fit`."""
    model.fit(X, Y, batch_size=64, epochs=1, verbose=0)


def rounds(
    count: int, train: Callable[[keras.Model, int], None], compilations: Compilations
) -> list[str]:
    """Prunes and rewinds one model, prints a row for a tenth and all of the rounds.

    Returns:
        What grew.
    """
    model = small()
    pruner = ltp.LotteryTicketPruner(model)
    rows, since = {}, time.process_time()
    marks = {count // 10: count // 20, count: count // 20}  # Rounds, and those that are timed.
    for number in range(1, count + 1):
        if number in {mark - length + 1 for mark, length in marks.items()}:
            since = time.process_time()
        train(model, number)
        pruner.set_pretrained_weights()
        # At least one weight more in every round.
        sparsity = _SPARSEST * number / count
        pruner.update_masks("large_final", sparsity=sparsity, scope="global")
        pruner.rewind()
        if number in marks:
            seconds = (time.process_time() - since) / marks[number]
            rows[number] = resident(), len(compilations.names), seconds
            memory, compiled, each = rows[number]
            print(
                f"{train.__name__:20}{number:8}{memory / _MB:10.1f} MB{compiled:8} compiled"
                f"{1000 * each:10.1f} processor ms a round, sparsity {sparsity:.3f}",
                flush=True,
            )
    (memory, compiled, seconds), (memory_2, compiled_2, seconds_2) = rows.values()
    faults = []
    if memory_2 - memory > _MOST_GROWTH:
        faults.append(f"{train.__name__}: memory grew by {(memory_2 - memory) / _MB:.1f} MB")
    if compiled_2 > compiled:
        late = compilations.names[compiled:compiled_2]
        faults.append(f"{train.__name__}: compiled later than in the first tenth: {late}")
    if seconds_2 > _SLOWER * seconds:
        faults.append(f"{train.__name__}: rounds took {seconds_2 / seconds:.2f} times as long")
    return faults


def left_by(
    count: int, use: Callable[[int], None], compilations: Compilations
) -> tuple[float, float]:
    """Makes and deletes models, and returns the functions compiled and the bytes kept of each.

    Args:
        count: Number of models.
        use: Function that makes, evaluates and deletes a model, and takes its number.
        compilations: The functions that were compiled so far.
    """
    compiled, memory = len(compilations.names), 0
    for number in range(count):
        use(number)
        if number == count // 10:
            memory = resident_without_programs()
    grown = resident_without_programs() - memory
    each = grown / max(1, count - 1 - count // 10)
    return (len(compilations.names) - compiled) / count, each


def evaluated(count: int, warned: Warnings, compilations: Compilations) -> list[str]:
    """Makes, prunes, evaluates and deletes models of different sizes."""
    alive: list[weakref.ref[object]] = []
    before = warned.count

    def use(number: int) -> None:
        model = small(8 + number)
        pruner = ltp.LotteryTicketPruner(model)
        pruner.update_masks("grasp", sparsity=0.5, data=(X, Y))
        pruner.evaluate_supermask(X, Y, verbose=0)
        model.evaluate(X, Y, verbose=0)
        smaller = ml.shrink(model)
        training.evaluate(smaller, X, Y)
        alive.extend(map(weakref.ref, (model, smaller, pruner)))

    functions, grown = left_by(count, use, compilations)
    left = sum(found() is not None for found in alive)
    print(
        f"{count} models evaluated: {warned.count - before} warnings of retracing, {left} of "
        f"{len(alive)} objects left, {functions:.0f} functions compiled and {grown / _MB:.1f} MB "
        "of memory more a model",
        flush=True,
    )
    faults = [f"{left} deleted models or pruners stayed in memory"] if left else []
    if warned.count > before:
        faults.append(f"TensorFlow warned of retracing {warned.count - before} times")
    return faults


def evaluated_by_keras(count: int, compilations: Compilations) -> None:
    """Makes, evaluates and deletes plain models, to show what the backend keeps of each."""

    def use(number: int) -> None:
        model = ml.strip_masks(small(8 + number))
        model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.evaluate(X, Y, verbose=0)

    functions, grown = left_by(count, use, compilations)
    print(
        f"{count} plain models evaluated once: {functions:.0f} functions compiled and "
        f"{grown / _MB:.1f} MB of memory more a model"
    )


def main() -> int:
    """Prints the rows and what is at fault."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=500, help="default: %(default)s")
    parser.add_argument("--models", type=int, default=50, help="default: %(default)s")
    options = parser.parse_args()
    training.settings.patience = float("inf")
    print(f"Keras {keras.version()} on {keras.backend.backend()}", flush=True)
    compilations, warned = Compilations(), Warnings()
    faults = []
    for train in (trained_by_engine, trained_by_keras):
        faults += rounds(options.rounds, train, compilations)
    faults += evaluated(options.models, warned, compilations)
    evaluated_by_keras(options.models, compilations)
    print("\n".join(faults) or "nothing grew")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
