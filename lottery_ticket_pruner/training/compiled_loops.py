"""Training and evaluation in compiled loops, with one class for each backend that supports them."""

from __future__ import annotations

import functools
import operator
from typing import Any, Protocol

import keras
import numpy as np

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.training.augmentation import Augmentation
from lottery_ticket_pruner.training.dataset import ArrayDataset, Arrays, map_arrays
from lottery_ticket_pruner.training.engine_settings import settings
from lottery_ticket_pruner.training.step_callback import LoopChanges
from masked_layers import paths
from masked_layers.devices import computes_on_cpu

# Maximum number of steps per call of a loop. One size, so that one program serves all calls.
BLOCK = 1024

_CONVOLUTIONS = tuple(
    layer
    for name, layer in vars(keras.layers).items()
    if "Conv" in name and isinstance(layer, type)
)


class CompiledLoops(Protocol):
    """The interface between the engine and a backend, for one model."""

    def __init__(self, model: keras.Model) -> None: ...

    def kinds(self, steps: int) -> tuple[str, ...]:
        """Returns the kinds of loops suitable for a training of so many steps, best one first."""

    def train(
        self,
        data: ArrayDataset,
        batches: np.ndarray,
        kind: str,
        changes: LoopChanges | None = None,
    ) -> np.ndarray:
        """Runs a step for each batch, and waits until the last one is done.

        Args:
            data: The examples.
            batches: Rows of the examples, of shape `(steps, batch size, row)`, at most `BLOCK`
                steps.
            kind: One of `kinds`.
            changes: Changes of variables after the steps.

        Returns:
            For each event of the changes, the number of the step at which it happened first, or
            `BLOCK`.
        """

    def evaluate(self, data: ArrayDataset, batch_size: int, group: int) -> list[dict[str, Any]]:
        """Returns the loss and the metrics of each group of so many successive examples."""


