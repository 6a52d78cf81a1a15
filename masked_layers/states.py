"""Masks in the configs of layers, for copies and formats that keep only configs and weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeAlias

import keras

from masked_layers import _keras
from masked_layers.maskable import every_weight_inside, mask_of
from masked_layers.packing import MaskState

Layer: TypeAlias = keras.layers.Layer
States: TypeAlias = dict[str, Mapping[str, Any]]


def configs(layer: Layer, paths: Collection[str], *, as_made: bool) -> States:
    """Returns the current states of the binary masks inside a layer.

    Args:
        layer: A layer or model.
        paths: Paths of the masked weights to include, relative to `layer`.
        as_made: Whether a newly created layer has masks that keep everything. If so, and the masks
            still keep everything, the result is empty.

    Returns:
        Configs of `MaskState` by path.
    """
    found = {}
    for path, owner, name in every_weight_inside(layer):
        mask = mask_of(owner, name)
        if path in paths and mask is not None and not mask.learned:
            found[path] = mask.state
    if as_made and all(state.is_new for state in found.values()):
        return {}
    return {path: state.get_config() for path, state in found.items()}


def check_built(layer: Layer, paths: Collection[str]) -> None:
    """Refuses to load a layer with masks inside that Keras could not build before.

    Keras would load nothing of what is inside, without a word. It builds layers that name their
    arguments as they were built when they were saved, so one that is not built has nothing to load.

    Args:
        layer: A layer whose values are about to be loaded.
        paths: Paths of its masked weights.

    Raises:
        ValueError: If it is not built.
    """
    if layer.built or not any("/" in path for path in paths):
        return
    if _keras.takes_any_arguments(layer):
        raise ValueError(
            f"'{layer.name}' is not built, so its weights and masks cannot be loaded. "
            f"{_keras.NAME_ARGUMENTS} or load the file into a model that was called: "
            "`masked_layers.convert_to_masked(model).load_weights(path)`."
        )


def restore(layer: Layer, states: States) -> None:
    """Restores the masks that exist inside a layer and removes their states from `states`.

    Inner layers usually restore their own masks from their configs. Where Keras makes a layer from
    the config of another one, as the second direction of `Bidirectional`, they have the masks of
    the other one until this function is called.
    """
    if states:
        for path, owner, name in every_weight_inside(layer):
            if path in states and (mask := mask_of(owner, name)) is not None:
                mask.restore(decoded(layer, path, states, mask.value.shape))


def decoded(layer: Layer, path: str, states: States, shape: Any) -> MaskState:
    """Removes the state of one mask from `states` and decodes it.

    Raises:
        ValueError: If the state is damaged or belongs to a weight of another shape.
    """
    try:
        return MaskState.from_config(states.pop(path), tuple(shape))
    except ValueError as error:
        raise ValueError(
            f"`mask_state` of '{layer.name}' does not fit its weight '{path}': {error}. Leave "
            "`mask_state` out of the config to start from masks that keep everything."
        ) from error


def check_paths(layer: Layer, states: States) -> None:
    """Checks that a built layer has every weight that `states` contains a mask for.

    Raises:
        ValueError: If it lacks one of them.
    """
    known = [path for path, *_ in every_weight_inside(layer)]
    if unknown := [path for path in states if path not in known]:
        raise ValueError(
            f"`mask_state` of '{layer.name}' names weights that the layer does not have: "
            f"{unknown}. Its weights: {known}"
        )
