"""Groups the removable channels of a model into families, with the weights of each channel."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import keras
import numpy as np

from masked_layers.inspection import WeightRef, channel_refs, weight_refs
from masked_layers.maskable import channel_weights
from masked_layers.paths import plain_class
from masked_layers.shrinking.channels import Channels, Edit, Flow
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
        products: The same as `weights`, for the products listed in `ChannelFamilies.products`.
        made: Path of each weight in `weights` that makes the channels -> its output axis.
        kind: "heads", "key_dim" or "value_dim" (the width of queries and keys, of values), or
            "head_dim" (both) for channels inside an attention layer; "" for outputs of the layers.
        form: For every axis of a weight in `weights`, the class of its layer, the name of the
            weight, the axis, and the shape that belongs to a channel. Families of equal form
            consist of the same kinds of layers with equal shapes.
        scales: For each normalization layer that the channels pass through, its scale (gamma), and
            an int array with the channel of each entry, or -1.
        normalized: Path of the scale of a masked normalization (see `channel_refs`) -> int array
            with the channel of each entry, or -1. Its mask can leave these channels out.
    """

    layers: tuple[str, ...]
    size: int
    weights: Mapping[str, Mapping[int, np.ndarray]]
    made: Mapping[str, int]
    kind: str = ""
    form: tuple[tuple[Any, ...], ...] = ()
    scales: tuple[tuple[Any, np.ndarray], ...] = ()
    normalized: Mapping[str, np.ndarray] = field(default_factory=dict)
    products: Mapping[str, Mapping[int, np.ndarray]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class ChannelFamilies:
    """The channel families of a model, and the layers that must stay whole.

    Attributes:
        families: All families, in the order of the graph.
        outputs: Names of the layers whose channels are outputs of the model and cannot be removed.
        whole: Name of any other layer that makes channels -> why some or all of these channels
            cannot be removed.
        not_followed: Name of a layer whose channels cannot be followed -> the reason.
        positions: Path of a kernel or product -> number of multiply-adds of each of its entries for
            one example, or None if a shape is unknown. Only layers that can be followed are
            included.
        products: Name of a product of two tensors that both depend on the input, as of queries and
            keys in attention -> the shape of its entries.
        unmasked: Path of a weight without a mask, in a masked model -> its size.
        uncounted: Paths of weights that belong to no layer that can be followed.
    """

    families: tuple[ChannelFamily, ...]
    outputs: tuple[str, ...]
    whole: Mapping[str, str]
    not_followed: Mapping[str, str]
    positions: Mapping[str, int | None]
    products: Mapping[str, tuple[int, ...]]
    unmasked: Mapping[str, int]
    uncounted: tuple[str, ...]


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
    prunable |= {id(ref.variable): ref for ref in channel_refs(model)}
    flow = follow(model)
    edits = [
        (flow.names[id(operation)], edit, _named(operation, edit, prunable))
        for operation, edit in flow.edits.values()
    ]
    everything = {id(ref.variable): ref for ref in refs}
    named = [(edit, _named(operation, edit, everything)) for operation, edit in flow.edits.values()]
    counted = {ref.path for _, found in named for ref in found.values()}
    members, whole = _members(flow, edits)
    return ChannelFamilies(
        families=_families(flow, edits, members),
        outputs=tuple(name for name, reason in whole.items() if reason == OUTPUT),
        whole={name: reason for name, reason in whole.items() if reason != OUTPUT},
        not_followed=flow.not_followed,
        positions={
            found[name].path: positions
            for edit, found in named
            for name, _, positions in edit.kernels()
            if name in found
        }
        | {path: positions for path, _, positions in _products(flow)},
        products={
            path: tuple(len(axes[axis].slots) for axis in sorted(axes))
            for path, axes, _ in _products(flow)
        },
        unmasked={
            ref.path: math.prod(ref.variable.shape)
            for ref in refs
            if id(ref.variable) not in prunable
        },
        uncounted=tuple(ref.path for ref in refs if ref.path not in counted),
    )


# (index in the list of edits, kind) of all that makes a family -> the roots of its channels.
_Members = dict[tuple[tuple[int, str], ...], list[int]]

# The name of a layer, its edit, and its prunable weights by name.
_Named = tuple[str, Edit, dict[str, WeightRef]]


def _families(flow: Flow, edits: Sequence[_Named], members: _Members) -> tuple[ChannelFamily, ...]:
    """Returns the families with all that belongs to them."""
    places = {
        root: (number, channel)
        for number, roots in enumerate(members.values())
        for channel, root in enumerate(roots)
    }
    return tuple(
        ChannelFamily(
            tuple(edits[i][0] for i, _ in makers),
            len(roots),
            weights=weights,
            made=made,
            kind=makers[0][1],
            form=tuple(sorted(form, key=repr)),
            scales=scales,
            normalized=normalized,
            products=products,
        )
        for (makers, roots), (weights, made, form, normalized), scales, products in zip(
            members.items(),
            _weights_of(flow, edits, members, places),
            _scales_of(flow, members, places),
            _products_of(flow, members, places),
            strict=True,
        )
    )


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


# `weights`, `made`, `form` and `normalized` of a family.
_Found = tuple[
    dict[str, dict[int, np.ndarray]],
    dict[str, int],
    list[tuple[Any, ...]],
    dict[str, np.ndarray],
]


# Root of a channel -> the number of its family and its place in it.
_Places = Mapping[int, tuple[int, int]]


def _inside(flow: Flow, places: _Places, channels: Channels) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the families among some channels: number, and the place of each entry, or -1."""
    found = [places.get(root, (-1, -1)) for root in flow.roots(channels.slots).tolist()]
    numbers, along = np.array(found).T
    for number in sorted(set(numbers.tolist()) - {-1}):
        yield number, np.where(numbers == number, along, -1)


def _scales_of(
    flow: Flow, members: _Members, places: _Places
) -> list[tuple[tuple[Any, np.ndarray], ...]]:
    """Returns `scales` of each family."""
    found: list[list[tuple[Any, np.ndarray]]] = [[] for _ in members]
    for operation, edit in flow.edits.values():
        for name, axes in edit.slices.items():
            if name.rpartition(".")[2] != "gamma" or variable_of(operation, name) is None:
                continue
            for channels in axes.values():
                for number, entries in _inside(flow, places, channels):
                    found[number].append((variable_of(operation, name), entries))
    return [tuple(scales) for scales in found]


def _products(flow: Flow) -> Iterator[tuple[str, dict[int, Channels], int | None]]:
    """Yields (name, channels along each axis, positions) of all products, as `Edit` has them."""
    for operation, edit in flow.edits.values():
        for name, axes in edit.products.items():
            yield f"{flow.names[id(operation)]}/{name}", axes, edit.counts()[name]


def _products_of(
    flow: Flow, members: _Members, places: _Places
) -> list[dict[str, dict[int, np.ndarray]]]:
    """Returns `products` of each family."""
    found: list[dict[str, dict[int, np.ndarray]]] = [{} for _ in members]
    for path, axes, _ in _products(flow):
        for axis, channels in axes.items():
            for number, entries in _inside(flow, places, channels):
                found[number].setdefault(path, {})[axis] = entries
    return found


def _weights_of(
    flow: Flow, edits: Sequence[_Named], members: _Members, places: _Places
) -> list[_Found]:
    """Returns `weights`, `made`, `form` and `normalized` of each family."""
    layers = list(members)
    found: list[_Found] = [({}, {}, [], {}) for _ in layers]
    for position, (_, edit, named) in enumerate(edits):
        for name, ref in named.items():
            rank = len(ref.variable.shape)
            outputs = {axis % rank for axis in ref.output_axes}
            for axis, channels in edit.slices[name].items():
                for number, entries in _inside(flow, places, channels):
                    weights, made, form, normalized = found[number]
                    if ref.name in channel_weights(ref.layer):
                        normalized[ref.path] = entries
                        continue
                    weights.setdefault(ref.path, {})[axis % rank] = entries
                    shape = list(ref.variable.shape)
                    own = entries[entries >= 0]
                    shape[axis] = own.size / np.unique(own).size
                    form.append((plain_class(ref.layer).__name__, ref.name, axis % rank, *shape))
                    makes = position in dict(layers[number]) and not edit.reads(channels)
                    if makes and axis % rank in outputs:
                        made[ref.path] = axis % rank
    return found


def _named(operation: Any, edit: Edit, refs: Mapping[int, WeightRef]) -> dict[str, WeightRef]:
    """Returns those of the weights of an edit that are among `refs`, by name."""
    found = {}
    for name in edit.slices:
        variable = variable_of(operation, name)
        if id(variable) in refs:
            found[name] = refs[id(variable)]
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
