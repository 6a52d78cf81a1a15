"""Compiles a smaller model like the original, with the optimizer state of the weights left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.copying import as_in_use, renew_optimizer

# id of a variable of the smaller model -> {axis: bools, True where the original's entry is kept}
Cuts = Mapping[int, Mapping[int, np.ndarray]]


def compile_like(model: keras.Model, smaller: keras.Model, cuts: Cuts) -> None:
    """Compiles a smaller model like the original, so that training can continue.

    Args:
        model: The original model. If it is not compiled, nothing happens.
        smaller: The smaller model, not compiled.
        cuts: The entries that were kept, for each variable that became smaller.

    Warns:
        UserWarning: If the model cannot be compiled from its compile config, or if the optimizer's
            state cannot be reduced to the kept weights, so that the optimizer is reset.
    """
    if not getattr(model, "compiled", False):
        return
    try:
        with as_in_use(model):
            smaller.compile_from_config(model.get_compile_config())
    except Exception as error:
        warnings.warn(
            f"The smaller model is not compiled, because '{model.name}' could not be compiled from "
            f"its compile config: {error}\nCall `compile` on the smaller model.",
            stacklevel=4,
        )
        return
    old = model.optimizer
    if old is None:
        return
    _keras.exclude_like(old, smaller.optimizer, _pairs(model, smaller))
    if not old.built:
        return
    renew_optimizer(smaller)  # Compiling has built the optimizer; a new one is not built yet.
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
            f"The optimizer of the smaller model was reset: the state of {type(old).__name__} in "
            f"'{model.name}' could not be reduced to the weights that are left.",
            stacklevel=4,
        )
        return
    for target, value in zip(new.variables, values, strict=True):
        target.assign(value)


def _pairs(model: keras.Model, smaller: keras.Model) -> list[tuple[keras.Variable, keras.Variable]]:
    """Returns the trained variables of two models that correspond to each other."""
    ours, theirs = model.trainable_variables, smaller.trainable_variables
    if len(ours) == len(theirs):
        return list(zip(ours, theirs, strict=True))
    by_path = {variable.path: variable for variable in theirs}  # Some layers have a new bias.
    return [(variable, by_path[variable.path]) for variable in ours if variable.path in by_path]
