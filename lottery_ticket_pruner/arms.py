"""The arms of a search: random masks and new weights of controls, random streams of layers."""

from collections.abc import Mapping
from typing import TypeAlias

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import selection, structures, treatments
from lottery_ticket_pruner.variables import read
from masked_layers import randomness
from masked_layers.maskable import input_axes

# Purpose of random numbers drawn here; see `randomness`.
PURPOSE = "arms of a search"

# A seed, and what else tells a random stream apart from others.
Parts: TypeAlias = tuple[int, *tuple[int | str, ...]]


def shuffled(
    masks: Mapping[str, np.ndarray], parts: Parts, *, together: bool
) -> dict[str, np.ndarray]:
    """Draws masks with the same count per kernel, or in total, uniformly at random."""
    if together:
        joined = np.concatenate([mask.reshape(-1) for mask in masks.values()])
        joined = randomness.stream(PURPOSE, *parts).permutation(joined)
        ends = np.cumsum([mask.size for mask in masks.values()])
        pieces = np.split(joined, ends[:-1])
        return {
            path: piece.reshape(mask.shape)
            for (path, mask), piece in zip(masks.items(), pieces, strict=True)
        }
    return {
        path: randomness.stream(PURPOSE, *parts, path)
        .permutation(mask.reshape(-1))
        .reshape(mask.shape)
        for path, mask in masks.items()
    }


def shuffled_within(
    structure: structures.Structure,
    model: keras.Model,
    masks: Mapping[str, np.ndarray],
    parts: Parts,
    graph: ml.ChannelFamilies | None,
) -> dict[str, np.ndarray]:
    """Draws masks of a structure with the same counts, as `selection.shuffled_within` does."""
    layouts = {
        ref.path: structures.Layout(
            tuple(ref.variable.shape), input_axes(ref.layer, ref.name), ref.output_axes
        )
        for ref in ml.masked_refs(model)
    }
    return selection.shuffled_within(
        structure,
        masks,
        layouts,
        () if graph is None else graph.families,
        lambda name: randomness.stream(PURPOSE, *parts, name),
    )


def draw_again(model: keras.Model, parts: Parts, *, keep_signs: bool = False) -> None:
    """Draws a new value of every trainable kernel from its layer's own initializer."""
    for ref in ml.weight_refs(model):
        if ref.variable.trainable:
            drawn = treatments.draw_again(ref, randomness.integer(PURPOSE, *parts, ref.path))
            if keep_signs:
                drawn = np.abs(drawn) * np.sign(read(ref.variable))
            ref.variable.assign(drawn)


def restart_randomness(model: keras.Model, parts: Parts) -> None:
    """Resets the random state of dropout and similar layers, which arms would otherwise share."""
    states = [v for v in model.variables if v.name == "seed_generator_state"]
    for number, state in enumerate(states):
        seed = randomness.integer(PURPOSE, *parts, "layers", number)
        state.assign([seed, 0])  # The seed, and the number of draws so far.
