"""The bytes of a ticket file: converts a config and arrays to bytes and back.

A ticket has the safetensors format. `docs/ticket-files.md` describes its tensors, so that it can be
read without this library.
"""

from __future__ import annotations

import dataclasses
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from masked_layers.packing import pack as pack_bits
from masked_layers.packing import unpack as unpack_bits
from masked_layers.streams import (
    CHUNK,
    SKIP,
    deflated,
    dtype_of,
    extent,
    gaps_between,
    inflated,
    planes_of,
    positions_of,
    values_of,
)

FORMAT = "masked_layers ticket"
VERSION = "1"
_KINDS = ("values", "signs")
_LARGEST_MODEL = 1 << 26  # Bytes of the config and the list of weights before compression.


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Entry:
    """One weight of a ticket.

    Attributes:
        path: Path of the weight.
        shape: Shape of the weight.
        dtype: Name of its dtype.
        kept: Mask, a bool array of this shape, or None for a weight without a mask.
        values: Values of kept entries, flat and in C order; in a ticket of signs, whether they are
            negative.
        rescale: Whether the mask rescales kept entries.
        frozen: Values of the other entries, flat and in C order, or None for 0.
        quantization: How the mask quantizes kept entries, as in `Mask`, or None.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    kept: np.ndarray | None
    values: np.ndarray
    rescale: bool = False
    frozen: np.ndarray | None = None
    quantization: str | None = None

    def described(self) -> dict[str, Any]:
        """Returns the entry of the weight in the list of weights."""
        about: dict[str, Any] = {"path": self.path, "shape": list(self.shape)}
        about["dtype"] = self.dtype
        if self.kept is not None:
            about["masked"] = True
            about |= {"rescale": True} if self.rescale else {}
            about |= {"quantization": self.quantization} if self.quantization else {}
            about |= {} if self.frozen is None else {"frozen": self.frozen.dtype.name}
        return about


@dataclasses.dataclass(frozen=True, eq=False)
class Ticket:
    """The content of a ticket file.

    Attributes:
        config: Config of the model.
        entries: Weights, masked ones first. In a ticket of signs, only these.
        signs_only: Whether values are signs.
    """

    config: dict[str, Any]
    entries: Sequence[Entry]
    signs_only: bool


# --- Writing --------------------------------------------------------------------------------------


def pack(ticket: Ticket) -> bytes:
    """Returns the bytes of a ticket file."""
    entries = ticket.entries
    listed = {"config": ticket.config, "weights": [entry.described() for entry in entries]}
    streams = {
        "model": deflated([json.dumps(listed, separators=(",", ":")).encode()]),
        "masks": deflated([_gaps(entries).tobytes()]),
    }
    if ticket.signs_only:
        signs = [entry.values for entry in entries]
        streams["signs"] = pack_bits(np.concatenate(signs)).tobytes()
    else:
        streams |= _packed_values(entries)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": _KINDS[ticket.signs_only],
        "crc32": _checksum(streams),
    }
    tensors = {name: np.frombuffer(stream, np.uint8) for name, stream in streams.items()}
    return safetensors.numpy.save(tensors, metadata)


def _gaps(entries: Iterable[Entry]) -> np.ndarray:
    """Returns the gaps between kept entries, in all masks as if these were one."""
    parts, left_out = [], 0  # The number of entries since the last kept one.
    for entry in entries:
        flat = np.empty(0, bool) if entry.kept is None else entry.kept.ravel()
        for start in range(0, flat.size, CHUNK):  # Positions need 8 times the memory of a mask.
            part = flat[start : start + CHUNK]
            positions = np.flatnonzero(part)
            if len(positions):
                parts.append(gaps_between(positions + left_out))
                left_out = -1 - int(positions[-1])
            left_out += part.size
    return np.concatenate([*parts, gaps_between(np.empty(0, int), behind=left_out)])


def _packed_values(entries: Iterable[Entry]) -> dict[str, bytes]:
    """Returns a stream for each dtype: the byte planes of the values of all weights."""
    parts: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {}
    for entry in entries:
        # Biases and statistics have other exponents than kernels, and so get other codes.
        parts.setdefault(entry.dtype, ([], []))[entry.kept is None].append(entry.values)
        if entry.frozen is not None:
            parts.setdefault(entry.frozen.dtype.name, ([], []))[0].append(entry.frozen)
    packed = {}
    for name, both in parts.items():
        planes = (
            b"".join(planes_of(array)[number].tobytes() for array in arrays)
            for number in range(dtype_of(name).itemsize)
            for arrays in both
            if arrays
        )
        packed[f"values/{name}"] = deflated(planes)  # One after the other, to save memory.
    return packed


def _checksum(streams: Mapping[str, bytes]) -> str:
    """Returns the CRC-32 of all names and tensors, in the order of the names."""
    checksum = 0
    for name in sorted(streams):
        checksum = zlib.crc32(streams[name], zlib.crc32(name.encode(), checksum))
    return f"{checksum:08x}"


# --- Reading --------------------------------------------------------------------------------------


def unpack(data: bytes) -> Ticket:
    """Reads the bytes of a ticket file. Sizes are checked before memory is allocated for them.

    Raises:
        Exception: An error of any type if the bytes are not those of a ticket.
    """
    streams, kind = _streams(data)
    listed = json.loads(inflated(streams.pop("model"), _LARGEST_MODEL))
    weights = [_checked(about) for about in listed["weights"]]
    if len({about["path"] for about in weights}) < len(weights):
        raise ValueError("two weights have the same path")
    masks = _masks(streams.pop("masks"), [about for about in weights if about.get("masked")])
    signs_only = kind == "signs"
    takes = _takes(weights, masks, signs_only)
    counts: dict[str, int] = {}
    for take in takes:
        for name, count in take:
            counts[name] = counts.get(name, 0) + count
    if streams.keys() != counts.keys():
        raise ValueError(f"it contains {sorted(streams)}; expected {sorted(counts)}")
    values = {name: _values(name, streams[name], counts[name]) for name in counts}
    taken = dict.fromkeys(counts, 0)
    entries = []
    for about, take in zip(weights, takes, strict=True):
        parts = []
        for name, count in take:
            parts.append(values[name][taken[name] : taken[name] + count])
            taken[name] += count
        entries.append(
            Entry(
                path=about["path"],
                shape=about["shape"],
                dtype=about["dtype"],
                kept=masks.get(about["path"]),
                values=parts[0],
                rescale=bool(about.get("rescale")),
                frozen=parts[1] if len(parts) > 1 else None,
                quantization=about.get("quantization"),
            )
        )
    return Ticket(listed["config"], entries, signs_only)


def _streams(data: bytes) -> tuple[dict[str, bytes], str]:
    """Returns the tensors of a file and its kind, after checking the metadata and the checksum."""
    found = safetensors.deserialize(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError("its metadata do not name the format of a ticket")
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"it has version {metadata.get('version')!r} of the format, and this library reads "
            f"version {VERSION!r}"
        )
    if len(metadata) != 4 or metadata.get("kind") not in _KINDS:
        raise ValueError(f"its metadata are {metadata}")
    if wrong := [name for name, about in found if about["dtype"] != "U8"]:
        raise ValueError(f"tensors of other types than bytes: {wrong}")
    streams = {name: bytes(about["data"]) for name, about in found}
    if _checksum(streams) != metadata.get("crc32"):
        raise ValueError("its checksum does not match")
    return streams, metadata["kind"]


def _checked(about: dict[str, Any]) -> dict[str, Any]:
    """Returns an entry of the list of weights with its shape as a tuple.

    Raises:
        ValueError: If it has another form than documented.
    """
    shape = tuple(about["shape"])
    # Even in an empty array, NumPy limits the other lengths.
    largest = math.prod(length for length in shape if length) if len(shape) <= 32 else 2**60
    if not all(type(length) is int and length >= 0 for length in shape) or largest >= 2**60:
        raise ValueError(f"a weight has the shape {shape}")
    for name in (about["dtype"], *([about["frozen"]] if "frozen" in about else [])):
        dtype_of(name)
    if not isinstance(about["path"], str):
        raise ValueError(f"a weight has the path {about['path']!r}")
    return {**about, "shape": shape}


def _masks(stream: bytes, weights: Sequence[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Decodes the masks of weights by path."""
    sizes = [math.prod(about["shape"]) for about in weights]
    total = sum(sizes)
    gaps = np.frombuffer(inflated(stream, total + total // SKIP), np.uint8)
    _, covered = extent(gaps)
    if not 0 <= total - covered < SKIP:
        raise ValueError(f"its masks cover {covered} of {total} entries")
    flat = np.zeros(total, bool)
    for positions in positions_of(gaps):
        flat[positions] = True
    parts = np.split(flat, np.cumsum(sizes)[:-1])
    return {
        about["path"]: part.reshape(about["shape"])
        for about, part in zip(weights, parts, strict=True)
    }


def _takes(
    weights: Iterable[dict[str, Any]], masks: Mapping[str, np.ndarray], signs_only: bool
) -> list[list[tuple[str, int]]]:
    """Returns the (tensor, number of values) that each weight takes, in order."""
    takes = []
    for about in weights:
        size = math.prod(about["shape"])
        mask = masks.get(about["path"])
        kept = size if mask is None else int(np.count_nonzero(mask))
        take = [("signs" if signs_only else f"values/{about['dtype']}", kept)]
        if "frozen" in about:
            take.append((f"values/{about['frozen']}", size - kept))
        takes.append(take)
    return takes


def _values(name: str, stream: bytes, count: int) -> np.ndarray:
    """Decodes a tensor of values, or of signs."""
    if name == "signs":
        return unpack_bits(np.frombuffer(stream, np.uint8), (count,))
    dtype = dtype_of(name.removeprefix("values/"))
    data = inflated(stream, count * dtype.itemsize)
    if len(data) < count * dtype.itemsize:
        raise ValueError(f"'{name}' has {len(data)} bytes for {count} values")
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, count)
    return values_of(list(planes), dtype)
