"""Masks as a bit per weight, in files and in configs."""

from __future__ import annotations

import base64
import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

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


@dataclasses.dataclass(frozen=True, eq=False)
class MaskState:
    """The state of a binary mask.

    Attributes:
        kept: Bool array of the weight's shape, True where an entry is kept.
        rescale: Whether it rescales.
        frozen: What pruned entries read as: float array of that shape, or None for 0.
    """

    kept: np.ndarray
    rescale: bool = False
    frozen: np.ndarray | None = None

    @property
    def is_new(self) -> bool:
        """Returns whether every entry is kept and nothing else differs from a new mask."""
        return bool(self.kept.all()) and not self.rescale and self.frozen is None

    def get_config(self) -> dict[str, Any]:
        """Returns the state in JSON's types."""
        config: dict[str, Any] = {"shape": list(self.kept.shape), "bits": _text(pack(self.kept))}
        if self.rescale:
            config["rescale"] = True
        if self.frozen is not None:
            config["frozen"] = {"dtype": self.frozen.dtype.name, "bytes": _text(self.frozen)}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shape: tuple[int, ...]) -> MaskState:
        """Inverse of `get_config`.

        Args:
            config: What it returned.
            shape: Shape of the weight.

        Raises:
            ValueError: If the state is for another shape or damaged.
        """
        try:
            if tuple(config["shape"]) != shape:
                raise ValueError(f"it is for a weight of shape {tuple(config['shape'])}")
            size, frozen = math.prod(shape), None
            kept = unpack(_array(config["bits"], np.dtype("uint8"), math.ceil(size / 8)), shape)
            if "frozen" in config:
                dtype = np.dtype(config["frozen"]["dtype"])
                if not np.issubdtype(dtype, np.floating):
                    raise ValueError(f"frozen values of dtype {dtype}")
                frozen = _array(config["frozen"]["bytes"], dtype, size).reshape(shape)
        except Exception as error:
            raise ValueError(f"not the state of a mask of shape {shape}: {error}") from error
        return cls(kept, bool(config.get("rescale")), frozen)


def _text(array: np.ndarray) -> str:
    little = array.astype(array.dtype.newbyteorder("<"), copy=False)
    return base64.b64encode(zlib.compress(little.tobytes())).decode("ascii")


def _array(text: str, dtype: np.dtype, size: int) -> np.ndarray:
    expected = size * dtype.itemsize
    data = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), expected + 1)
    if len(data) != expected:
        raise ValueError(
            f"{size} values of {dtype} are {expected} bytes. Received: {len(data)}"
            + (" or more" if len(data) > expected else "")
        )
    return np.frombuffer(data, dtype.newbyteorder("<")).astype(dtype)
