"""Training on data in memory, for an exact number of steps or for epochs, in compiled loops."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.checks import check_compiled, reason_in
from lottery_ticket_pruner.targets import explained
from lottery_ticket_pruner.training.augmentation import Augmentation
from lottery_ticket_pruner.training.dataset import ArrayDataset, Arrays
from lottery_ticket_pruner.training.devices import check_batches, check_equal_parts, shared_batch
from lottery_ticket_pruner.training.engine import engine_of, fixed_batch_size, warn_once
from lottery_ticket_pruner.training.fit_arguments import split_off, weighted
from lottery_ticket_pruner.training.late_training import Trainee
from lottery_ticket_pruner.training.plans import (
    EpochPlan,
    Listeners,
    TrainingPlan,
    check_validation_batch,
)
from lottery_ticket_pruner.training.step_callback import StepCallback, acts_on_batches
from masked_layers import randomness


@dataclasses.dataclass
class History:
    """The history of one call of `train`: validation results after each stretch, and the time.

    Results are numbers, or arrays for metrics with several values, such as one per class. Notes say
    if only the weights of a sparse model that are left were trained, or why all in a long training.
    """

    steps: list[int] = dataclasses.field(default_factory=list)
    validation: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def early_stop(self) -> int | None:
        """Returns the index in `steps` of the first smallest validation loss.

        NaN counts as larger than every number. If all losses are NaN, returns the first index.
        """
        losses = [result["loss"] for result in self.validation]
        return min(range(len(losses)), key=lambda i: (np.isnan(losses[i]), losses[i]), default=None)


def train(
    model: keras.Model,
    x: Arrays,
    y: Arrays | None,
    *,
    steps: int,
    batch_size: int,
    sample_weight: Arrays | None = None,
    seed: int | Sequence[int] = 0,
    eval_every: int | None = None,
    validation_data: tuple[Arrays, ...] | None = None,
    validation_batch_size: int | None = None,
    on_progress: Callable[[int], object] | None = None,
    on_evaluation: Callable[[int, dict[str, Any]], object] | None = None,
    augment: Augmentation | None = None,
    deterministic: bool = False,
) -> History:
    """Trains a compiled model for exactly `steps` optimizer steps.

    The order of the examples depends only on `seed`, not on earlier training; see `batch_order`.

    Class labels must be in range. Keras on TensorFlow raises an error for others on a CPU, but in
    loops compiled by XLA, as on JAX, they make the loss NaN.

    Args:
        model: A compiled model. Training continues from its optimizer's state.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        y: Targets, in one of the same forms. None if the model adds its loss itself.
        steps: Number of batches to train on, at least 0.
        batch_size: Number of examples per step.
        sample_weight: One weight per example, or None.
        seed: Seed for the order of the examples, in any form that `numpy.random.default_rng` takes.
        eval_every: Number of steps between evaluations on `validation_data`. None to evaluate only
            after the last step.
        validation_data: Data `(x, y)` or `(x, y, sample_weight)` to evaluate on, or None.
        validation_batch_size: Number of examples per step of an evaluation, as in `evaluate`.
        on_progress: Function that is called with the number of new steps, after each stretch.
        on_evaluation: Function that is called with the number of steps so far and the results,
            after each evaluation.
        augment: Augmentation of the inputs of each batch, which must be a single array of images.
            Its random numbers depend only on `seed` as well.
        deterministic: Whether the choice between compiled loop and `fit` must not depend on timing,
            so that repeated runs round in the same way.

    Raises:
        ValueError: If the model is not compiled, a number is out of range, or arrays differ in
            length or are empty.
    """
    check_compiled(model, "using it")
    plan = TrainingPlan(
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        eval_every=eval_every,
        validation_batch_size=validation_batch_size,
        augment=augment,
        deterministic=deterministic,
    )
    if steps == 0:
        return History()
    data = ArrayDataset.of(x, y, sample_weight, augment)
    validation = held_out(model, data, "validation_data", validation_data)
    listeners = Listeners(on_progress=on_progress, on_evaluation=on_evaluation)
    return train_by_plan(model, data, plan, validation, listeners)


def train_by_plan(
    model: keras.Model,
    data: ArrayDataset,
    plan: TrainingPlan,
    validation: ArrayDataset | None = None,
    listeners: Listeners | None = None,
) -> History:
    """Trains a model like `train`, with the arguments as a plan.

    Args:
        model: A compiled model.
        data: Examples to train on, with the augmentation of the plan.
        plan: The training plan.
        validation: Examples to evaluate on, or None.
        listeners: Functions to call during the training.
    """
    history = History()
    if plan.steps == 0:
        return history
    check_batches(plan.batch_size, plan.batch_size)
    if validation is not None:
        check_batches(len(validation), len(validation), "validation")
    listeners = listeners or Listeners()
    started = time.perf_counter()
    order = batch_order(len(data), plan.steps, plan.batch_size, plan.seed)
    # In advance, because random numbers must not depend on the number of evaluations.
    rows = data.rows(order.ravel(), randomness.stream("augmentation", plan.seed))
    stretch = plan.eval_every or plan.steps
    trainee = Trainee(model, plan.steps, plan.batch_size)
    try:
        for start in range(0, plan.steps, stretch):
            done = min(start + stretch, plan.steps)
            last, results = done == plan.steps, None
            logs = trainee.train(
                data,
                rows[start * plan.batch_size : done * plan.batch_size],
                plan.batch_size,
                steps=plan.steps,
                done=start,
                deterministic=plan.deterministic,
                logged=listeners.on_training is not None and engine_of(model).logs_freely,
            )
            if last:
                trainee.write()
                _finalize(model)
            if validation is not None:
                history.steps.append(done)
                results = trainee.evaluator.evaluate(validation, plan.validation_batch_size)
                history.validation.append(results)
            if listeners.listen:
                trainee.write()
                if listeners.call(done, done - start, results, logs, last=last):
                    _finalize(model)
                    break
                if not last:
                    trainee.read()
    finally:
        trainee.write()
    history.notes = trainee.notes
    history.seconds = time.perf_counter() - started
    return history


def fit(
    model: keras.Model,
    x: Arrays,
    y: Arrays | None = None,
    *,
    batch_size: int = 32,
    epochs: int = 1,
    sample_weight: Arrays | None = None,
    class_weight: Mapping[int, float] | None = None,
    validation_split: float = 0.0,
    validation_data: tuple[Arrays, ...] | None = None,
    validation_batch_size: int | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    shuffle: bool = True,
    seed: int = 0,
    verbose: int = 0,
    deterministic: bool = False,
) -> keras.callbacks.History:
    """Trains like `model.fit` on arrays, with each epoch as one compiled program where faster.

    Callbacks are called for epochs. `GradualPruning` and `DynamicSparseTraining` change masks
    during epochs: rankings by magnitude are part of the compiled program, and for other changes it
    is left at the steps where they are due. If another callback acts on batches, `model.fit` is
    used, on the same batches. Class labels must be in range, as in `train`.

    If there are several outputs, their logged losses are means over examples; Keras on TensorFlow
    logs means over batches.

    Args:
        model: A compiled model. Training continues from its optimizer's state.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        y: Targets, in one of the same forms. None if the model adds its loss itself.
        batch_size: Number of examples per step. The last batch of an epoch may be smaller.
        epochs: Number of epochs.
        sample_weight: One weight per example, or None.
        class_weight: Weights by class index, for one array of targets: class indices or one-hot
            rows. It excludes `sample_weight`, and does not apply to validation data.
        validation_split: Share of the examples to evaluate on after every epoch: the last ones,
            before shuffling. Ignored with `validation_data`.
        validation_data: Data `(x, y)` or `(x, y, sample_weight)` to evaluate on after every epoch.
        validation_batch_size: Number of examples per step of an evaluation. None for `batch_size`.
        callbacks: Callbacks, as for `model.fit`.
        shuffle: Whether to shuffle every epoch, in an order that depends only on `seed` and the
            number of the epoch.
        seed: A non-negative integer.
        verbose: 0 for no output, 1 for a progress bar, 2 for a line per epoch.
        deterministic: Whether the choice between compiled loop and `fit` must not depend on timing.

    Returns:
        A Keras `History` with the logs of every epoch.

    Raises:
        ValueError: If the model is not compiled, a number is out of range, or arrays differ in
            length or are empty.
    """
    check_compiled(model, "using it")
    plan = EpochPlan(
        batch_size=batch_size,
        epochs=epochs,
        validation_batch_size=validation_batch_size,
        callbacks=list(callbacks),
        shuffle=shuffle,
        seed=seed,
        verbose=verbose,
        deterministic=deterministic,
    )
    data = ArrayDataset.of(x, y, sample_weight)
    validation = held_out(model, data, "validation_data", validation_data)
    if validation_split and validation is None:
        data, validation = split_off(data, validation_split)
    if class_weight is not None:
        data = weighted(data, class_weight)
    check_batches(len(data), plan.batch_size)
    if validation is not None:
        size = plan.validation_batch_size or plan.batch_size
        check_batches(len(validation), size, "validation")
    slow = [type(callback).__name__ for callback in plan.callbacks if acts_on_batches(callback)]
    if slow:
        warn_once(f"Training goes through `fit`: {', '.join(slow)} acts on batches.")
        return _fit_by_keras(model, data, plan, validation)
    steps = plan.epochs * plan.steps_per_epoch(len(data))
    if _step_callbacks(plan) and not engine_of(model).has_loops(data, steps):
        return _fit_by_keras(model, data, plan, validation)
    return _fit_in_loops(model, data, plan, validation)


def _fit_by_keras(
    model: keras.Model, data: ArrayDataset, plan: EpochPlan, validation: ArrayDataset | None
) -> keras.callbacks.History:
    """Trains by the model's own `fit`, on the same batches as `_fit_in_loops`."""
    check_equal_parts(model, min(plan.batch_size, len(data)))
    size = plan.validation_batch_size or plan.batch_size
    if validation is not None:
        size = shared_batch(model, len(validation), size)
    batches = _Batches(data, plan)
    start = keras.callbacks.LambdaCallback(on_epoch_begin=batches.start)
    with (
        explained(model, *(*data.host, None)[:2]),
        _keras.kept_on_error(model),
        _keras.built_from(model, plan.batch_size, data.host),
    ):
        return model.fit(
            batches,
            epochs=plan.epochs,
            validation_data=None if validation is None else validation.host,
            validation_batch_size=size,
            callbacks=[start, *plan.callbacks],
            shuffle=False,
            verbose=plan.verbose,
        )


