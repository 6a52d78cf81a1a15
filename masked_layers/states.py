"""Masks in the configs of layers, for what carries no other state than weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import keras

from masked_layers.maskable import mask_of, weights_inside
from masked_layers.packing import MaskState

Layer: TypeAlias = keras.layers.Layer
States: TypeAlias = dict[str, Mapping[str, Any]]


def configs(layer: Layer, paths: Collection[str], *, as_made: bool) -> States:
    """Returns what binary masks inside a layer are now, by path: configs of `MaskState`.

    Nothing if all of them keep everything, and do so when the layer is made (`as_made`).
    """
    found = {}
    for path, owner, name in weights_inside(layer, biases=True):
        mask = mask_of(owner, name)
        if path in paths and mask is not None and not mask.learned:
            found[path] = mask.state
    if as_made and all(state.is_new for state in found.values()):
        return {}
    return {path: state.get_config() for path, state in found.items()}


def restore(layer: Layer, states: States) -> None:
    """Gives masks that exist inside a layer the states it was made with, and forgets these.

    Inner layers bring their own, but one that Keras makes of the config of another, as the second
    direction of `Bidirectional`, that of the other.
    """
    if states:
        for path, owner, name in weights_inside(layer, biases=True):
            if path in states and (mask := mask_of(owner, name)) is not None:
                mask.restore(decoded(layer, path, states, mask.value.shape))


def decoded(layer: Layer, path: str, states: States, shape: Any) -> MaskState:
    """Takes the state of one mask out of the configs.

    Raises:
        ValueError: If it is for a weight of another shape, or damaged.
    """
    try:
        return MaskState.from_config(states.pop(path), tuple(shape))
    except ValueError as error:
        raise ValueError(
            f"`mask_state` of '{layer.name}' does not fit its weight '{path}': {error}. Leave "
            "`mask_state` out of the config to start from masks that keep everything."
        ) from error


def check_paths(layer: Layer, states: States) -> None:
    """Checks that a built layer has the weights whose masks it was given.

    Raises:
        ValueError: If it lacks one.
    """
    known = [path for path, *_ in weights_inside(layer, biases=True)]
    if unknown := [path for path in states if path not in known]:
        raise ValueError(
            f"`mask_state` of '{layer.name}' is for weights that it does not have: {unknown}. "
            f"Those it has: {known}"
        )
