"""Whole stretches of training steps as one compiled program, with the data on the device.

Keras' own loop costs a small network several times what its arithmetic does. The engine runs the
model's own `train_step` in a loop inside the graph, so that losses, metrics, optimizers, dropout,
statistics and masks mean what they mean in `fit`: in a `tf.function` on TensorFlow, in a
`fori_loop` on JAX. What it cannot run, and what `fit` runs faster, goes through `fit`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import operator
import time
from collections.abc import Iterator
from typing import Any, Protocol

import keras
import numpy as np

from lottery_ticket_pruner.augmentation import Augmentation
from masked_layers import _keras, paths

# An array with the examples along the first axis, or a list or dict of such.
Arrays = Any

EVALUATION_BATCH = 1_000

# Steps per call of a compiled loop. One size for all calls, so that one program serves them all.
_BLOCK = 1024
# Compiling `fit` takes about as many seconds: asking earlier costs more than the answer can save.
_PATIENCE = 3.0
_TRIAL_STEPS = 40
# On TensorFlow, XLA takes a second or more to compile what then saves about a millisecond a step.
_WORTH_XLA = 300

_CONVOLUTIONS = tuple(
    layer
    for name, layer in vars(keras.layers).items()
    if "Conv" in name and isinstance(layer, type)
)

_logger = logging.getLogger(__name__)
_said: set[str] = set()


@dataclasses.dataclass
class Examples:
    """A data set in memory: `(x, y)` or `(x, y, sample_weight)`, and its copy on the device."""

    host: tuple[Arrays, ...]
    augment: Augmentation | None = None

    @classmethod
    def of(
        cls,
        x: Arrays,
        y: Arrays,
        sample_weight: Arrays | None = None,
        augment: Augmentation | None = None,
    ) -> Examples:
        """Takes what `fit` takes as arrays; floats become `keras.config.floatx()`, as there."""
        data = (x, y) if sample_weight is None else (x, y, sample_weight)
        return cls(keras.tree.map_structure(_as_keras_would, data), augment)

    def __len__(self) -> int:
        return len(keras.tree.flatten(self.host)[0])

    def take(self, indices: Any) -> tuple[Arrays, ...]:
        """Returns these examples, a copy on the host."""
        return keras.tree.map_structure(lambda array: array[indices], self.host)

    def rows(self, order: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Returns an int32 row for each index of `order`: the index, and what is random then."""
        order = order.astype("int32")[:, None]
        if self.augment is None:
            return order
        return np.concatenate([order, self.augment.draw(rng, len(order))], axis=1)

    def augmented(self, rows: np.ndarray, batch_size: int) -> tuple[Arrays, ...]:
        """Returns the examples of these rows, changed batch by batch, a copy on the host."""
        x, *rest = self.take(rows[:, 0])
        if self.augment is not None:
            starts = range(0, len(rows), batch_size)
            batches = (slice(start, start + batch_size) for start in starts)
            changed = [self.augment.apply(x[batch], rows[batch, 1:]) for batch in batches]
            x = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in changed])
        return (x, *rest)

    @functools.cached_property
    def device(self) -> tuple[Arrays, ...]:
        """The data as tensors of the backend."""
        return keras.tree.map_structure(keras.ops.convert_to_tensor, self.host)


def _as_keras_would(array: Any) -> np.ndarray:
    array = np.asarray(array)
    floating = np.issubdtype(array.dtype, np.floating)
    return array.astype(keras.config.floatx(), copy=False) if floating else array


