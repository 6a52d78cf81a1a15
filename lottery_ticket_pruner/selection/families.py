"""Channels of a model as index arrays, and the masks in which they are kept or pruned."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Protocol

import numpy as np


class Family(Protocol):
    """Channels made by the same layers. `masked_layers.ChannelFamily` is one."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers that make the channels."""

    @property
    def kind(self) -> str:
        """Kind of the channels. "" for outputs of the layers."""

    @property
    def size(self) -> int:
        """Number of channels."""

    @property
    def weights(self) -> Mapping[str, Mapping[int, np.ndarray]]:
        """Path of a weight -> {axis: int array with the channel of each index along it, or -1}."""

    @property
    def products(self) -> Mapping[str, Mapping[int, np.ndarray]]:
        """The same as `weights`, for the products of `Graph.products`."""

    @property
    def form(self) -> Hashable:
        """Layers and shapes of the weights of a channel: equal for families that are alike."""

    @property
    def scales(self) -> Sequence[tuple[np.ndarray, np.ndarray]]:
        """Scale of each normalization of the channels, and the channel of each entry, or -1."""

    @property
    def made(self) -> Mapping[str, int]:
        """Path of a weight that makes the channels -> its output axis."""


class Graph(Protocol):
    """The channels of a model. `masked_layers.ChannelFamilies` is one."""

    @property
    def families(self) -> Sequence[Family]:
        """Families of channels that can be removed."""

    @property
    def positions(self) -> Mapping[str, int | None]:
        """Path of a kernel or product -> multiply-adds of each entry, or None if unknown."""

    @property
    def products(self) -> Mapping[str, tuple[int, ...]]:
        """Name of a product of two tensors that depend on the input -> the shape of its entries."""

    @property
    def unmasked(self) -> Mapping[str, int]:
        """Path of a weight without a mask -> its size."""


def stream_name(family: Family) -> str:
    """Returns the part of random streams that distinguishes a family from all others."""
    return family.layers[0] + family.kind


def kept_channels(family: Family, masks: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns which channels of a family have a kept weight, as a bool array."""
    kept = np.zeros(family.size, bool)
    for path, axes in family.weights.items():
        for axis, channels in axes.items():
            kept[np.unique(channels[(channels >= 0) & along(masks[path], axis, np.any)])] = True
    return kept


def remove(family: Family, channels: np.ndarray, masks: dict[str, np.ndarray]) -> None:
    """Prunes channels (a bool array) in the masks of all weights that belong to them, in place."""
    flags = np.append(channels, False)  # Index -1 reads the last entry.
    for path, axes in family.weights.items():
        for axis, members in axes.items():
            np.moveaxis(masks[path], axis, 0)[flags[members]] = False


def complete(families: Sequence[Family], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns masks without the weights that read or pass on channels that no kept weight makes.

    Such a channel may have a bias or the shift of a normalization as its value, but does not depend
    on the input of the model.
    """
    masks = {path: mask.copy() for path, mask in masks.items()}
    for family in families:
        made = np.zeros(family.size, bool)
        for path, axis in family.made.items():
            channels = family.weights[path][axis]
            made[channels[(channels >= 0) & along(masks[path], axis, np.any)]] = True
        if family.made:
            remove(family, ~made, masks)
    return masks


def along(array: np.ndarray, axis: int, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """Reduces an array along all axes but one."""
    return reduce(array, tuple(i for i in range(array.ndim) if i != axis))
