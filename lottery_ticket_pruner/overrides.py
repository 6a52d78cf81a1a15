"""Changes to a model, most of them temporary context managers that restore it on exit."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.variables import read, variable_scope
from masked_layers.compiled import remake_functions


def assign(variables: Iterable[keras.Variable], values: Iterable[Any]) -> None:
    """Assigns a value to each variable, in order."""
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def freeze(model: keras.Model, values: Mapping[ml.Mask, np.ndarray | None]) -> None:
    """Sets the frozen values of pruned weights, by mask. None removes them.

    Functions compiled for masks without frozen values are recompiled.
    """
    with variable_scope(model):
        changed = [mask.freeze(frozen) for mask, frozen in values.items()]
    if any(changed):
        remake_functions(model)


def freeze_at_zero(model: keras.Model) -> None:
    """Sets frozen pruned weights to zero, so that they read as zero like all other pruned ones."""
    for ref in ml.masked_refs(model):
        if ref.mask.frozen is not None:
            ref.mask.freeze(np.zeros(ref.variable.shape))


@contextlib.contextmanager
def state_restored(model: keras.Model) -> Iterator[None]:
    """Restores every variable of the model on exit, and hides its optimizer until then."""
    ml.sync(model)
    variables = {id(v): v for v in [*model.variables, *model.metrics_variables]}.values()
    before = [read(variable) for variable in variables]
    try:
        # `evaluate` builds the optimizer if it is not built, which copies weights for some.
        with _keras.replaced(model, "optimizer", None):
            yield
    finally:
        # A failed evaluation leaves the state outside the variables.
        with contextlib.suppress(RuntimeError):
            ml.sync(model)
        model.reset_metrics()  # those created by the evaluation
        assign(variables, before)


@contextlib.contextmanager
def weights_replaced(model: keras.Model, values: Sequence[np.ndarray] | None) -> Iterator[None]:
    """Temporarily replaces the weights of a model. None leaves them as they are."""
    if values is None:
        yield
        return
    with state_restored(model):
        assign(model.weights, values)
        yield


@contextlib.contextmanager
def masks_replaced(model: keras.Model, masks: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Temporarily replaces the masks of a model."""
    before = ml.get_masks(model)
    changed = {path for path, mask in masks.items() if not np.array_equal(mask, before[path])}
    try:
        ml.set_masks(model, {path: masks[path] for path in changed})
        yield
    finally:
        ml.set_masks(model, {path: before[path] for path in changed})


@contextlib.contextmanager
def rescaling(model: keras.Model, flags: Mapping[ml.Mask, bool]) -> Iterator[None]:
    """Temporarily switches rescaling, then restores the flags and the compiled functions."""
    names = [f"{kind}_function" for kind in ("train", "test", "predict")]
    functions = {name: getattr(model, name, None) for name in names}
    before = {mask: mask.rescale for mask, rescale in flags.items() if mask.rescale != rescale}
    for mask in before:
        mask.rescale = flags[mask]
    if before:
        # Other models that share these layers do not run in the meantime.
        remake_functions(model, around=False)
    try:
        yield
    finally:
        if before:
            for mask, rescale in before.items():
                mask.rescale = rescale
            for name, function in functions.items():
                setattr(model, name, function)


@contextlib.contextmanager
def attribute_replaced(name: str, values: Sequence[tuple[Any, Any]]) -> Iterator[None]:
    """Temporarily replaces an attribute of several objects.

    Args:
        name: Name of the attribute.
        values: Pairs of an object and the new value of its attribute.
    """
    before = [(owner, getattr(owner, name)) for owner, _ in values]
    for owner, value in values:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, value in before:
            setattr(owner, name, value)


@contextlib.contextmanager
def bystanders_kept() -> Iterator[None]:
    """Leaves Python's random state alone, and hides warnings about models that are only measured.

    Layers draw the seeds of their initializers from this state when they are made, and the number
    of models depends on measured times.
    """
    with _keras.drawn_apart(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
