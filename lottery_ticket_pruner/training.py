"""Training on data in memory, for an exact number of steps or for epochs, at the engine's speed."""

import dataclasses
import time
from collections.abc import Callable, Sequence

import keras
import numpy as np

from lottery_ticket_pruner.augmentation import Augmentation
from lottery_ticket_pruner.engine import Arrays, Examples, engine_of, say_once


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
    sample_weight: Arrays | None = None,
    seed: int | Sequence[int] = 0,
    eval_every: int | None = None,
    validation_data: tuple[Arrays, ...] | None = None,
    on_progress: Callable[[int], None] | None = None,
    augment: Augmentation | None = None,
    deterministic: bool = False,
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
        sample_weight: a weight per example, or None.
        seed: of the order of the examples, anything `numpy.random.default_rng` takes.
        eval_every: steps between evaluations on `validation_data`; None: only after the last.
        validation_data: `(x, y)` or `(x, y, sample_weight)` to evaluate on, or None.
        on_progress: called with the number of new steps done, after each stretch of them.
        augment: what happens to the inputs of each batch, a single array of images; what it draws
            is a function of `seed` too.
        deterministic: choose between the compiled loop and `fit` by what is known of the model,
            never by the clock, so that a repeated run rounds alike.

    Raises:
        ValueError: the model is not compiled, or a number is out of its range.
    """
    _check_compiled(model)
    if steps < 0 or batch_size < 1 or (eval_every is not None and eval_every < 1):
        raise ValueError(
            "Expected steps >= 0, batch_size >= 1 and eval_every >= 1 or None. Received: "
            f"steps={steps}, batch_size={batch_size}, eval_every={eval_every}."
        )
    history = History()
    if steps == 0:
        return history
    started = time.perf_counter()
    data = Examples.of(x, y, sample_weight, augment)
    validation = None if validation_data is None else Examples.of(*validation_data)
    order = batch_order(len(data), steps, batch_size, seed)
    rng = np.random.default_rng(np.random.SeedSequence(seed).spawn(1)[0])
    stretch = eval_every or steps
    for start in range(0, steps, stretch):
        batches = order[start : start + stretch]
        engine_of(model).train(
            data, batches.ravel(), batch_size, steps=steps, rng=rng, deterministic=deterministic
        )
        done = start + len(batches)
        if done == steps:
            model.optimizer.finalize_variable_values(model.trainable_variables)
        if validation is not None:
            history.steps.append(done)
            history.validation.append(engine_of(model).evaluate(validation))
        if on_progress is not None:
            on_progress(len(batches))
    history.seconds = time.perf_counter() - started
    return history


def fit(
    model: keras.Model,
    x: Arrays,
    y: Arrays,
    *,
    batch_size: int = 32,
    epochs: int = 1,
    sample_weight: Arrays | None = None,
    validation_data: tuple[Arrays, ...] | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    shuffle: bool = True,
    seed: int = 0,
    verbose: int = 0,
    deterministic: bool = False,
) -> keras.callbacks.History:
    """Does what `model.fit` does on arrays, each epoch one compiled program where that is faster.

    Callbacks see epochs; with one that acts on batches, the training goes through `model.fit`.

    Args:
        model: compiled; its optimiser state continues from where it is.
        x: inputs, the examples along the first axis; or a list or dict of such arrays.
        y: targets, likewise.
        batch_size: examples per step; the last batch of an epoch has what is left.
        epochs: how often to go through the data.
        sample_weight: a weight per example, or None.
        validation_data: `(x, y)` or `(x, y, sample_weight)` to evaluate on after every epoch.
        callbacks: as for `model.fit`.
        shuffle: whether every epoch has another order, a function of `seed` and its number alone.
        seed: a non-negative integer.
        verbose: as for `model.fit`: 0 is silent, 1 a progress bar, 2 a line per epoch.
        deterministic: as for `train`.

    Returns:
        Keras' `History`, with the logs of every epoch.

    Raises:
        ValueError: the model is not compiled, or a number is out of its range.
    """
    _check_compiled(model)
    if epochs < 0 or batch_size < 1:
        raise ValueError(
            "Expected epochs >= 0 and batch_size >= 1. Received: "
            f"epochs={epochs}, batch_size={batch_size}."
        )
    callbacks = list(callbacks)
    slow = [type(callback).__name__ for callback in callbacks if _acts_on_batches(callback)]
    if slow:
        say_once(f"Training goes through `fit`: {', '.join(slow)} acts on batches.")
        return model.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            sample_weight=sample_weight,
            validation_data=validation_data,
            callbacks=callbacks,
            shuffle=shuffle,
            verbose=verbose,
        )
    data = Examples.of(x, y, sample_weight)
    validation = None if validation_data is None else Examples.of(*validation_data)
    history = next((c for c in callbacks if isinstance(c, keras.callbacks.History)), None)
    if history is None:
        history = keras.callbacks.History()
        callbacks.append(history)
    steps = -(-len(data) // batch_size)
    chain = keras.callbacks.CallbackList(
        callbacks, add_progbar=verbose != 0, verbose=verbose, epochs=epochs, steps=steps
    )
    chain.set_model(model)
    order = np.arange(len(data))
    model.stop_training = False
    logs = None
    chain.on_train_begin()
    for epoch in range(epochs):
        chain.on_epoch_begin(epoch)
        if shuffle:
            order = np.random.default_rng((seed, epoch)).permutation(len(data))
        engine_of(model).train(
            data,
            order,
            batch_size,
            steps=epochs * steps,
            whole=True,
            deterministic=deterministic,
        )
        logs = {name: float(value) for name, value in model.get_metrics_result().items()}
        if validation is not None:
            chain.on_test_begin()
            results = engine_of(model).evaluate(validation)
            chain.on_test_end(results)
            logs |= {f"val_{name}": value for name, value in results.items()}
        chain.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    if epochs:
        model.optimizer.finalize_variable_values(model.trainable_variables)
    chain.on_train_end(logs)
    model.history = history
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


def evaluate(
    model: keras.Model, x: Arrays, y: Arrays, sample_weight: Arrays | None = None
) -> dict[str, float]:
    """The loss and the compiled metrics over a whole data set, by name."""
    return engine_of(model).evaluate(Examples.of(x, y, sample_weight))


def _check_compiled(model: keras.Model) -> None:
    if not getattr(model, "compiled", False):
        raise ValueError(f"{model.name} is not compiled: call compile() before training it.")


def _acts_on_batches(callback: keras.callbacks.Callback) -> bool:
    if isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_freq == "epoch":
        return False
    kinds = ("batch", "train_batch", "test_batch")
    names = [f"on_{kind}_{end}" for kind in kinds for end in ("begin", "end")]
    own = [getattr(getattr(callback, name), "__func__", None) for name in names]
    return own != [getattr(keras.callbacks.Callback, name) for name in names]
