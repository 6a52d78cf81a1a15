"""The state of a model, by path: its weights and everything else that files contain."""

from __future__ import annotations

import re
from typing import TypeAlias

import keras

from masked_layers import _keras
from masked_layers.inspection import channel_refs, weight_refs
from masked_layers.masks import Mask
from masked_layers.paths import join, walk

# The name of a variable without one, and the number of such names that the process made before.
_AUTOMATIC = re.compile(r"variable(_\d+)?")

State: TypeAlias = dict[str, tuple[keras.Variable, Mask | None]]


def state_variables(model: keras.Model) -> State:
    """Returns (variable, mask or None) by path for all state of a model except its masks.

    Masks that leave channels out of a normalization are left out.
    """
    found = {id(ref.variable): (ref.path, ref.mask) for ref in weight_refs(model, mask_bias=True)}
    masks = [mask for _, mask in found.values() if mask is not None]
    masks += [ref.mask for ref in channel_refs(model)]
    skip = {id(variable) for mask in masks for variable in mask.variables}
    states = []  # Of stateful recurrent layers, which Keras does not list in layer variables.
    for path, layer in walk(model):
        for variable in _keras.own_variables(layer):
            name = "variable" if _AUTOMATIC.fullmatch(variable.name) else variable.name
            found.setdefault(id(variable), (join(path, name), None))
        if isinstance(layer, keras.layers.RNN) and layer.stateful and layer.built:
            for state in keras.tree.flatten(layer.states):
                states.append(state)
                found.setdefault(id(state), (join(path, "states"), None))
    sources: State = {}
    for variable in [*model.variables, *states]:
        if id(variable) not in skip:
            # The path of a seed generator depends on what the process made before.
            path, mask = found.get(id(variable), (variable.name, None))
            unique, count = path, 0
            while unique in sources:
                count += 1
                unique = f"{path}_{count}"
            sources[unique] = (variable, mask)
    return sources
