"""Masks as a bit per weight."""

from __future__ import annotations

import math

import numpy as np


def pack(mask: np.ndarray) -> np.ndarray:
    """Returns a bool array as bits: uint8 of shape `(ceil(mask.size / 8),)`, zeros at the end."""
    return np.packbits(mask)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Inverse of `pack`.

    Args:
        bits: What `pack` returned.
        shape: The shape of the mask.

    Returns:
        A bool array of that shape.

    Raises:
        ValueError: If there are more bits, or fewer, than `pack` makes of such a mask, or other
            values than bytes.
    """
    size = math.prod(shape)
    expected = (math.ceil(size / 8),)
    if bits.dtype != np.uint8 or bits.shape != expected:
        raise ValueError(
            f"the bits of a mask of shape {shape} must be uint8 of shape {expected}. "
            f"Received: {bits.dtype} of shape {bits.shape}"
        )
    if size % 8 and bits[-1] & (0xFF >> size % 8):
        raise ValueError(
            f"the bits of a mask of shape {shape} must end with zeros after the first {size}. "
            f"Received: a last byte of {bits[-1]:#010b}"
        )
    return np.unpackbits(bits, count=size).reshape(shape).astype(bool)
