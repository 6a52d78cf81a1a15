"""Callbacks that act after certain steps only, so that the steps between run in compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import keras
import numpy as np

from lottery_ticket_pruner import optimizers
from lottery_ticket_pruner.checks import is_integer
from masked_layers import workers
from masked_layers.types import Tensor


class LoopChanges(Protocol):
    """Changes of variables that a compiled loop makes itself, after its training steps.

    Equal objects make the same changes, so that a loop is compiled for them once.

    Attributes:
        read: Variables whose values the changes depend on.
        written: Variables that change.
        events: Number of events that `compute` reports.
    """

    read: Sequence[keras.Variable]
    written: Sequence[keras.Variable]
    events: int

    def __hash__(self) -> int: ...

    def rows(self, steps: int) -> np.ndarray:
        """Returns what `compute` needs after each of the next steps: int32, `(steps, columns)`."""

    def compute(
        self, row: Tensor, read: Sequence[Tensor], written: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor]:
        """Returns the new values of `written`, and a 1-D bool tensor of events.

        Called while the loop is traced, with the values of the variables at this step.
        """

    def note(self, steps: int, first: np.ndarray) -> None:
        """Records that the loop has made these steps.

        Args:
            steps: Number of steps.
            first: For each event, the number of the step at which it happened first, counted from
                0. `steps` or more if it did not happen.
        """


class StepCallback(keras.callbacks.Callback):
    """Counts the steps of a training, and acts after those that are due.

    In `training.fit`, the steps between run in the engine. Subclasses implement `_due` and `_act`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._step = 0
        self._unseen = 0  # the first step that has not been checked yet
        self._begun = False

    @property
    def step(self) -> int:
        """Number of training steps so far. Assign to it after rewinding a custom loop."""
        return self._step

    @step.setter
    def step(self, step: int) -> None:
        if step != self._step:
            self._step = self._unseen = step

    def advance(self, steps: int = 1) -> bool:
        """Records that steps were trained since the last call, and acts if that was due.

        If several actions were due in these steps, only the last one is taken.

        Args:
            steps: Number of steps. 0 checks the present step.

        Returns:
            True if the callback has acted.

        Raises:
            ValueError: If `steps` is not such an integer, or inside `strategy.run`.
        """
        workers.check_outside_replicas("advance")
        if not is_integer(steps) or steps < 0:
            raise ValueError(f"`steps` must be a non-negative integer. Received: steps={steps!r}")
        due = self.pass_steps(steps)
        if due is not None:
            self._act(due)
        return due is not None

    def pass_steps(self, steps: int) -> int | None:
        """Counts steps without acting, and returns the last one that was due, or None."""
        self._step += steps
        due = [step for step in range(self._unseen, self._step + 1) if self._due(step)]
        self._unseen = self._step + 1
        return due[-1] if due else None

    def steps_until_due(self, most: int) -> int:
        """Returns the number of steps until the callback has to act next, or else `most`."""
        numbers = range(1, most + 1)
        return next((n for n in numbers if self._due(self._step + n)), most)

    def changes_in_loop(self) -> LoopChanges | None:
        """Returns the actions in a form that compiled loops can take, or None."""
        return None

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Prepares the count for this training."""
        self._begun = False

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Records the step at which the epoch starts."""
        self._epoch_start = self.step

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Reads the count from the optimizer before the first batch, and acts if that is due."""
        # Not in `on_train_begin`, where a later callback may still restore model and optimizer.
        if not self._begun:
            # Not `iterations`, which counts every k-th batch if k gradients are accumulated.
            self.step = max(step for step, _ in optimizers.read_clocks(self.model.optimizer))
            self._epoch_start = self.step - batch
            self._begin()
            self._begun = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Advances to the end of this batch."""
        # The last execution of an epoch may have fewer batches than Keras says.
        # Nor may anything be known of it, in a loop of the user's.
        done = min(batch + 1, (self.params or {}).get("steps") or batch + 1)
        self.advance(self._epoch_start + done - self.step)

    def _begin(self) -> None:
        self.advance(0)

    def _due(self, step: int) -> bool:
        raise NotImplementedError

    def _act(self, step: int) -> None:
        raise NotImplementedError


def acts_on_batches(callback: keras.callbacks.Callback) -> bool:
    """Returns True for callbacks that must be called for every batch."""
    base: type[keras.callbacks.Callback] = keras.callbacks.Callback
    if isinstance(callback, StepCallback):
        base = StepCallback
    if isinstance(callback, keras.callbacks.ModelCheckpoint) and callback.save_freq == "epoch":
        base = keras.callbacks.ModelCheckpoint
    kinds = ("batch", "train_batch", "test_batch")
    names = [f"on_{kind}_{end}" for kind in kinds for end in ("begin", "end")]
    own = [getattr(getattr(callback, name), "__func__", None) for name in names]
    return own != [getattr(base, name) for name in names]