def _fit_in_loops(
    model: keras.Model, data: ArrayDataset, plan: EpochPlan, validation: ArrayDataset | None
) -> keras.callbacks.History:
    """Trains every epoch by the engine, and calls the callbacks."""
    batches = _Batches(data, plan)
    callbacks = list(plan.callbacks)
    histories = [c for c in callbacks if isinstance(c, keras.callbacks.History)]
    history = histories[0] if histories else keras.callbacks.History()
    callbacks += [] if histories else [history]
    chain = keras.callbacks.CallbackList(
        callbacks,
        add_progbar=plan.verbose != 0,
        verbose=plan.verbose,
        epochs=plan.epochs,
        steps=len(batches),
    )
    chain.set_model(model)
    model.stop_training = False
    logs = None
    chain.on_train_begin()
    steps = 0 if _step_callbacks(plan) else plan.epochs * len(batches)
    trainee = Trainee(model, steps, plan.batch_size, verbose=plan.verbose != 0)
    for epoch in range(plan.epochs):
        chain.on_epoch_begin(epoch)
        batches.start(epoch)
        logs = _train_epoch(model, trainee, data, data.indices(batches.order), plan, epoch)
        if validation is not None:
            chain.on_test_begin()
            trainee.read()
            size = plan.validation_batch_size or plan.batch_size
            results = trainee.evaluator.evaluate(validation, size)
            chain.on_test_end(results)
            logs |= {f"val_{name}": value for name, value in results.items()}
        chain.on_epoch_end(epoch, logs)
        if model.stop_training:
            break
    if plan.epochs:
        _finalize(model)
    chain.on_train_end(logs)
    model.history = history
    return history


