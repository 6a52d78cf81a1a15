"""Compiles a smaller model like the original, with the optimizer state of the weights left."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.copying import as_in_use, renew_optimizer

# id of a variable of the smaller model -> {axis: bools, True where the original's entry is kept}
Cuts = Mapping[int, Mapping[int, np.ndarray]]


@dataclass(frozen=True)
class Copied:
    """The variables of a model that were copied to the smaller one.

    Attributes:
        variables: id of a variable of the original model -> the variable of the smaller one.
        cuts: The entries that were kept, for each variable that became smaller (see `Cuts`).
    """

    variables: dict[int, keras.Variable] = field(default_factory=dict)
    cuts: dict[int, dict[int, np.ndarray]] = field(default_factory=dict)


def compile_like(model: keras.Model, smaller: keras.Model, copied: Copied) -> None:
    """Compiles a smaller model like the original, so that training can continue.

    Args:
        model: The original model. If it is not compiled, nothing happens.
        smaller: The smaller model, not compiled.
        copied: The variables that were copied.

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
    variables = copied.variables
    pairs = [(v, variables[id(v)]) for v in model.trainable_variables if id(v) in variables]
    _keras.exclude_like(old, smaller.optimizer, pairs)
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
            for axis, left in copied.cuts.get(id(slots[id(target)]), {}).items():
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
