"""Callbacks for pruned models, and the one that keeps a plain model pruned while it trains."""

from __future__ import annotations

import weakref
from typing import Any

import keras
import numpy as np

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

    They are held there inside the optimizer's own graph, on the device, for any number of steps per
    execution, and so during validation too. The hold ends with the training. New masks, computed by
    another callback while the model trains, hold from the next batch on.

    A masked model needs no callback: its masks act in every forward pass. There this one does no
    more than what `use_dwr` asks for. Two things differ between the two kinds of model: the
    gradients of pruned weights of a plain model still count where an optimizer clips by their
    global norm, and are still averaged where one keeps moving averages of the weights. List the
    callback after `keras.callbacks.SwapEMAWeights`.

    Args:
        pruner: The pruner that computed the masks.
        use_dwr: Whether to rescale what is left of each layer as
            `LotteryTicketPruner.apply_dwr` does, when training starts and when the masks change.
            Weights that another callback restores then are not rescaled twice. Of weights that you
            load yourself in another process the pruner has to know: save and load it with them.

    Example:
    ```python
    pruner.calc_prune_mask(model, 0.5, "large_final")
    model.fit(x, y, callbacks=[PrunerCallback(pruner)])
    ```
    """

    def __init__(self, pruner: LotteryTicketPruner, use_dwr: bool = False) -> None:
        super().__init__()
        self.pruner = pruner
        self.use_dwr = use_dwr
        self._hold: zero_hold.ZeroHold | None = None
        self._begun, self._before = False, None  # The second: weights before any callback began.

    def set_model(self, model: keras.Model) -> None:
        """Notes the weights that are there before another callback restores others."""
        super().set_model(model)
        self._before = None
        if self.use_dwr and model is not None and not is_masked(model):
            ml.sync(model)
            self._before = model.get_weights()

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Zeroes the pruned weights and holds them there."""
        self._begun = False
        if self._before is not None:
            self._rescale_what_was_before()
        self._apply()  # first: it checks the model
        if not is_masked(self.model):
            self._hold = zero_hold.ZeroHold(self.model, self.pruner.held_masks(self.model))
            # A `fit` that fails calls no `on_train_end`.
            weakref.finalize(self, self._hold.release).atexit = False

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Takes over masks that changed since the last batch."""
        changed = self.pruner.masks_version != self._version
        if changed or not self._begun:  # other callbacks may have brought weights when they began
            self._apply()
            self._begun = True
        if changed and self._hold is not None:
            self._hold.change(self.pruner.held_masks(self.model))

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Zeroes what another callback may have brought back for the validation."""
        if self._hold is not None:
            self.pruner.apply_pruning(self.model)

    def on_train_end(self, logs: dict[str, Any] | None = None) -> None:
        """Ends the hold; an optimizer may have put averages in place of the weights just now."""
        if self._hold is not None:
            self._hold.release()
            self._hold = None
            self.pruner.apply_pruning(self.model)

    def _rescale_what_was_before(self) -> None:
        """Lets the pruner tell whether weights restored since have the factor in them already."""
        before, now, self._before = self._before, self.model.get_weights(), None
        same_shapes = [a.shape for a in before] == [a.shape for a in now]
        if same_shapes and not all(map(np.array_equal, before, now)):
            with overrides.weights_replaced(self.model, before):
                self._apply()

    def _apply(self) -> None:
        self.pruner.apply_pruning(self.model)
        if self.use_dwr:
            self.pruner.apply_dwr(self.model)
        self._version = self.pruner.masks_version
