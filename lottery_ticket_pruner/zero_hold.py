"""Keeps pruned entries of a plain model at zero during training."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.variables import variable_scope
from masked_layers.compiled import remake_function


class ZeroHold:
    """Keeps entries of a plain model's variables at zero during training.

    Optimizers apply the constraint of a variable after each update, inside their own graph. This
    class appends to the constraint, so that entries are zero after every step, on the device and
    with any number of steps per execution. It ends with `release()`.

    Args:
        model: A compiled model, inside `fit`.
        masks: Pairs of a variable and a bool array of its shape, False where entries are zeroed.
    """

    def __init__(
        self, model: keras.Model, masks: Iterable[tuple[keras.Variable, np.ndarray]]
    ) -> None:
        self._model = model
        self._free_function = model.train_function
        self._constraints: list[tuple[keras.Variable, _ZeroConstraint]] = []
        with variable_scope(model):
            for variable, mask in masks:
                left_over = variable.constraint
                if isinstance(left_over, _ZeroConstraint):  # of a `fit` that did not end
                    left_over.hold.release()
                    self._free_function = model.train_function
                constraint = _ZeroConstraint(self, mask, variable.constraint)
                _keras.match_layout(constraint.mask, variable)
                variable.constraint = constraint
                self._constraints.append((variable, constraint))
        self._remake()

    def change(self, masks: Iterable[tuple[keras.Variable, np.ndarray]]) -> None:
        """Changes the masks, from the next step on."""
        of = {id(variable): constraint for variable, constraint in self._constraints}
        for variable, mask in masks:
            of[id(variable)].mask.assign(mask)
        # Compiled functions may contain the masks as constants (JAX).
        self._remake()

    def release(self) -> None:
        """Restores the constraints of the variables and the functions of the model."""
        for variable, constraint in self._constraints:
            if variable.constraint is constraint:
                variable.constraint = constraint.inner
        if self._model.train_function is self._held_function:
            self._model.train_function = self._free_function

    def _remake(self) -> None:
        remake_function(self._model, "train")
        self._held_function = self._model.train_function


class _ZeroConstraint(keras.constraints.Constraint):
    """The original constraint of a variable, followed by zeroing masked entries."""

    def __init__(self, hold: ZeroHold, mask: np.ndarray, inner: Any) -> None:
        self.hold = hold
        self.inner = inner
        self.mask = keras.Variable(mask, dtype="bool", trainable=False, name="free")

    def __call__(self, weight: Any) -> Any:
        weight = zero_pruned(self.mask.value, weight)
        if self.inner is None:
            return weight
        return zero_pruned(self.mask.value, self.inner(weight))


def zero_pruned(mask: Any, weight: Any) -> Any:
    """Returns `where(mask, weight, 0)`. Pruned entries are +0.0 even if they were NaN."""
    weight = ops.convert_to_tensor(weight)
    return ops.where(ops.convert_to_tensor(mask), weight, ops.cast(0, weight.dtype))
