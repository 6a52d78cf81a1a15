"""Callbacks for pruned models, and the one that keeps a plain model pruned while it trains."""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import overrides, zero_hold
from lottery_ticket_pruner.mask_schedules import (
    DynamicSparseTraining,
    GradualPruning,
    MaskSchedule,
)
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.records import is_masked

__all__ = ["DynamicSparseTraining", "GradualPruning", "MaskSchedule", "PrunerCallback"]


class PrunerCallback(keras.callbacks.Callback):
    """Keeps the pruned weights of a plain model at zero after every batch of `fit`.

    They are kept at zero inside the optimizer's own graph, on the device, so this works with any
    number of steps per execution and during validation. It ends with the training. If another
    callback computes new masks during training, they apply from the next batch on.

    A masked model needs no such callback, because its masks act in every forward pass; here only
    `use_dwr` has an effect. Plain and masked models differ in two ways: in a plain model, gradients
    of pruned weights count when an optimizer clips by global norm, and pruned weights are averaged
    when an optimizer keeps moving averages of weights. Place this callback after
    `keras.callbacks.SwapEMAWeights`.

    Args:
        pruner: The pruner that computed the masks.
        use_dwr: Whether to rescale the kept weights of each layer, as
            `LotteryTicketPruner.apply_dwr` does, when training starts and when the masks change.
            Weights that another callback restores with the state of the optimizer, as
            `keras.callbacks.BackupAndRestore` does, count as rescaled. If you load rescaled weights
            in another process, save and load the pruner with them.

    Example:
    ```python
    pruner.calc_prune_mask(model, 0.5, "large_final")
    model.fit(x, y, callbacks=[PrunerCallback(pruner)])
    ```
    """

    def __init__(self, pruner: LotteryTicketPruner, use_dwr: bool = False) -> None:
        super().__init__()
        if not isinstance(pruner, LotteryTicketPruner):
            raise TypeError(f"Expected a `LotteryTicketPruner`. Received: {pruner!r}")
        self.pruner = pruner
        self.use_dwr = use_dwr
        self._hold: zero_hold.ZeroHold | None = None
        self._begun = False
        self._before: list[np.ndarray] | None = None  # Weights before any callback began.
        self._steps: int | None = None  # Those of the optimizer, when the weights were last seen.

    def set_model(self, model: keras.Model) -> None:
        """Records the current weights, before another callback restores others."""
        super().set_model(model)
        self._before = None
        if self.use_dwr and model is not None and not is_masked(model):
            ml.sync(model)
            self._before = model.get_weights()
            self._steps = self._optimizer_steps()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Zeroes the pruned weights and keeps them at zero."""
        self._begun = False
        before, self._before = self._before, None
        if before is not None:
            self._rescale(before)
        self._apply()  # First, because it checks the model.
        self._steps = self._optimizer_steps()
        if not is_masked(self.model):
            self._hold = zero_hold.ZeroHold(self.model, self.pruner.held_masks(self.model))
            # A `fit` that fails calls no `on_train_end`.
            weakref.finalize(self, self._hold.release).atexit = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Applies masks that have changed since the last batch."""
        changed = self.pruner.masks_version != self._version
        if changed or not self._begun:  # other callbacks may have restored weights
            if not self._begun:
                self._note_restored()
            self._apply()
            self._begun = True
        if changed and self._hold is not None:
            self._hold.change(self.pruner.held_masks(self.model))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Zeroes pruned weights that another callback may have restored for the validation."""
        if self._hold is not None:
            self.pruner.apply_pruning(self.model)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Zeroes pruned weights once more, since the optimizer may write averages at the end."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None
            self.pruner.apply_pruning(self.model)
            if self.use_dwr:
                self.pruner.remember_rescaled(self.model)

    def _rescale(self, before: list[np.ndarray]) -> None:
        """Rescales weights restored since `before`, unless they contain the factor already."""
        now = self.model.get_weights()
        same_shapes = [a.shape for a in before] == [a.shape for a in now]
        if same_shapes and not all(map(np.array_equal, before, now)):
            with overrides.weights_replaced(self.model, before):
                self._apply()
            self._note_restored()

    def _note_restored(self) -> None:
        """Remembers that weights are rescaled which were restored with the optimizer's state.

        They come from a training with this callback, unlike weights alone, which may come from
        anywhere.
        """
        if self.use_dwr and not is_masked(self.model) and self._optimizer_steps() != self._steps:
            self.pruner.remember_rescaled(self.model)

    def _optimizer_steps(self) -> int | None:
        if self.model.optimizer is None:  # in a loop of the user's
            return None
        ml.sync(self.model)
        return int(ops.convert_to_numpy(self.model.optimizer.iterations))

    def _apply(self) -> None:
        self.pruner.apply_pruning(self.model)
        if self.use_dwr:
            self.pruner.apply_dwr(self.model)
        self._version = self.pruner.masks_version