def _train_epoch(
    model: keras.Model,
    trainee: Trainee,
    data: ArrayDataset,
    rows: np.ndarray,
    plan: EpochPlan,
    epoch: int,
) -> dict[str, Any]:
    """Trains an epoch on these rows, and returns its logs."""
    size = plan.batch_size
    steps = plan.steps_per_epoch(len(rows))
    callbacks = _step_callbacks(plan)
    for callback in callbacks:
        callback.on_train_batch_begin(0)
    done = 0
    logs: dict[str, Any] = {}
    if len(callbacks) == 1 and (changes := callbacks[0].changes_in_loop()) is not None:
        done, logs = engine_of(model).train_with_changes(
            data, rows, size, changes, steps=plan.epochs * steps
        )
    trainee.read()
    try:
        while done < steps:
            number = min((c.steps_until_due(steps - done) for c in callbacks), default=steps - done)
            logs = trainee.train(
                data,
                rows[done * size : (done + number) * size],
                size,
                steps=plan.epochs * steps,
                done=epoch * steps + done,
                logged=done + number == steps,
                deterministic=plan.deterministic,
                continued=done > 0,
            )
            done += number
            for callback in callbacks:
                callback.on_train_batch_end(done - 1)
    finally:
        trainee.write()
    return logs


def batch_order(
    examples: int, steps: int, batch_size: int, seed: int | Sequence[int] | None
) -> np.ndarray:
    """Returns the example indices of every batch, int32 of shape `(steps, batch_size)`.

    Shuffled epochs are concatenated and cut into batches. A batch may therefore end one epoch and
    begin the next, and the numbers of uses of any two examples differ by at most one.
    """
    rng = randomness.stream("order of examples", seed)
    epochs = -(-steps * batch_size // examples)
    stream = np.concatenate([rng.permutation(examples).astype("int32") for _ in range(epochs)])
    return stream[: steps * batch_size].reshape(steps, batch_size)


def evaluate(
    model: keras.Model,
    x: Arrays,
    y: Arrays | None = None,
    sample_weight: Arrays | None = None,
    batch_size: int | None = None,
) -> dict[str, Any]:
    """Returns the loss and the compiled metrics over a whole data set, by name.

    Args:
        model: A compiled model.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        y: Targets, in one of the same forms. None if the model adds its loss itself.
        sample_weight: One weight per example, or None.
        batch_size: Number of examples per step. It affects results that are not means over
            examples, such as a loss with `reduction="sum"`, of which Keras takes the mean over
            batches. None for the fixed batch size of the model's inputs, or else 1,000, or fewer
            if examples are large.

    Raises:
        ValueError: If the model is not compiled, `batch_size` is less than 1, or arrays differ in
            length or are empty.
    """
    check_compiled(model, "using it")
    check_validation_batch(batch_size)
    return engine_of(model).evaluate(ArrayDataset.of(x, y, sample_weight), batch_size)


def held_out(
    model: keras.Model, like: ArrayDataset, name: str, data: tuple[Arrays, ...] | None
) -> ArrayDataset | None:
    """Converts validation or test data, and checks early what would fail after a training.

    Args:
        model: A compiled model.
        like: The training data.
        name: Name of the argument, for messages.
        data: `(x, y)` or `(x, y, sample_weight)`, or None.

    Raises:
        ValueError: If arrays differ in length or are empty, or the model or its loss refuses them.
    """
    if data is None:
        return None
    if not isinstance(data, tuple | list) or not 1 <= len(data) <= 3:
        raise ValueError(
            f"Expected `{name}` to be (x, y) or (x, y, sample_weight). Received: "
            + (f"{len(data)} parts" if isinstance(data, tuple | list) else type(data).__name__)
        )
    try:
        examples = ArrayDataset.of(*data)
    except ValueError as error:
        raise ValueError(f"`{name}`: {error}") from error
    if examples.kinds != like.kinds and model.built:
        try:
            with explained(model, *(*examples.host, None)[:2]):
                _run(model, examples)
        except Exception as error:  # Layers and losses raise errors of many types.
            reason = reason_in(str(error)).rstrip(".")
            raise ValueError(
                f"`{name}` does not fit {model.name}: {reason}. Received (x, y): "
                f"{examples.kinds}; training data: {like.kinds}."
            ) from error
    return examples


def _run(model: keras.Model, examples: ArrayDataset) -> None:
    """Runs the model and its loss on a batch, without changing either."""
    x, *rest = examples.take(np.arange(fixed_batch_size(model) or 1) % len(examples))
    y, sample_weight = (*rest, None, None)[:2]
    outputs = model(x, training=False)
    try:
        model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=sample_weight, training=False)
    finally:
        model.reset_metrics()


