"""Effective weights: the values that a masked layer reads in place of its raw weights."""

from __future__ import annotations

import contextlib
import inspect
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.maskable import mask_of
from masked_layers.masks import is_raw_view
from masked_layers.types import Tensor

Layer: TypeAlias = keras.layers.Layer


class _Write:
    """A method of a raw weight, attached to a tensor that was computed from it."""

    def __init__(self, variable: keras.Variable, name: str) -> None:
        self.variable = variable
        self.name = name

    def __call__(self, value: Any) -> Any:
        return getattr(self.variable, self.name)(value)

    def __reduce__(self) -> tuple[Any, ...]:  # torch copies and saves tensors with attributes.
        return _write_nothing, ()


def _write_nothing() -> None:
    """Takes the place of a `_Write` in a tensor that was copied or saved."""


def _with_writes(tensor: Tensor, variable: keras.Variable) -> Tensor:
    """Adds a variable's `assign` methods, path and flag to the tensor of an effective weight.

    Code that sets weights, as in `layer.kernel.assign(value)`, expects a variable. The effective
    weight must still be a tensor, because Keras would track and save a second variable, and
    because gradients pass through it.
    """
    with contextlib.suppress(AttributeError):  # While JAX traces it.
        for name in ("assign", "assign_add", "assign_sub"):
            setattr(tensor, name, _Write(variable, name))
        tensor.path, tensor.trainable = variable.path, variable.trainable
    return tensor


class EffectiveWeight:
    """Attribute of a masked layer that reads `mask(raw weight)` and writes the raw weight.

    Outside a call, the tensor that it returns has the methods `assign`, `assign_add` and
    `assign_sub`. They write the raw weight and do not change the tensor.

    Keras stores a weight either in a plain attribute or behind a property. Both work, because a
    data descriptor of the class takes precedence over attributes of the instance.
    """

    def __init__(self, base: type[Layer], name: str) -> None:
        self.inherited = inspect.getattr_static(base, name, None)
        self.name = name

    def __get__(self, layer: Layer | None, owner: type | None = None) -> Any:
        if layer is None:
            return self
        if self.inherited is not None:
            weight = self.inherited.__get__(layer, type(layer))
        elif self.name in vars(layer):
            weight = vars(layer)[self.name]
        else:
            raise AttributeError(
                f"'{type(layer).__name__}' has no '{self.name}' before it is built"
            )
        mask = None if weight is None or is_raw_view() else mask_of(layer, self.name)
        if mask is None:
            return weight
        effective = mask.apply(weight)
        if _keras.is_calling() or not isinstance(weight, keras.Variable):
            return effective
        return _with_writes(effective, weight)

    def __set__(self, layer: Layer, value: Any) -> None:
        if self.inherited is not None:
            self.inherited.__set__(layer, value)
        else:
            vars(layer)[self.name] = value

    def __delete__(self, layer: Layer) -> None:
        if self.inherited is not None:
            self.inherited.__delete__(layer)
        else:
            del vars(layer)[self.name]
