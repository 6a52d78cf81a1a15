"""Masks packed to one bit per weight, for files and configs."""

from __future__ import annotations

import base64
import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np


def pack(mask: np.ndarray) -> np.ndarray:
    """Packs a bool array into bits: uint8 of shape `(ceil(mask.size / 8),)`, padded with zeros."""
    return np.packbits(mask)


def unpack(bits: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Unpacks a mask from bits; the inverse of `pack`.

    Args:
        bits: Array returned by `pack`.
        shape: Shape of the mask.

    Returns:
        A bool array of that shape.

    Raises:
        ValueError: If `bits` has another dtype or length than `pack` returns for this shape, or
            its padding is not zero.
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
            f"the bits of a mask of shape {shape} must be zero after the first {size}. "
            f"Received: last byte {bits[-1]:#010b}"
        )
    return np.unpackbits(bits, count=size).reshape(shape).astype(bool)


@dataclasses.dataclass(frozen=True, eq=False)
class MaskState:
    """The state of a binary mask.

    Attributes:
        kept: Bool array of the weight's shape, True where an entry is kept.
        rescale: Whether the mask rescales kept weights.
        frozen: Values of pruned entries: float array of the weight's shape, or None for 0.
        quantization: How the mask quantizes kept weights, `"int8"` or `"int4"`, or None.
    """

    kept: np.ndarray
    rescale: bool = False
    frozen: np.ndarray | None = None
    quantization: str | None = None

    @property
    def is_new(self) -> bool:
        """True for the state of a new mask: all entries kept, nothing done to them."""
        as_it_is = self.frozen is None and self.quantization is None and not self.rescale
        return bool(self.kept.all()) and as_it_is

    def get_config(self) -> dict[str, Any]:
        """Returns the state as JSON-serializable values."""
        config: dict[str, Any] = {"shape": list(self.kept.shape), "bits": _text(pack(self.kept))}
        if self.rescale:
            config["rescale"] = True
        if self.quantization is not None:
            config["quantization"] = self.quantization
        if self.frozen is not None:
            config["frozen"] = {"dtype": self.frozen.dtype.name, "bytes": _text(self.frozen)}
        return config

    @classmethod
    def from_config(cls, config: Mapping[str, Any], shape: tuple[int, ...]) -> MaskState:
        """Creates a state from its config; the inverse of `get_config`.

        Args:
            config: Dict returned by `get_config`.
            shape: Shape of the weight.

        Raises:
            ValueError: If the state is damaged or has another shape.
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
        return cls(kept, bool(config.get("rescale")), frozen, config.get("quantization"))


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
