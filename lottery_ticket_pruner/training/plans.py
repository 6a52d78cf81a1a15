"""Training plans: how long to train, on which batches, and functions to call along the way."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras

from lottery_ticket_pruner import checks
from lottery_ticket_pruner.training.augmentation import Augmentation


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """A training for a number of steps: arguments of `training.train`.

    Raises:
        ValueError: If a number is out of range.
    """

    steps: int
    batch_size: int
    seed: int | Sequence[int] | None = 0
    eval_every: int | None = None
    validation_batch_size: int | None = None
    augment: Augmentation | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_integer("steps", self.steps)
        check_integer("batch_size", self.batch_size)
        every = 1 if self.eval_every is None else self.eval_every
        check_integer("eval_every", every)
        if self.steps < 0 or self.batch_size < 1 or every < 1:
            raise ValueError(
                "Expected steps >= 0, batch_size >= 1 and eval_every >= 1 or None. Received: "
                f"steps={self.steps}, batch_size={self.batch_size}, eval_every={self.eval_every}."
            )
        check_validation_batch(self.validation_batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EpochPlan:
    """A training for a number of epochs: arguments of `training.fit`.

    Raises:
        ValueError: If a number is out of range.
    """

    batch_size: int = 32
    epochs: int = 1
    validation_batch_size: int | None = None
    callbacks: Sequence[keras.callbacks.Callback] = ()
    shuffle: bool = True
    seed: int = 0
    verbose: int = 0
    deterministic: bool = False

    def __post_init__(self) -> None:
        check_integer("epochs", self.epochs)
        check_integer("batch_size", self.batch_size)
        if self.epochs < 0 or self.batch_size < 1:
            raise ValueError(
                "Expected epochs >= 0 and batch_size >= 1. Received: "
                f"epochs={self.epochs}, batch_size={self.batch_size}."
            )
        check_validation_batch(self.validation_batch_size)

    def steps_per_epoch(self, examples: int) -> int:
        """Returns the number of batches of so many examples; the last one may be smaller."""
        return -(-examples // self.batch_size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Listeners:
    """Functions that are called during a training: arguments of `training.train`, and two more.

    `ends` is called with the number of steps so far after each stretch but the last, and ends the
    training if it returns True. `on_training` is called before `on_evaluation` with the number of
    steps so far, and the loss and metrics on the examples of the stretch, as `fit` logs them. They
    are left out if a custom training step returns them, which would have to be called by `fit`.
    """

    on_progress: Callable[[int], object] | None = None
    on_evaluation: Callable[[int, dict[str, Any]], object] | None = None
    ends: Callable[[int], bool] | None = None
    on_training: Callable[[int, dict[str, Any]], object] | None = None

    @property
    def listen(self) -> bool:
        """True if there is a function to call."""
        return any((self.on_progress, self.on_evaluation, self.ends, self.on_training))

    def call(
        self,
        done: int,
        new: int,
        results: dict[str, Any] | None,
        logs: dict[str, Any],
        *,
        last: bool,
    ) -> bool:
        """Calls the functions after a stretch, and returns whether the training ends early.

        Args:
            done: Number of steps so far.
            new: Number of steps in the stretch.
            results: Results of the evaluation, or None.
            logs: Results on the examples of the stretch, if `on_training` is to be called.
            last: Whether it was the last stretch.
        """
        if self.on_training is not None:
            self.on_training(done, logs)
        if self.on_evaluation is not None and results is not None:
            self.on_evaluation(done, results)
        if self.on_progress is not None:
            self.on_progress(new)
        return not last and self.ends is not None and self.ends(done)


def check_integer(name: str, value: Any, kind: str = "an integer") -> None:
    """Checks that an argument is an integer.

    Raises:
        ValueError: If it is not. The message says that it must be of this kind.
    """
    if not checks.is_integer(value):
        raise ValueError(f"`{name}` must be {kind}. Received: {name}={value!r}.")


def check_validation_batch(size: int | None) -> None:
    """Checks a batch size for evaluation.

    Raises:
        ValueError: If it is less than 1.
    """
    if size is not None and size < 1:
        raise ValueError(f"Expected a batch size of at least 1 for evaluation. Received: {size}.")
