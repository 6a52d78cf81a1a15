"""Random masks with the structure and the counts of given ones, for controls."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from lottery_ticket_pruner.selection.families import (
    Family,
    complete,
    kept_channels,
    remove,
    stream_name,
)
from lottery_ticket_pruner.structures import Layout, Structure, cut, paste


def shuffled_within(
    structure: Structure,
    masks: Mapping[str, np.ndarray],
    layouts: Mapping[str, Layout],
    families: Sequence[Family],
    stream: Callable[[str], np.random.Generator],
) -> dict[str, np.ndarray]:
    """Draws masks of a structure uniformly at random, with the counts of given masks.

    Every kernel keeps its number of tiles (of each size, where those at its edges are smaller), and
    with N:M every tile its number of weights. Every family of channels keeps its number of
    channels, and so every kernel its number of weights.

    Args:
        structure: Structure of the masks, which were all ones before it was applied.
        masks: Bool masks by path.
        layouts: Layouts of the kernels by path.
        families: Channels of the model. Empty for structures within a kernel.
        stream: Function that returns the random generator for a path, or for the name of a
            family (see `stream_name`).

    Returns:
        A dict from path to a new mask, in the order of `masks`.
    """
    if structure.coupled:
        drawn = {path: np.ones_like(mask) for path, mask in masks.items()}
        for family in families:
            kept = kept_channels(family, masks)
            remove(family, ~stream(stream_name(family)).permutation(kept), drawn)
        return drawn
    drawn = {
        path: _drawn(structure, mask, layouts[path], stream(path))
        if structure.applies(layouts[path])
        else mask.copy()
        for path, mask in masks.items()
    }
    return complete(families, drawn) if structure.whole_outputs else drawn


def _drawn(
    structure: Structure, mask: np.ndarray, layout: Layout, rng: np.random.Generator
) -> np.ndarray:
    tile = structure.tile(layout)
    tiles, whole = (cut(array, layout, tile) for array in (mask, np.ones_like(mask)))
    if structure.kept is not None:
        scores = np.where(whole, rng.random(whole.shape), np.inf)
        ranks = scores.argsort(axis=1).argsort(axis=1)
        return paste(ranks < np.count_nonzero(tiles, axis=1)[:, None], layout, tile)
    kept: np.ndarray = np.any(tiles, axis=1)
    sizes = np.count_nonzero(whole, axis=1)
    for size in np.unique(sizes):
        kept[sizes == size] = rng.permutation(kept[sizes == size])
    return paste(whole & kept[:, None], layout, tile)