class _Batches(keras.utils.PyDataset):
    """The batches of an epoch, in an order that depends only on the seed and the epoch.

    Args:
        data: The examples.
        plan: The training plan. The last batch may be smaller.
    """

    def __init__(self, data: ArrayDataset, plan: EpochPlan) -> None:
        super().__init__()
        self._data = data
        self._batch_size = plan.batch_size
        self._steps = plan.steps_per_epoch(len(data))
        self._seed = plan.seed if plan.shuffle else None
        self.start(0)

    def start(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Draws the order of this epoch, because Keras does not count epochs for a data set."""
        count = len(self._data)
        if self._seed is None:
            self.order = np.arange(count)
        else:
            rng = randomness.stream("order of examples", self._seed, epoch)
            self.order = rng.permutation(count)

    def __len__(self) -> int:
        return self._steps

    def __getitem__(self, index: int) -> tuple[Arrays, ...]:
        start = index * self._batch_size
        batch = self._data.take(self.order[start : start + self._batch_size])
        # Not in a list, which TensorFlow would convert to one array.
        return keras.tree.lists_to_tuples(batch)


def _finalize(model: keras.Model) -> None:
    # Other optimizers have no such method, and `fit` ignores them.
    if isinstance(model.optimizer, keras.Optimizer):
        model.optimizer.finalize_variable_values(model.trainable_variables)


def _step_callbacks(plan: EpochPlan) -> list[StepCallback]:
    return [callback for callback in plan.callbacks if isinstance(callback, StepCallback)]
