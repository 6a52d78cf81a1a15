"""Effective weights: the values that a masked layer reads in place of its raw weights."""

from __future__ import annotations

import inspect
from typing import Any, TypeAlias

import keras

from masked_layers.maskable import mask_of
from masked_layers.masks import is_raw_view

Layer: TypeAlias = keras.layers.Layer


class EffectiveWeight:
    """Attribute of a masked layer that reads `mask(raw weight)` and writes the raw weight.

    Keras keeps a weight either in a plain attribute or behind a property; both work, as a data
    descriptor of the class comes before the attributes of the instance.
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
        return weight if mask is None else mask.apply(weight)

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
