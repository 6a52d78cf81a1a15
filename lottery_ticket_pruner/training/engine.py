"""Runs whole stretches of training steps as one compiled program, with the data on the device.

For a small network, the Python loop of Keras takes several times as long as its arithmetic. The
engine runs the model's own `train_step` in a loop inside the graph, so losses, metrics, optimizers,
dropout, statistics and masks work as in `fit`; see `compiled_loops`. It uses `fit` for everything
that cannot run this way, and where `fit` is faster.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.optimizers import read_clocks
from lottery_ticket_pruner.targets import explained
from lottery_ticket_pruner.training.compiled_loops import BLOCK, COMPILED_LOOPS, CompiledLoops
from lottery_ticket_pruner.training.dataset import ArrayDataset
from lottery_ticket_pruner.training.devices import (
    check_batches,
    check_equal_parts,
    shared_batch,
    trains_apart,
    why_distributed,
)
from lottery_ticket_pruner.training.engine_settings import settings
from lottery_ticket_pruner.training.step_callback import LoopChanges
from masked_layers.compiled import kept_beside

# Maximum number of examples per step of an evaluation, and of their bytes.
_EVALUATION_BATCH = 1_000
_EVALUATION_BYTES = 2**24

# Calls of a compiled loop become longer until each takes so many seconds. The route may change only
# between calls, and a single step may take a second.
_BLOCK_SECONDS = 0.5
# `fit` must be faster by more than the error of the timing.
_MARGIN = 0.95
# After so many times `settings.patience` seconds in a loop, `fit` is compared with it in any case.
_CERTAIN = 4

_logger = logging.getLogger(__name__)
_said: set[str] = set()


class Engine:
    """Trains and evaluates a compiled model on arrays in memory.

    Obtained from `engine_of`. Between calls, the model and its optimizer are in the same state as
    between calls of `fit`, except that the caller has to call `Optimizer.finalize_variable_values`
    at the end.

    When a compiled loop has run for some seconds and enough is left to train, a few steps go
    through `fit` to find out which is faster, once for each kind of loop and batch size.

    Args:
        model: A compiled model.
    """

    def __init__(self, model: keras.Model) -> None:
        self.train_function = model.train_function
        self._model = model
        self._loops: CompiledLoops | None = None
        reason = _why_no_loops(model)
        if reason is None:
            self._loops = COMPILED_LOOPS[keras.backend.backend()](model)
        self._why_fit = reason or _why_fit(model)
        self._why_evaluate = reason or _why_evaluate(model)
        self._refused: set[str] = set()
        self._refused_changes: set[tuple[str, LoopChanges]] = set()
        self._compiled: set[tuple[Any, ...]] = set()
        self._comparisons: dict[tuple[str, int], _PaceComparison] = collections.defaultdict(
            _PaceComparison
        )

    def train(
        self,
        data: ArrayDataset,
        rows: np.ndarray,
        batch_size: int,
        *,
        steps: int,
        done: int = 0,
        logged: bool = False,
        deterministic: bool = False,
        continued: bool = False,
    ) -> dict[str, Any]:
        """Trains on the examples of these rows in batches, of which the last may be smaller.

        Args:
            data: The examples.
            rows: Rows returned by `data.rows`, or a part of them.
            batch_size: Number of examples per step.
            steps: Number of steps of the whole training, which decides whether compiling pays.
            done: Number of its steps before this call.
            logged: Whether to return what `fit` would log.
            deterministic: Whether the route must not depend on timings.
            continued: Whether metrics include those of the previous call.

        Returns:
            If `logged`, the metrics of this call by name, or the last result of a custom training
            step. Otherwise an empty dict.
        """
        if not continued:
            self._model.reset_metrics()
        batch_size = min(batch_size, len(rows))
        # Only `fit` returns the result of a custom step, so it trains on the last batch.
        own = logged and self.has_own_step
        kept = (len(rows) % batch_size or batch_size) if own else 0
        logs, loops = None, self._loops
        end = done + -(-len(rows) // batch_size)
        with explained(self._model, *(*data.host, None)[:2]):
            while len(rows):
                kinds = self._kinds(data, steps)
                comparison = self._comparisons[kinds[0], batch_size] if kinds else None
                free = len(rows) - kept
                if loops is None or comparison is None or comparison.fit_is_faster or not free:
                    logs = self._fit(data, rows, batch_size)
                    break
                left = steps - end + -(-len(rows) // batch_size)
                due = not deterministic and comparison.is_due(left)
                if due and free >= batch_size:
                    used, logs = self._try_fit(data, rows[:free], batch_size, comparison)
                else:
                    used = self._loop(loops, data, rows[:free], batch_size, comparison, kinds)
                    logs = None
                rows = rows[used:]
        return _as_numbers(logs or self._model.get_metrics_result()) if logged else {}

    @property
    def logs_freely(self) -> bool:
        """True if results of training do not change the route, as those of a custom step do."""
        return self._loops is None or self._why_fit is not None or not self.has_own_step

    @property
    def has_own_step(self) -> bool:
        """True if the model trains by a step, or computes metrics, in a way of its own."""
        return _own_method(self._model, "train_step", "compute_metrics") is not None

    def has_loops(self, data: ArrayDataset, steps: int) -> bool:
        """Returns True if compiled loops may train on these examples, for so many steps."""
        return bool(self._kinds(data, steps))

    def train_with_changes(
        self,
        data: ArrayDataset,
        rows: np.ndarray,
        batch_size: int,
        changes: LoopChanges,
        *,
        steps: int,
    ) -> tuple[int, dict[str, Any]]:
        """Trains like `train`, in compiled loops that also make these changes.

        Args:
            data: The examples.
            rows: Rows returned by `data.rows`, or a part of them.
            batch_size: Number of examples per step.
            changes: The changes, which are told of the steps.
            steps: Number of steps of the whole training, which decides whether compiling pays.

        Returns:
            The number of trained steps, and the metrics by name after all of them. There may be
            fewer steps if a loop cannot be compiled with the changes, or if only `fit` returns the
            result of a custom step. Then the caller has to train the others, and make their
            changes.
        """
        self._model.reset_metrics()
        done = 0
        own = self.has_own_step
        rows = rows[: -(len(rows) % batch_size or batch_size)] if own else rows
        while self._loops is not None and len(rows):
            size = min(batch_size, len(rows))
            compiled_for = (size, changes, data.augment, *data.specification)
            kinds = [
                kind
                for kind in self._kinds(data, steps)
                if (kind, changes) not in self._refused_changes
            ]
            if not kinds:
                break
            compiled = (kinds[0], *compiled_for) in self._compiled
            count = min(len(rows) // size, BLOCK) if compiled else 1
            batches = rows[: count * size].reshape(count, size, rows.shape[1])
            with explained(self._model, *(*data.host, None)[:2]):
                if compiled:
                    first = self._loops.train(data, batches, kinds[0], changes)
                else:
                    kind, errors, first = self._first_possible(
                        self._loops, data, batches, kinds, changes
                    )
                    self._refused_changes.update((kind, changes) for kind in kinds[: len(errors)])
                    if kind is None:
                        warn_once(f"The compiled loop cannot change masks: {errors[-1]}.")
                        break
                    self._compiled.add((kind, *compiled_for))
            changes.note(count, first)
            done += count
            rows = rows[count * size :]
        finished = not own and not len(rows)
        return done, _as_numbers(self._model.get_metrics_result()) if finished else {}

    def evaluate(self, data: ArrayDataset, batch_size: int | None = None) -> dict[str, Any]:
        """Returns the loss and the compiled metrics over all examples, by name.

        Args:
            data: The examples.
            batch_size: Number of examples per step. None for the fixed batch size of the model's
                inputs, or else 1,000, or fewer if examples are large.
        """
        batch_size = batch_size or self._evaluation_batch(data)
        batch_size = shared_batch(self._model, len(data), batch_size)
        check_batches(len(data), batch_size, "evaluation")
        reason = self._why_evaluate
        if reason is None and self._loops is not None:
            try:
                return _as_numbers(self._loops.evaluate(data, batch_size, len(data))[0])
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
        x, y, sample_weight = (*data.host, None, None)[:3]
        with (
            explained(self._model, x, y),
            _keras.kept_on_error(self._model),
            _keras.built_from(self._model, batch_size, (x, y, sample_weight)),
        ):
            results = self._model.evaluate(
                x,
                y,
                sample_weight=sample_weight,
                batch_size=batch_size,
                verbose=0,
                return_dict=True,
            )
        self._why_evaluate = reason
        warn_once(f"Evaluation goes through `evaluate`: {reason}.")
        return _as_numbers(self._in_order(results))

    def _in_order(self, results: dict[str, Any]) -> dict[str, Any]:
        """Returns results in the order of compiled loops; TensorFlow sorts those of `evaluate`."""
        names: list[str] = []
        with contextlib.suppress(Exception):  # Those of a custom step may be of other metrics.
            names = list(self._model.get_metrics_result())
        return {name: results[name] for name in [*names, *results] if name in results}

    def evaluate_groups(self, data: ArrayDataset, group: int) -> list[dict[str, Any]]:
        """Returns what `evaluate` returns for each group of so many successive examples.

        In a compiled loop, one call evaluates all groups on TensorFlow, without the time that each
        call takes besides its arithmetic.
        """
        if self._why_evaluate is None and self._loops is not None:
            batch_size = min(self._evaluation_batch(data), group)
            # If this fails, `evaluate` says why.
            with contextlib.suppress(Exception):
                return [_as_numbers(one) for one in self._loops.evaluate(data, batch_size, group)]
        starts = range(0, len(data), group)
        parts = [data.take(slice(start, start + group)) for start in starts]
        return [self.evaluate(ArrayDataset(part)) for part in parts]

    def _evaluation_batch(self, data: ArrayDataset) -> int:
        fixed = fixed_batch_size(self._model)
        return fixed or min(_EVALUATION_BATCH, max(1, int(_EVALUATION_BYTES / data.bytes_each)))

    def _kinds(self, data: ArrayDataset, steps: int) -> tuple[str, ...]:
        """Returns the kinds of loops to try, best one first. Empty if only `fit` is possible."""
        reason = self._why_fit
        if reason is None and not isinstance(data.augment, Hashable):
            reason = f"{type(data.augment).__name__} is not hashable"
        if reason is not None or self._loops is None:
            warn_once(f"Training goes through `fit`: {reason}.")
            if apart := trains_apart():
                warn_once(apart)
            return ()
        return tuple(kind for kind in self._loops.kinds(steps) if kind not in self._refused)

    def _loop(
        self,
        loops: CompiledLoops,
        data: ArrayDataset,
        rows: np.ndarray,
        batch_size: int,
        comparison: _PaceComparison,
        kinds: tuple[str, ...],
    ) -> int:
        """Trains on a block of batches, and returns the number of rows."""
        size = min(batch_size, len(rows))
        compiled_for = (size, data.augment, *data.specification)
        if (kinds[0], *compiled_for) not in self._compiled:
            kind = self._begin(loops, data, rows[:size], kinds)
            self._compiled.add((kind, *compiled_for))
            return size
        count = min(comparison.block, len(rows) // size)
        batches = rows[: count * size].reshape(count, size, rows.shape[1])
        started = time.perf_counter()
        loops.train(data, batches, kinds[0])
        if size == batch_size:
            comparison.note_loop(time.perf_counter() - started, count)
        return count * size

    def _begin(
        self, loops: CompiledLoops, data: ArrayDataset, batch: np.ndarray, kinds: tuple[str, ...]
    ) -> str:
        """Trains on one batch with the first kind of loop that can be compiled, or with `fit`."""
        kind, errors, _ = self._first_possible(loops, data, batch[None], kinds)
        if kind is None:
            kind = "fit"
            # If the call is wrong and not the model, this fails as well, and nothing has changed.
            self._fit(data, batch, len(batch))
            self._why_fit = errors[-1]
        self._refused.update(kinds[: len(errors)])
        return kind

    def _first_possible(
        self,
        loops: CompiledLoops,
        data: ArrayDataset,
        batches: np.ndarray,
        kinds: Sequence[str],
        changes: LoopChanges | None = None,
    ) -> tuple[str | None, list[str], np.ndarray]:
        """Trains with the first kind of loop that can be compiled.

        Returns:
            The kind, or None if there is none, the errors of the kinds before it, and the steps of
            events.
        """
        # Not `iterations`, which counts every k-th batch if k gradients are accumulated.
        before = read_clocks(self._model.optimizer)
        errors: list[str] = []
        for kind in kinds:
            try:
                _keras.symbolic_build(self._model, data.take(batches[0, :, 0]))
                first = loops.train(data, batches, kind, changes)
            except Exception as error:
                if read_clocks(self._model.optimizer) != before:
                    raise
                errors.append(f"{type(error).__name__}: {error}")
            else:
                return kind, errors, first
        return None, errors, np.zeros(0, "int32")

    def _fit(
        self, data: ArrayDataset, rows: np.ndarray, batch_size: int, **kwargs: Any
    ) -> dict[str, Any]:
        """Trains through `fit`, and returns its logs."""
        examples = max(len(data), int(settings.part_bytes / data.bytes_each))
        part = max(1, examples // batch_size) * batch_size
        history = None
        for start in range(0, len(rows), part):
            x, *targets = data.augmented(rows[start : start + part], batch_size)
            check_equal_parts(self._model, min(batch_size, len(rows) - start))
            y, sample_weight = (*targets, None, None)[:2]
            with (
                _part_of_training(self._model),
                _keras.kept_on_error(self._model),
                _keras.built_from(self._model, batch_size, (x, y, sample_weight)),
            ):
                history = self._model.fit(
                    x,
                    y,
                    sample_weight=sample_weight,
                    batch_size=batch_size,
                    shuffle=False,
                    verbose=0,
                    **kwargs,
                )
        # A custom `fit` may return anything.
        logs = getattr(history, "history", {})
        return {name: values[-1] for name, values in logs.items()}

    def _try_fit(
        self, data: ArrayDataset, rows: np.ndarray, batch_size: int, comparison: _PaceComparison
    ) -> tuple[int, dict[str, Any]]:
        """Trains some steps through `fit` and measures them; returns the rows and the logs."""
        trial = max(settings.trial_steps, 4 * self._model.steps_per_execution)
        count = min(trial, len(rows) // batch_size)
        first = _FirstStep()
        started = time.perf_counter()
        logs = self._fit(data, rows[: count * batch_size], batch_size, callbacks=[first])
        ended = time.perf_counter()
        if comparison.fit_tried:
            comparison.note_fit(ended - started, count)
        else:
            comparison.note_fit(ended - first.ended, max(0, count - first.steps))
        if comparison.fit_steps >= trial // 2:
            comparison.settle()
            _logger.info(
                "%s: %.3f ms a step in a compiled loop, %.3f in `fit`.",
                self._model.name,
                1e3 * comparison.loop_pace,
                1e3 * comparison.fit_pace,
            )
        return count * batch_size, logs


@dataclasses.dataclass
class _PaceComparison:
    """A comparison between a compiled loop and `fit`: steps and seconds of each so far."""

    block: int = 1
    loop_seconds: float = 0.0
    loop_steps: int = 0
    fit_seconds: float = 0.0
    fit_steps: int = 0
    fit_tried: bool = False
    settled: bool = False
    fit_is_faster: bool = False

    def note_loop(self, seconds: float, steps: int) -> None:
        self.loop_seconds += seconds
        self.loop_steps += steps
        if steps == self.block and seconds < _BLOCK_SECONDS:
            self.block = min(2 * steps, BLOCK)

    def note_fit(self, seconds: float, steps: int) -> None:
        self.fit_seconds += seconds
        self.fit_steps += steps
        self.fit_tried = True

    def is_due(self, left: int) -> bool:
        """Returns whether a comparison with `fit` is worth its time.

        It costs about `settings.patience` seconds. The loop must have run for longer. Either the
        rest of this training would take longer as well, or many trainings have taken so long
        together that the cost does not matter.

        Args:
            left: Number of steps until this training ends.
        """
        if self.settled or self.loop_seconds <= settings.patience:
            return False
        rest = left * self.loop_pace
        return rest > settings.patience or self.loop_seconds > _CERTAIN * settings.patience

    @property
    def loop_pace(self) -> float:
        """Seconds per step in the loop."""
        return self.loop_seconds / self.loop_steps

    @property
    def fit_pace(self) -> float:
        """Seconds per step in `fit`."""
        return self.fit_seconds / self.fit_steps

    def settle(self) -> None:
        self.settled = True
        self.fit_is_faster = self.fit_pace < _MARGIN * self.loop_pace


class _FirstStep(keras.callbacks.Callback):
    """Records when the first execution of `fit`, which compiles, has ended."""

    # Otherwise Keras would wait for the results of every step.
    async_safe = True

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0
        self.ended = 0.0

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if not self.steps:
            self.steps = batch + 1
            self.ended = time.perf_counter()


def engine_of(model: keras.Model) -> Engine:
    """Returns the engine of a compiled model, or a new one if its graph has changed."""
    # `compile()` and all changes of the model's graph reset `train_function`, so functions made for
    # an older one are stale.
    # Under a distribution, Keras on JAX lays out a function for the state that the model has when
    # it is made: `fit` makes it after metrics and slots.
    if model.train_function is None and keras.distribution.distribution() is None:
        model.make_train_function()
    kept = kept_beside(model)
    engine = kept.get("engine")
    if engine is None or engine.train_function is not model.train_function:
        engine = kept["engine"] = Engine(model)
    return engine


def fixed_batch_size(model: keras.Model) -> int | None:
    """Returns the batch size that the inputs of a model have, or None if they take any."""
    inputs = getattr(model, "inputs", None)
    return inputs[0].shape[0] if inputs else None


def warn_once(text: str) -> None:
    """Logs a warning, once per process for each text."""
    if text not in _said:
        _said.add(text)
        _logger.warning(text)


def _why_no_loops(model: keras.Model) -> str | None:
    """Returns why the model cannot use compiled loops at all, or None."""
    backend = keras.backend.backend()
    if backend not in COMPILED_LOOPS:
        return f"there is no compiled loop for Keras on {backend}"
    if model.run_eagerly:
        return "the model is compiled with run_eagerly=True"
    if backend == "jax" and not model.jit_compile:
        return "the model is compiled with jit_compile=False"
    return why_distributed(model)


def _why_fit(model: keras.Model) -> str | None:
    """Returns why the model's training steps cannot use a compiled loop, or None."""
    if not isinstance(model.optimizer, keras.Optimizer):
        return "the model is compiled without an optimizer of Keras"
    return _own_method(model, "fit", "make_train_function")