class Engine:
    """Trains and evaluates one compiled model on arrays in memory.

    Obtained from `engine_of`. Between calls the model and its optimizer are as between calls of
    `fit`, but for `Optimizer.finalize_variable_values`, which is the caller's to call at the end.

    Args:
        model: A compiled model.

    Attributes:
        route: `"loop"` or `"fit"`. It starts from what is known of the model; the first time that
            the loop has run for some seconds, a few steps go through `fit` to see which is faster.
    """

    def __init__(self, model: keras.Model) -> None:
        self.train_function = model.train_function
        self._model = model
        self._programs = _PROGRAMS.get(keras.backend.backend(), _FitPrograms)(model)
        reason = _why_not(model)
        if reason:
            say_once(f"Training goes through `fit`: {reason}.")
        self.route = "fit" if reason or self._programs.slow_loops else "loop"
        self._settled = self.route == "fit"
        self._compiled: set[tuple] = set()
        self._loop_seconds = 0.0
        self._loop_steps = 0

    def train(
        self,
        data: Examples,
        order: np.ndarray,
        batch_size: int,
        *,
        steps: int,
        rng: np.random.Generator | None = None,
        whole: bool = False,
        deterministic: bool = False,
    ) -> None:
        """Trains on the examples of these indices, batch by batch, the last one maybe smaller.

        Args:
            data: The examples.
            order: 1-D array of indices.
            batch_size: Examples per step.
            steps: Of the whole training that this is a part of: what compiling may cost.
            rng: What an augmentation draws from.
            whole: Whether the model's metrics must be those of the whole call in the end; without
                it they may be those of a part.
            deterministic: Whether the route must not depend on the time that anything took.
        """
        self._model.reset_metrics()
        rows = data.rows(order, rng)
        if not (self._settled or deterministic) and self._loop_seconds > _PATIENCE:
            trial = batch_size * self._trial_steps()
            if len(rows) >= trial:
                trial = len(rows) if whole else trial
                self._compare(data, rows[:trial], batch_size)
                rows = rows[trial:]
        long = steps >= _WORTH_XLA
        if len(rows) and self.route == "loop":
            rows = self._begin(data, rows, batch_size, long)
        if len(rows) and self.route == "loop":
            self._loop(data, rows, batch_size, long)
        elif len(rows):
            self._fit(data, rows, batch_size)

    def evaluate(self, data: Examples) -> dict[str, float]:
        """Returns the loss and the compiled metrics over all examples, by name."""
        results = self._programs.evaluate(data)
        return {name: float(value) for name, value in results.items()}

    def _begin(self, data: Examples, rows: np.ndarray, batch_size: int, long: bool) -> np.ndarray:
        """Compiles the loop with the first step; what cannot be compiled goes through `fit`."""
        size = min(batch_size, len(rows))
        shapes = [(array.shape, array.dtype) for array in keras.tree.flatten(data.host)]
        key = (size, long, data.augment, *map(str, shapes))
        if key in self._compiled:
            return rows
        step = int(self._model.optimizer.iterations)
        try:
            self._programs.train(data, rows[None, :size], long)
        except Exception as error:
            if int(self._model.optimizer.iterations) != step:
                raise
            if self._programs.simplify():
                return self._begin(data, rows, batch_size, long)
            self.route, self._settled = "fit", True
            say_once(f"Training goes through `fit`: {type(error).__name__}: {error}")
            return rows
        self._compiled.add(key)
        return rows[size:]

    def _loop(self, data: Examples, rows: np.ndarray, batch_size: int, long: bool) -> None:
        started = time.perf_counter()
        full = len(rows) // batch_size
        batches = rows[: full * batch_size].reshape(full, batch_size, rows.shape[1])
        for start in range(0, full, _BLOCK):
            self._programs.train(data, batches[start : start + _BLOCK], long)
        self._loop_seconds += time.perf_counter() - started
        self._loop_steps += full
        if len(rows) % batch_size:
            self._programs.train(data, rows[None, full * batch_size :], long)

    def _fit(self, data: Examples, rows: np.ndarray, batch_size: int, **kwargs: Any) -> None:
        x, y, sample_weight = (*data.augmented(rows, batch_size), None)[:3]
        with _not_finalizing(self._model.optimizer):
            self._model.fit(
                x,
                y,
                sample_weight=sample_weight,
                batch_size=batch_size,
                shuffle=False,
                verbose=0,
                **kwargs,
            )

    def _trial_steps(self) -> int:
        return max(_TRIAL_STEPS, 4 * self._model.steps_per_execution)

    def _compare(self, data: Examples, rows: np.ndarray, batch_size: int) -> None:
        watch = _Stopwatch()
        self._fit(data, rows, batch_size, callbacks=[watch])
        self.route = "loop" if self._loop_seconds / self._loop_steps < watch.pace() else "fit"
        self._settled = True
        _logger.info(
            "%s: %.3f ms a step in a compiled loop, %.3f in `fit`.",
            self._model.name,
            1e3 * self._loop_seconds / self._loop_steps,
            1e3 * watch.pace(),
        )


