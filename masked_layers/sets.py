"""Saves and loads layers in sets, which Keras tracks but does not save."""

from __future__ import annotations

import warnings
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.maskable import every_own_weight, mask_of
from masked_layers.masks import Mask
from masked_layers.paths import join, left_out_of_files, walk

Layer: TypeAlias = keras.layers.Layer

# Prefix of the names of their variables, in the entry of the layer that contains the set.
_PREFIX = "in_set:"


def save(layer: Layer, store: Any) -> None:
    """Saves the layers in sets inside a layer to the layer's own store."""
    for prefix, inner in _left_out(layer):
        state: dict[str, Any] = {}
        inner.save_own_variables(state)
        for key, value in state.items():
            store[prefix + key] = value


def without(layer: Layer, store: Any) -> Any:
    """Returns the entries of a store without those that `save` added."""
    if not left_out_of_files(layer):
        return store
    return {key: store[key] for key in list(store.keys()) if not key.startswith(_PREFIX)}


def load(layer: Layer, store: Any) -> None:
    """Loads the entries that `save` wrote, and warns about layers without entries."""
    for prefix, inner in _left_out(layer):
        keys = [key for key in list(store.keys()) if key.startswith(prefix)]
        if keys or not _keras.own_variables(inner):
            inner.load_own_variables({key.removeprefix(prefix): store[key] for key in keys})
        elif not isinstance(inner, Mask):
            warnings.warn(
                f"The file contains no weights for '{inner.path or inner.name}', which keeps its "
                "current ones: Keras does not save plain layers that are stored in a set.",
                stacklevel=2,
            )


def _left_out(layer: Layer) -> list[tuple[str, Layer]]:
    """Returns (prefix, layer) for all layers, masks included, that Keras does not save."""
    found = []
    for name, child in left_out_of_files(layer):
        for path, inner in walk(child):
            masks = {weight: mask_of(inner, weight) for weight in every_own_weight(inner)}
            parts = {
                "": inner,
                **{f"{weight}_mask": mask for weight, mask in masks.items() if mask},
            }
            for last, part in parts.items():
                prefix = join(name, path, last).replace("/", ":")
                found.append((f"{_PREFIX}{prefix}=", part))
    return found
