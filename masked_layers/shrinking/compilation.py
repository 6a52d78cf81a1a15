"""Compiles a smaller model as the original is, with what is left of its optimizer's state."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.copying import as_in_use, renew_optimizer

# id of a variable of the smaller model -> {axis: which entries of the original are left}
Cuts = Mapping[int, Mapping[int, np.ndarray]]


def compile_like(model: keras.Model, smaller: keras.Model, cuts: Cuts) -> None:
    """Compiles the smaller model as the original, so that a training goes on where it was.

    Args:
        model: The original, compiled or not.
        smaller: The smaller model, not compiled.
        cuts: What is left of the variables that have become smaller.

    Warns:
        UserWarning: If the model cannot be compiled again from its config; or the optimizer keeps a
            state that cannot be made smaller, and starts afresh.
    """
    if not getattr(model, "compiled", False):
        return
    try:
        with as_in_use(model):
            smaller.compile_from_config(model.get_compile_config())
    except Exception as error:
        warnings.warn(
            f"The smaller model is not compiled, because Keras cannot compile '{model.name}' again "
            f"from its config: {error}\nCall `compile` on the smaller model.",
            stacklevel=4,
        )
        return
    old = model.optimizer
    if old is None or not old.built:
        return
    renew_optimizer(smaller)  # Compiling has built the first one.
    new = smaller.optimizer
    slots: dict[int, keras.Variable] = {}
    _keras.watch_slots(new, lambda variable, slot: slots.update({id(slot): variable}))
    new.build(smaller.trainable_variables)
    values = []
    for source, target in zip(old.variables, new.variables, strict=False):
        value = keras.ops.convert_to_numpy(source)
        if id(target) in slots:
            for axis, left in cuts.get(id(slots[id(target)]), {}).items():
                if value.ndim > axis and value.shape[axis] == len(left):
                    value = np.compress(left, value, axis)
        values.append(np.array(value))
    same = len(old.variables) == len(new.variables)
    if not same or any(
        value.shape != target.shape for value, target in zip(values, new.variables, strict=True)
    ):
        warnings.warn(
            f"The optimizer of the smaller model starts afresh: the state that "
            f"{type(old).__name__} keeps for '{model.name}' does not become smaller with the "
            "weights.",
            stacklevel=4,
        )
        return
    for target, value in zip(new.variables, values, strict=True):
        target.assign(value)