def engine_of(model: keras.Model) -> Engine:
    """Returns the engine of a compiled model, made anew where its graph has changed."""
    # compile(), and whoever changes what the model's graph computes, resets `train_function`:
    # functions made beside an older one are stale.
    if model.train_function is None:
        model.make_train_function()
    engine = vars(model).get("_lottery_ticket_engine")
    if engine is None or engine.train_function is not model.train_function:
        engine = Engine(model)
        # Past Keras' tracking, which would look for variables in it.
        object.__setattr__(model, "_lottery_ticket_engine", engine)
    return engine


def _why_not(model: keras.Model) -> str | None:
    """Why the model's training steps cannot run inside a compiled loop; None if they can."""
    backend = keras.backend.backend()
    if backend not in _PROGRAMS:
        return f"there is no compiled loop for Keras on {backend}"
    if model.run_eagerly:
        return "the model is compiled with run_eagerly=True"
    if backend == "jax" and not model.jit_compile:
        return "the model is compiled with jit_compile=False"
    if keras.distribution.distribution() is not None:
        return "a `keras.distribution` is set"
    replicas = getattr(model, "distribute_strategy", None)
    if replicas is not None and replicas.num_replicas_in_sync > 1:
        return "the model is distributed over several replicas"
    if not type(model).make_train_function.__module__.startswith("keras."):
        return f"{type(model).__name__} makes a training function of its own"
    return None


def say_once(text: str) -> None:
    """Logs a warning that this process has not seen yet."""
    if text not in _said:
        _said.add(text)
        _logger.warning(text)


@contextlib.contextmanager
def _not_finalizing(optimizer: keras.Optimizer) -> Iterator[None]:
    """Keeps `fit` from replacing the weights by their averages: the training goes on after it."""
    object.__setattr__(optimizer, "finalize_variable_values", lambda variables: None)
    try:
        yield
    finally:
        object.__delattr__(optimizer, "finalize_variable_values")


class _Stopwatch(keras.callbacks.Callback):
    """Times the steps of `fit` but for the first, which compiles."""

    def __init__(self) -> None:
        super().__init__()
        self._times: list[float] = []
        self._batches: list[int] = []

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self._times.append(time.perf_counter())
        self._batches.append(batch)

    def pace(self) -> float:
        """Seconds per step."""
        steps = self._batches[-1] - self._batches[0]
        return (self._times[-1] - self._times[0]) / steps


# --- One class per backend ------------------------------------------------------------------------


class _Programs(Protocol):
    """What an engine needs of a backend."""

    slow_loops: bool
    """Whether the model is known to be faster in `fit`."""

    def __init__(self, model: keras.Model) -> None: ...

    def train(self, data: Examples, batches: np.ndarray, long: bool) -> None:
        """Runs a step for each batch of rows, at most `_BLOCK`.

        Args:
            data: The examples.
            batches: Their rows, of shape `(steps, batch size, row)`.
            long: Whether the training is long enough for the dearer of two compilations.
        """

    def simplify(self) -> bool:
        """Changes to programs that fewer models are too much for; False if there are none."""

    def evaluate(self, data: Examples) -> dict[str, Any]:
        """Returns the loss and the metrics."""


class _FitPrograms:
    """No program: Keras' own methods."""

    slow_loops = True

    def __init__(self, model: keras.Model) -> None:
        self._model = model

    def evaluate(self, data: Examples) -> dict[str, Any]:
        x, y, sample_weight = (*data.host, None)[:3]
        return self._model.evaluate(
            x,
            y,
            sample_weight=sample_weight,
            batch_size=EVALUATION_BATCH,
            verbose=0,
            return_dict=True,
        )


