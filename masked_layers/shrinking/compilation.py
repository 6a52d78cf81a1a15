"""Compiles a smaller model like the original, with the optimizer state of the weights left."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.copying import as_in_use, renew_optimizer


@dataclass(frozen=True)
class Copied:
    """The variables of a model that were copied to the smaller one.

    Attributes:
        variables: id of a variable of the original model -> the variable of the smaller one.
        cuts: id of a variable of the smaller model -> {axis: bool array, True where an entry of the
            original one is kept}.
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
    values = _kept_state(old, smaller, copied)
    new = smaller.optimizer
    if values is None or any(
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


def _kept_state(
    old: keras.Optimizer, smaller: keras.Model, copied: Copied
) -> list[np.ndarray] | None:
    """Builds the optimizer of the smaller model, and returns the state that is left for it.

    The order of trained variables may differ, as the layers inside a composite layer are in the
    order of their attributes, and in that of the graph in the smaller model.

    Returns:
        None if the two optimizers do not have the same variables, or one has a state of another
        shape than that of a weight that has become smaller.
    """
    originals = _keras.optimized_variables(old)
    trained = [copied.variables.get(id(x)) for x in originals]
    new = smaller.optimizer
    there = _layout(new, smaller.trainable_variables)
    if set(map(id, trained)) != set(map(id, smaller.trainable_variables)):
        return None
    # The same optimizer in the order of the original tells which variable has which slot there.
    with as_in_use(smaller):
        same = type(new).from_config(new.get_config())
    here = _layout(same, trained)
    if sorted(here) != sorted(there) or len(here) != len(old.variables):
        return None
    sources = dict(zip(here, old.variables, strict=True))
    shapes = {id(copy): tuple(x.shape) for x, copy in zip(originals, trained, strict=True)}
    values = []
    for owner, number in there:
        value = keras.ops.convert_to_numpy(sources[owner, number])
        cuts = copied.cuts.get(owner, {})
        if value.shape == shapes.get(owner):
            for axis, left in cuts.items():
                value = np.compress(left, value, axis)
        elif value.ndim and not all(left.all() for left in cuts.values()):
            return None  # It is of rows or columns, as Adafactor's: which is which is not known.
        values.append(np.array(value))
    return values


def _layout(optimizer: keras.Optimizer, variables: list[keras.Variable]) -> list[tuple[int, int]]:
    """Builds an optimizer, and returns (id of the trained variable or 0, number) of its variables.

    The number counts the variables of the optimizer that belong to the same trained variable.
    """
    owners: dict[int, int] = {}
    _keras.watch_slots(optimizer, lambda variable, slot: owners.update({id(slot): id(variable)}))
    optimizer.build(variables)
    counts: dict[int, int] = {}
    layout = []
    for variable in optimizer.variables:
        owner = owners.get(id(variable), 0)
        counts[owner] = counts.get(owner, -1) + 1
        layout.append((owner, counts[owner]))
    return layout
