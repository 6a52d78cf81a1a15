"""Training for an exact number of steps, on data in memory, with nothing traced twice.

The one seam between experiments and the way a backend trains fast. On TensorFlow whole stretches
of steps run inside one compiled function around the model's own `train_step`, so that overridden
training steps, metrics, loss scaling and `jit_compile` mean what they mean in `fit`; on JAX and
torch the stretches go through `model.fit`.
"""

import dataclasses
import functools
import operator
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np

_EVALUATION_BATCH = 1_000

# As Keras takes it: an array with the examples along the first axis, or a list or dict of such.
Arrays = Any


@dataclasses.dataclass
class History:
    """What one call of `train` saw: validation results after each stretch, and the time."""

    steps: list[int] = dataclasses.field(default_factory=list)
    validation: list[dict[str, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    @property
    def early_stop(self) -> int | None:
        """Where in `steps` the validation loss was least (the first such), found afterwards."""
        losses = [result["loss"] for result in self.validation]
        return int(np.argmin(losses)) if losses else None


def train(
    model: keras.Model,
    x: Arrays,
    y: Arrays,
    *,
    steps: int,
    batch_size: int,
    seed: int | Sequence[int] = 0,
    eval_every: int | None = None,
    validation_data: tuple[Arrays, Arrays] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> History:
    """Train a compiled model for exactly `steps` optimiser steps.

    The order of the examples is a function of `seed` alone, whatever was trained before: see
    `batch_order`.

    Args:
        model: compiled; its optimiser state continues from where it is.
        x: inputs, the examples along the first axis; or a list or dict of such arrays.
        y: targets, likewise.
        steps: how many batches to train on, at least 0.
        batch_size: examples per step.
        seed: of the order of the examples, anything `numpy.random.default_rng` takes.
        eval_every: steps between evaluations on `validation_data`; None: only after the last.
            A divisor of `steps` spares one compilation.
        validation_data: `(x, y)` to evaluate on, or None to not evaluate.
        on_progress: called with the number of new steps done, after each stretch of them.

    Raises:
        ValueError: the model is not compiled, or a number is out of its range.
    """
    if not getattr(model, "compiled", False):
        raise ValueError(f"{model.name} is not compiled: call compile() before training it.")
    if steps < 0 or batch_size < 1 or (eval_every is not None and eval_every < 1):
        raise ValueError(
            "Expected steps >= 0, batch_size >= 1 and eval_every >= 1 or None. Received: "
            f"steps={steps}, batch_size={batch_size}, eval_every={eval_every}."
        )
    history = History()
    if steps == 0:
        return history
    started = time.perf_counter()
    order = batch_order(len(keras.tree.flatten(x)[0]), steps, batch_size, seed)
    stretch = eval_every or steps
    run = _steps_function(model, x, y)
    for start in range(0, steps, stretch):
        indices = order[start : start + stretch]
        run(indices)
        if validation_data is not None:
            history.steps.append(start + len(indices))
            history.validation.append(evaluate(model, *validation_data))
        if on_progress is not None:
            on_progress(len(indices))
    history.seconds = time.perf_counter() - started
    return history


def batch_order(
    examples: int, steps: int, batch_size: int, seed: int | Sequence[int]
) -> np.ndarray:
    """The example indices of every batch, int32 of shape `(steps, batch_size)`.

    One shuffled epoch after another, cut into batches: a batch may end one epoch and begin the
    next, and no example is seen more than once more often than another.
    """
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch_size // examples)
    stream = np.concatenate([rng.permutation(examples).astype("int32") for _ in range(epochs)])
    return stream[: steps * batch_size].reshape(steps, batch_size)


def compile_options(stretch: int, *, convolutions: bool) -> dict[str, bool | int]:
    """What to hand to `compile` so that `train` is fast with `eval_every=stretch`.

    XLA gains several-fold in small dense networks; convolutions in an XLA loop on a CPU are some
    hundred times slower than outside.
    """
    backend = keras.backend.backend()
    on_gpu = bool(keras.distribution.list_devices("gpu")) if backend == "tensorflow" else False
    return {
        "jit_compile": backend == "jax"
        or (backend == "tensorflow" and (on_gpu or not convolutions)),
        "steps_per_execution": stretch if backend == "jax" else 1,
    }


def evaluate(model: keras.Model, x: Arrays, y: Arrays) -> dict[str, float]:
    """The loss and the compiled metrics over a whole data set, by name."""
    if keras.backend.backend() == "tensorflow":
        results = _tensorflow_functions(model).evaluate(x, y)
    else:
        results = model.evaluate(x, y, batch_size=_EVALUATION_BATCH, verbose=0, return_dict=True)
    return {name: float(value) for name, value in results.items()}


def _steps_function(model: keras.Model, x: Arrays, y: Arrays) -> Callable[[np.ndarray], None]:
    """A function that trains on the batches whose example indices it is given."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        compiled = _tensorflow_functions(model)
        x, y = keras.tree.map_structure(tf.convert_to_tensor, (x, y))
        return lambda indices: compiled.train(x, y, tf.constant(indices))

    def fit(indices: np.ndarray) -> None:
        flat = indices.ravel()
        chosen = keras.tree.map_structure(lambda array: array[flat], (x, y))
        model.fit(*chosen, batch_size=indices.shape[1], shuffle=False, verbose=0)

    return fit


@dataclasses.dataclass(frozen=True)
class _TensorFlowFunctions:
    """Compiled stretches of training and evaluation, for as long as `train_function` is valid."""

    train_function: Callable
    train: Callable
    evaluate: Callable


def _tensorflow_functions(model: keras.Model) -> _TensorFlowFunctions:
    # compile(), and whoever changes what the model's graph computes, resets `train_function`:
    # functions made beside an older one are stale.
    if model.train_function is None:
        model.make_train_function()
    functions = getattr(model, "_lottery_ticket_functions", None)
    if functions is None or functions.train_function is not model.train_function:
        functions = _make_tensorflow_functions(model)
        model._lottery_ticket_functions = functions
    return functions


def _make_tensorflow_functions(model: keras.Model) -> _TensorFlowFunctions:
    import tensorflow as tf

    @tf.function(jit_compile=model.jit_compile)
    def train_stretch(x: Arrays, y: Arrays, order: tf.Tensor) -> None:
        for indices in order:
            batch = functools.partial(tf.gather, indices=indices)
            model.train_step(keras.tree.map_structure(batch, (x, y)))

    @tf.function
    def evaluate_all(x: Arrays, y: Arrays) -> dict[str, tf.Tensor]:
        for metric in model.metrics:
            metric.reset_state()
        examples = tf.shape(keras.tree.flatten(x)[0])[0]
        for start in tf.range(0, examples, _EVALUATION_BATCH):
            batch = operator.itemgetter(slice(start, start + _EVALUATION_BATCH))
            model.test_step(keras.tree.map_structure(batch, (x, y)))
        return model.get_metrics_result()

    return _TensorFlowFunctions(model.train_function, train_stretch, evaluate_all)