class _TensorFlowLoops:
    """A `tf.function` with a loop that updates the variables in place.

    Long trainings are compiled by XLA if `fit` would use it, and also on a CPU, where
    `compile(jit_compile="auto")` would not: there XLA makes loops several times faster, unless the
    model has convolutions.
    """

    def __init__(self, model: keras.Model) -> None:
        import tensorflow as tf

        self._model = model
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
            changes: LoopChanges | None,
            table: tf.Tensor,
            first: tf.Tensor,
        ) -> tf.Tensor:
            # With `tf.range(count)`, XLA would compile a loop for every count.
            step = tf.constant(0)
            while step < count:
                # In two steps, because XLA computes `batches[step, :, 1:]` wrongly and silently
                # (TensorFlow 2.21).
                rows = tf.gather(batches, step)
                x, *rest = map_arrays(functools.partial(tf.gather, indices=rows[:, 0]), data)
                if augment is not None:
                    x = augment.apply(x, rows[:, 1:])
                model.train_step((x, *rest))
                if changes is not None:
                    values = [[v.value for v in group] for group in (changes.read, changes.written)]
                    compute = tf.autograph.experimental.do_not_convert(changes.compute)
                    new, events = compute(tf.gather(table, step), *values)
                    for variable, value in zip(changes.written, new, strict=True):
                        variable.assign(value)
                    first = tf.minimum(first, tf.where(events, step, BLOCK))
                step += 1
            return first

        self._train = {
            "XLA": tf.function(train, jit_compile=True),
            "graph": tf.function(train, jit_compile=False),
        }
        self._evaluate = _evaluation_of_groups(model)

    def kinds(self, steps: int) -> tuple[str, ...]:
        return ("XLA", "graph") if self._by_xla and steps >= settings.xla_steps else ("graph",)

    def train(
        self,
        data: ArrayDataset,
        batches: np.ndarray,
        kind: str,
        changes: LoopChanges | None = None,
    ) -> np.ndarray:
        first = self._train[kind](
            data.device, *_padded(batches), data.augment, changes, *_tables(changes, len(batches))
        )
        return np.asarray(first)

    def evaluate(self, data: ArrayDataset, batch_size: int, group: int) -> list[dict[str, Any]]:
        import tensorflow as tf

        # TensorFlow would trace the loop again if it created variables, and for every length.
        _keras.build_loss(self._model, data.take(slice(0, batch_size)))
        size = tf.TensorSpec([], "int32")
        compute = self._evaluate.get_concrete_function(
            map_arrays(lambda x: tf.TensorSpec([None, *x.shape[1:]], x.dtype), data.device),
            *(size, size, size),
        )
        sizes = (tf.constant(size, "int32") for size in (len(data), batch_size, group))
        results = tf.nest.map_structure(np.asarray, compute(data.device, *sizes))
        return [
            tf.nest.map_structure(operator.itemgetter(number), results)
            for number in range(-(-len(data) // group))
        ]


def _evaluation_of_groups(model: keras.Model) -> Any:
    """Returns a `tf.function` that evaluates each group of successive examples of a data set."""
    import tensorflow as tf

    @tf.function
    def evaluate(
        data: tuple[Arrays, ...], examples: tf.Tensor, batch_size: tf.Tensor, group: tf.Tensor
    ) -> dict[str, tf.Tensor]:
        def results() -> dict[str, tf.Tensor]:
            return tf.nest.map_structure(tf.convert_to_tensor, model.get_metrics_result())

        def of_group(first: tf.Tensor) -> dict[str, tf.Tensor]:
            for metric in model.metrics:
                metric.reset_state()
            end = tf.minimum(first + group, examples)
            for start in tf.range(first, end, batch_size):
                batch = operator.itemgetter(slice(start, tf.minimum(start + batch_size, end)))
                model.test_step(map_arrays(batch, data))
            return results()

        form = tf.nest.map_structure(tf.type_spec_from_value, results())
        firsts = tf.range(0, examples, group)
        # One after the other, because all use the same metrics.
        return tf.map_fn(of_group, firsts, parallel_iterations=1, fn_output_signature=form)

    return evaluate


class _JaxLoops:
    """A `fori_loop` over the training state, written back to the variables after each call."""

    def __init__(self, model: keras.Model) -> None:
        import jax

        def train(
            augment: Augmentation | None,
            changes: LoopChanges | None,
            state: Any,
            data: tuple[Arrays, ...],
            batches: jax.Array,
            count: int,
            table: jax.Array,
            first: jax.Array,
        ) -> Any:
            def step(number: int, carried: Any) -> Any:
                state, first = carried
                x, *rest = map_arrays(operator.itemgetter(batches[number, :, 0]), data)
                if augment is not None:
                    x = augment.apply(x, batches[number, :, 1:])
                state = model.train_step(state, (x, *rest))[1]
                if changes is not None:
                    state, events = _changed(changes, table[number], self._groups(), state)
                    first = jax.numpy.minimum(first, jax.numpy.where(events, number, BLOCK))
                return state, first

            return jax.lax.fori_loop(0, count, step, (state, first))

        def evaluate(state: Any, batch: tuple[Arrays, ...]) -> Any:
            return model.test_step(state, batch)[1]

        self._model = model
        self._train = jax.jit(train, static_argnums=(0, 1))
        self._evaluate = jax.jit(evaluate)
        self._slow = computes_on_cpu() and _has_convolutions(model)

    def kinds(self, steps: int) -> tuple[str, ...]:
        return () if self._slow else ("XLA",)

    def _groups(self) -> tuple[list[keras.Variable], ...]:
        model = self._model
        return (
            model.trainable_variables,
            model.non_trainable_variables,
            model.optimizer.variables,
            model.metrics_variables,
        )

    def train(
        self,
        data: ArrayDataset,
        batches: np.ndarray,
        kind: str,
        changes: LoopChanges | None = None,
    ) -> np.ndarray:
        import jax

        groups = self._groups()
        tables = _tables(changes, len(batches))
        with _keras.withdrawn(*groups) as state:
            state, first = self._train(
                data.augment, changes, state, data.device, *_padded(batches), *tables
            )
        _assign(groups, jax.block_until_ready(state))
        return np.asarray(first)

    def evaluate(self, data: ArrayDataset, batch_size: int, group: int) -> list[dict[str, Any]]:
        _keras.build_loss(self._model, data.take(slice(0, 1)))
        return [
            self._of_group(data, batch_size, range(len(data))[first : first + group])
            for first in range(0, len(data), group)
        ]

    def _of_group(self, data: ArrayDataset, batch_size: int, group: range) -> dict[str, Any]:
        model = self._model
        model.reset_metrics()
        groups = (
            model.trainable_variables,
            model.non_trainable_variables,
            model.metrics_variables,
        )
        with _keras.withdrawn(*groups) as state:
            for start in group[::batch_size]:
                end = min(start + batch_size, group.stop)
                batch = operator.itemgetter(slice(start, end))
                state = self._evaluate(state, map_arrays(batch, data.device))
        _assign(groups, state)
        return model.get_metrics_result()


COMPILED_LOOPS: dict[str, type[CompiledLoops]] = {"tensorflow": _TensorFlowLoops, "jax": _JaxLoops}


def _padded(batches: np.ndarray) -> tuple[Any, Any]:
    """Returns the batches, padded to `BLOCK` of them, and their number, as tensors."""
    table = np.zeros((BLOCK, *batches.shape[1:]), "int32")
    table[: len(batches)] = batches
    return keras.ops.convert_to_tensor(table), keras.ops.convert_to_tensor(len(batches), "int32")


def _tables(changes: LoopChanges | None, steps: int) -> tuple[Any, Any]:
    """Returns the rows of changes, padded to `BLOCK`, and a number above all steps per event."""
    rows = np.zeros((steps, 1), "int32") if changes is None else changes.rows(steps)
    table = np.zeros((BLOCK, rows.shape[1]), "int32")
    table[:steps] = rows
    first = np.full(0 if changes is None else changes.events, BLOCK, "int32")
    return keras.ops.convert_to_tensor(table), keras.ops.convert_to_tensor(first)


def _changed(changes: LoopChanges, row: Any, groups: Any, state: Any) -> tuple[Any, Any]:
    """Returns the state after the changes, and the events."""
    values = {
        id(variable): value
        for variables, group in zip(groups, state, strict=True)
        for variable, value in zip(variables, group, strict=True)
    }
    read, written = ([values[id(v)] for v in group] for group in (changes.read, changes.written))
    new, events = changes.compute(row, read, written)
    values |= {id(v): value for v, value in zip(changes.written, new, strict=True)}
    return tuple([values[id(v)] for v in variables] for variables in groups), events


def _assign(groups: Any, values: Any) -> None:
    for variables, group in zip(groups, values, strict=True):
        for variable, value in zip(variables, group, strict=True):
            variable.assign(value)


def _has_convolutions(model: keras.Model) -> bool:
    """Returns True for convolutions, whose XLA loops are about fifty times slower on a CPU."""
    return any(isinstance(layer, _CONVOLUTIONS) for _, layer in paths.walk(model))