def _why_evaluate(model: keras.Model) -> str | None:
    """Returns why the model's evaluation cannot use a compiled loop, or None."""
    # Only `evaluate` returns the result of a custom step.
    return _own_method(model, "evaluate", "make_test_function", "test_step", "compute_metrics")


def _own_method(model: keras.Model, *names: str) -> str | None:
    """Returns a message about a method that is not Keras' own, or None."""
    for name in names:
        if not (getattr(model, name).__module__ or "").startswith("keras."):
            return f"{type(model).__name__} has a custom `{name}`"
    return None


def _as_numbers(results: dict[str, Any]) -> dict[str, Any]:
    """Returns the results as Python numbers, or as NumPy arrays if they have several values."""
    numbers = {}
    for name, value in results.items():
        value = keras.ops.convert_to_numpy(value) if keras.ops.is_tensor(value) else value
        numbers[name] = value.item() if getattr(value, "size", 0) == 1 else value
    return numbers


@contextlib.contextmanager
def _part_of_training(model: keras.Model) -> Iterator[None]:
    """Makes `fit` continue with the metrics, and not replace the weights by averages.

    Otherwise `fit` resets the metrics and finalizes the weights, as in a separate training.
    """
    with contextlib.ExitStack() as stack:
        owners = [(model, "reset_metrics")]
        if isinstance(model.optimizer, keras.Optimizer):
            owners.append((model.optimizer, "finalize_variable_values"))
        for owner, name in owners:
            stack.enter_context(_keras.replaced(owner, name, lambda *args: None))
        yield
