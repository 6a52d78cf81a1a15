"""Groups the removable channels of a model into families, with the weights of each channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

from masked_layers.inspection import WeightRef, weight_refs
from masked_layers.shrinking.channels import Edit, Flow
from masked_layers.shrinking.following import OUTPUT, follow, variable_of


@dataclass(frozen=True, eq=False)
class ChannelFamily:
    """Channels made by the same layers, each of which can be removed from the whole model.

    Layers that are joined by an addition or a gate make their channels together. Removing a channel
    removes its columns in the kernels of the layers that make it, its entries in the layers that
    pass it on, and its rows in the kernels of all layers that read it.

    Attributes:
        layers: Names of the layers that make the channels, in the order of the graph.
        size: Number of channels.
        weights: Path of a maskable weight -> {axis: int array with the channel of each index along
            the axis, or -1 for indices that do not belong to this family}.
        made: Path of each weight in `weights` that makes the channels -> its output axis.
        kind: "heads", "key_dim" or "value_dim" (the width of queries and keys, of values), or
            "head_dim" (both) for channels inside an attention layer; "" for outputs of the layers.
    """

    layers: tuple[str, ...]
    size: int
    weights: Mapping[str, Mapping[int, np.ndarray]]
    made: Mapping[str, int]
    kind: str = ""


@dataclass(frozen=True, eq=False)
class ChannelFamilies:
    """The channel families of a model, and the layers that must stay whole.

    Attributes:
        families: All families, in the order of the graph.
        outputs: Names of the layers whose channels are outputs of the model and cannot be removed.
        whole: Name of any other layer that makes channels -> why some or all of these channels
            cannot be removed.
        not_followed: Name of a layer whose channels cannot be followed -> the reason.
        positions: Path of a kernel -> number of multiply-adds of each of its weights for one
            example, or None if a shape is unknown. Only layers that can be followed are included.
    """

    families: tuple[ChannelFamily, ...]
    outputs: tuple[str, ...]
    whole: Mapping[str, str]
    not_followed: Mapping[str, str]
    positions: Mapping[str, int | None]


def channel_families(model: keras.Model) -> ChannelFamilies:
    """Finds the channels of a model that can be removed, and all weights that belong to each.

    Channels are followed through the layers that `shrink` supports. Channels that are outputs of
    the model, or that are read by a layer that cannot be followed, cannot be removed.

    Args:
        model: A built Sequential or Functional model, plain or masked. In a masked model, only
            weights with a mask can be pruned, so channels that other weights read cannot be
            removed.

    Returns:
        A `ChannelFamilies` object: the families, and the reasons why other channels must stay.

    Raises:
        ValueError: If the model is neither Sequential nor Functional, overrides `call`, or is not
            built.
    """
    refs = weight_refs(model)
    masked = any(ref.mask is not None for ref in refs)
    prunable = {id(ref.variable): ref for ref in refs if ref.mask is not None or not masked}
    flow = follow(model)
    edits = [
        (flow.names[id(operation)], edit, _prunable_weights(operation, edit, prunable))
        for operation, edit in flow.edits.values()
    ]
    members, whole = _members(flow, edits)
    families = [
        ChannelFamily(tuple(edits[i][0] for i, _ in makers), len(roots), *found, makers[0][1])
        for (makers, roots), found in zip(
            members.items(), _weights_of(flow, edits, members), strict=True
        )
    ]
    return ChannelFamilies(
        families=tuple(families),
        outputs=tuple(name for name, reason in whole.items() if reason == OUTPUT),
        whole={name: reason for name, reason in whole.items() if reason != OUTPUT},
        not_followed=flow.not_followed,
        positions={
            named[name].path: positions
            for _, edit, named in edits
            for name, _, positions in edit.kernels()
            if name in named
        },
    )


# (index in the list of edits, kind) of all that makes a family -> the roots of its channels.
_Members = dict[tuple[tuple[int, str], ...], list[int]]

# The name of a layer, its edit, and its prunable weights by name.
_Named = tuple[str, Edit, dict[str, WeightRef]]


def _members(flow: Flow, edits: Sequence[_Named]) -> tuple[_Members, dict[str, str]]:
    """Returns the families, and why the other channels must stay, by the layer that makes them."""
    stays = _stays(flow, edits)
    makers: dict[int, list[tuple[int, str]]] = {}  # by root
    whole: dict[str, str] = {}
    for position, (name, edit, _) in enumerate(edits):
        for kind, channels in edit.makes():
            for root in flow.roots(channels.slots).tolist():
                if root in stays:
                    whole.setdefault(name, stays[root])
                else:
                    makers.setdefault(root, []).append((position, kind))
    members: _Members = {}
    for root, found in makers.items():
        members.setdefault(tuple(dict.fromkeys(found)), []).append(root)
    return dict(sorted(members.items())), whole


def _weights_of(
    flow: Flow, edits: Sequence[_Named], members: _Members
) -> list[tuple[dict[str, dict[int, np.ndarray]], dict[str, int]]]:
    """Returns `weights` and `made` of each family."""
    layers = list(members)
    found: list[tuple[dict[str, dict[int, np.ndarray]], dict[str, int]]]
    found = [({}, {}) for _ in layers]
    family_of = {
        root: (number, channel)
        for number, roots in enumerate(members.values())
        for channel, root in enumerate(roots)
    }
    for position, (_, edit, named) in enumerate(edits):
        for name, ref in named.items():
            rank = len(ref.variable.shape)
            outputs = {axis % rank for axis in ref.output_axes}
            for axis, channels in edit.slices[name].items():
                roots = flow.roots(channels.slots).tolist()
                numbers, along = np.array([family_of.get(root, (-1, -1)) for root in roots]).T
                for number in set(numbers.tolist()) - {-1}:
                    weights, made = found[number]
                    weights.setdefault(ref.path, {})[axis % rank] = np.where(
                        numbers == number, along, -1
                    )
                    makes = position in dict(layers[number]) and not edit.reads(channels)
                    if makes and axis % rank in outputs:
                        made[ref.path] = axis % rank
    return found


def _prunable_weights(
    operation: Any, edit: Edit, prunable: Mapping[int, WeightRef]
) -> dict[str, WeightRef]:
    found = {}
    for name in edit.slices:
        variable = variable_of(operation, name)
        if id(variable) in prunable:
            found[name] = prunable[id(variable)]
    return found


def _stays(flow: Flow, edits: Sequence[_Named]) -> dict[int, str]:
    """Returns why channels cannot be removed, by their roots."""
    stays = {flow.root(slot): reason for slot, reason in flow.pinned.items()}
    stays[0] = "joined with channels that are left whole"
    for name, edit, named in edits:
        for key, axes in edit.slices.items():
            for channels in axes.values():
                if edit.reads(channels) and key not in named:
                    reason = f"'{name}', whose weights have no mask, reads it"
                    for root in flow.roots(channels.slots).tolist():
                        stays.setdefault(root, reason)
        if named and all(key in named for key, *_ in edit.kernels()):
            continue
        for _, channels in edit.makes():
            for root in flow.roots(channels.slots).tolist():
                stays.setdefault(root, f"'{name}', whose weights have no mask, makes it")
    return stays