class _TensorFlowPrograms:
    """A `tf.function` whose loop updates the variables in place.

    A long training is compiled by XLA where `fit` uses that, and on a CPU, where
    `compile(jit_compile="auto")` does not: XLA makes a loop several times faster there, unless
    there are convolutions in it.
    """

    slow_loops = False

    def __init__(self, model: keras.Model) -> None:
        import tensorflow as tf

        self._by_xla = model.jit_compile
        if not tf.config.list_logical_devices("GPU"):
            layers = [layer for _, layer in paths.walk(model)]
            self._by_xla = all(layer.supports_jit for layer in layers)
            self._by_xla &= not _has_convolutions(model)

        def train(
            data: tuple[Arrays, ...],
            batches: tf.Tensor,
            count: tf.Tensor,
            augment: Augmentation | None,
        ) -> None:
            # Over `tf.range(count)` XLA would compile a loop for every count.
            step = tf.constant(0)
            while step < count:
                # In two steps: XLA gets `batches[step, :, 1:]` wrong, silently (TensorFlow 2.21).
                rows = tf.gather(batches, step)
                batch = functools.partial(tf.gather, indices=rows[:, 0])
                x, *rest = tf.nest.map_structure(batch, data)
                if augment is not None:
                    x = augment.apply(x, rows[:, 1:])
                model.train_step((x, *rest))
                step += 1

        @tf.function
        def evaluate(data: tuple[Arrays, ...]) -> dict[str, tf.Tensor]:
            for metric in model.metrics:
                metric.reset_state()
            examples = tf.shape(tf.nest.flatten(data)[0])[0]
            for start in tf.range(0, examples, EVALUATION_BATCH):
                batch = operator.itemgetter(slice(start, start + EVALUATION_BATCH))
                model.test_step(tf.nest.map_structure(batch, data))
            return model.get_metrics_result()

        self._model = model
        self._train = {by_xla: tf.function(train, jit_compile=by_xla) for by_xla in (False, True)}
        self._evaluate = evaluate

    def simplify(self) -> bool:
        changed, self._by_xla = self._by_xla, False
        return changed

    def train(self, data: Examples, batches: np.ndarray, long: bool) -> None:
        _keras.symbolic_build(self._model, data.take(batches[0, :, 0]))
        batches, count = _padded(batches)
        self._train[self._by_xla and long](data.device, batches, count, data.augment)

    def evaluate(self, data: Examples) -> dict[str, Any]:
        return self._evaluate(data.device)


class _JaxPrograms:
    """A `fori_loop` over the state of the training; the variables get it back after each call."""

    def __init__(self, model: keras.Model) -> None:
        import jax

        def train(
            augment: Augmentation | None,
            state: Any,
            data: tuple[Arrays, ...],
            batches: jax.Array,
            count: int,
        ) -> Any:
            def step(number: int, state: Any) -> Any:
                batch = operator.itemgetter(batches[number, :, 0])
                x, *rest = jax.tree.map(batch, data)
                if augment is not None:
                    x = augment.apply(x, batches[number, :, 1:])
                return model.train_step(state, (x, *rest))[1]

            return jax.lax.fori_loop(0, count, step, state)

        def evaluate(state: Any, batch: tuple[Arrays, ...]) -> Any:
            return model.test_step(state, batch)[1]

        self._model = model
        self._train = jax.jit(train, static_argnums=0)
        self._evaluate = jax.jit(evaluate)
        self.slow_loops = jax.default_backend() == "cpu" and _has_convolutions(model)

    def simplify(self) -> bool:
        return False

    def train(self, data: Examples, batches: np.ndarray, long: bool) -> None:
        import jax

        model = self._model
        _keras.symbolic_build(model, data.take(batches[0, :, 0]))
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )
        with _keras.withdrawn(*groups) as state:
            state = self._train(data.augment, state, data.device, *_padded(batches))
        # Here, so that whoever times the call times the steps.
        _assign(groups, jax.block_until_ready(state))

    def evaluate(self, data: Examples) -> dict[str, Any]:
        import jax

        model = self._model
        _keras.build_loss(model, data.take(slice(0, 1)))
        model.reset_metrics()
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        )
        with _keras.withdrawn(*groups) as state:
            for start in range(0, len(data), EVALUATION_BATCH):
                batch = operator.itemgetter(slice(start, start + EVALUATION_BATCH))
                state = self._evaluate(state, jax.tree.map(batch, data.device))
        _assign(groups, state)
        return model.get_metrics_result()


_PROGRAMS: dict[str, type[_Programs]] = {
    "tensorflow": _TensorFlowPrograms,
    "jax": _JaxPrograms,
}


def _padded(batches: np.ndarray) -> tuple[Any, Any]:
    """Returns the batches in a table of `_BLOCK` of them, and their number, as tensors."""
    table = np.zeros((_BLOCK, *batches.shape[1:]), "int32")
    table[: len(batches)] = batches
    return keras.ops.convert_to_tensor(table), keras.ops.convert_to_tensor(len(batches), "int32")


def _assign(groups: Any, values: Any) -> None:
    for variables, group in zip(groups, values, strict=True):
        for variable, value in zip(variables, group, strict=True):
            variable.assign(value)


def _has_convolutions(model: keras.Model) -> bool:
    """Whether XLA should not make a loop of it on a CPU: some fifty times slower than a step."""
    return any(isinstance(layer, _CONVOLUTIONS) for _, layer in paths.walk(model))
