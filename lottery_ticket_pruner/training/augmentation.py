"""Random changes to the images of a batch, as part of the training step.

Random numbers are drawn on the host from a seed, and applied by operations that can be compiled. A
run is therefore reproducible whether or not its steps are compiled into one program.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
from keras import ops


class Augmentation(Protocol):
    """The interface of an augmentation: hashable, with two methods."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns an int32 array of shape `(count, n)` with the random numbers of each example."""

    def apply(self, images: Any, drawn: Any) -> Any:
        """Returns the changed batch. `drawn` are the rows of `draw`'s array for this batch."""


@dataclasses.dataclass(frozen=True)
class CropAndFlip:
    """Pads images with zeros, crops them at random to their original size and flips half of them.

    The standard augmentation of CIFAR-10 for residual networks (He et al., arXiv 1512.03385,
    section 4.2).

    Args:
        padding: Number of pixels on each side.
    """

    padding: int = 4

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns (row, column, flip) for each crop."""
        corners = rng.integers(0, 2 * self.padding + 1, (count, 2))
        flips = rng.integers(0, 2, (count, 1))
        return np.concatenate([corners, flips], axis=1).astype("int32")

    def apply(self, images: Any, drawn: Any) -> Any:
        """Returns the crops. `images` has the shape (batch, height, width, channels)."""
        images, drawn = ops.convert_to_tensor(images), ops.convert_to_tensor(drawn)
        batch, height, width, channels = images.shape
        around = (self.padding, self.padding)
        padded = ops.pad(images, ((0, 0), around, around, (0, 0)))
        full_height, full_width = height + 2 * self.padding, width + 2 * self.padding
        along = ops.arange(width, dtype="int32")[None, :]
        along = ops.where(drawn[:, 2:] > 0, width - 1 - along, along)
        rows = drawn[:, :1] + ops.arange(height, dtype="int32")[None, :]
        columns = drawn[:, 1:2] + along
        image = ops.arange(batch, dtype="int32")[:, None, None]
        pixel = (image * full_height + rows[:, :, None]) * full_width + columns[:, None, :]
        return ops.take(ops.reshape(padded, (-1, channels)), pixel, axis=0)
