"""The header of a packed file: which arrays it contains, and where.

`encoding.py` describes the layout.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from masked_layers.streams import SKIP, dtype_of

Encoding = Literal["sparse", "dense"]
Coding = Literal["exact", "scales", "codebook", "joint"]

_MAGIC = b"MLSP"
_VERSIONS = (1, 2)
"""Version 2 is that of files with codes; other files still have version 1."""
_PRELUDE = struct.Struct("<4sB3xII")
_LARGEST_HEADER = 1 << 24  # Bytes before compression, enough for about 200,000 arrays.
_MOST_PER_BYTE = 1032  # A zlib stream never expands to more bytes per byte.
# Maximum number of zeros that are not written. Files of earlier versions omit all zeros at the end
# of a block.
_UNWRITTEN = 1 << 24
_CODES = {"scales": "int8", "codebook": "uint8", "joint": "uint8"}


@dataclass(frozen=True)
class Entry:
    """One array of a block.

    Attributes:
        name: Name of the array.
        shape: Its shape.
        values: Number of its stored values.
        levels: Length of its table; 0 without codes.
    """

    name: str
    shape: tuple[int, ...]
    values: int
    levels: int = 0

    @property
    def size(self) -> int:
        """Number of elements, including zeros."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """Arrays with the same dtype, encoding and coding that share streams.

    Attributes:
        encoding: `"sparse"` or `"dense"`.
        dtype: Name of the dtype of the stored values, one of `DTYPES`.
        coding: `"exact"`, or the kind of codes that the stored values are: `"scales"` (int8),
            `"codebook"` or `"joint"` (uint8).
        gaps: Length of the stream of gaps; 0 in a dense block.
        entries: The arrays, in the order in which they are concatenated.
        streams: (offset in the file, bytes) for each zlib stream: the gaps (sparse blocks only),
            then the planes from the least to the most significant byte. Blocks of codes have one
            stream, of `parts`.
        floats: Dense float32 arrays whose values follow the tables in a block of codes.
    """

    encoding: Encoding
    dtype: str
    coding: Coding
    gaps: int
    entries: tuple[Entry, ...]
    streams: tuple[tuple[int, int], ...]
    floats: tuple[Entry, ...] = ()

    @property
    def members(self) -> tuple[Entry, ...]:
        """All arrays of the block."""
        return (*self.entries, *self.floats)

    @property
    def size(self) -> int:
        """Number of elements of all arrays, including zeros."""
        return sum(entry.size for entry in self.entries)

    @property
    def values(self) -> int:
        """Number of stored values."""
        return sum(entry.values for entry in self.entries)

    @property
    def counts(self) -> list[int]:
        """Length of each stream after decompression, in bytes."""
        sparse = self.encoding == "sparse"
        if self.coding != "exact":
            return [sum(self.parts)]
        return [self.gaps] * sparse + [self.values] * (len(self.streams) - sparse)

    @property
    def parts(self) -> list[int]:
        """Lengths of the gaps, the codes and the float32 numbers in a block of codes, in bytes."""
        tables = sum(entry.levels for entry in self.entries)
        return [self.gaps, self.values, 4 * (tables + sum(entry.size for entry in self.floats))]

    @property
    def nbytes(self) -> list[int]:
        """Bytes of the streams, divided among the members by their number of stored values."""
        total = sum(length for _, length in self.streams)
        counts = np.cumsum([0, *(entry.values for entry in self.members)])
        edges = counts / max(counts[-1], 1)
        return np.diff(np.rint(edges * total).astype(np.int64)).tolist()


def assemble(header: Sequence[Mapping[str, Any]], streams: Sequence[bytes]) -> bytes:
    """Returns a packed file with a header, its blocks in the form of `encoding.py`, and streams.

    Raises:
        ValueError: If the header is too long.
    """
    plain = json.dumps({"blocks": header}, separators=(",", ":")).encode()
    if len(plain) > _LARGEST_HEADER:
        count = sum(len(block["arrays"]) for block in header)
        raise ValueError(
            f"The header for {count} arrays has {len(plain)} bytes; at most {_LARGEST_HEADER} are "
            "allowed. Use several files."
        )
    text = zlib.compress(plain, 9)
    checksum = zlib.crc32(text)
    for stream in streams:
        checksum = zlib.crc32(stream, checksum)
    version = _VERSIONS[any("coding" in block for block in header)]
    return b"".join([_PRELUDE.pack(_MAGIC, version, len(text), checksum), text, *streams])


def blocks(data: bytes) -> list[Block]:
    """Reads the header, which lists the arrays and their positions, without decoding values.

    Raises:
        ValueError: If the bytes have another format or version, or are cut short or damaged.
    """
    if len(data) < _PRELUDE.size or data[:4] != _MAGIC:
        raise ValueError(
            f"Not a packed file of sparse arrays: expected bytes that begin with {_MAGIC!r}. "
            f"Received: {len(data)} bytes that begin with {bytes(data[:4])!r}."
        )
    _, version, length, checksum = _PRELUDE.unpack_from(data)
    if version not in _VERSIONS:
        raise ValueError(
            f"The packed file has format version {version}, but this library reads versions "
            f"{' and '.join(map(str, _VERSIONS))}. Read it with the version of the library that "
            "wrote it."
        )
    if zlib.crc32(memoryview(data)[_PRELUDE.size :]) != checksum:
        raise ValueError(
            f"The packed file is damaged or cut short: the checksum of its {len(data)} bytes does "
            "not match. Restore it from where it was copied."
        )
    try:
        start = _PRELUDE.size + length
        header = json.loads(_header(data[_PRELUDE.size : start]))
        found = []
        for block in header["blocks"]:
            streams = []
            for nbytes in block["streams"]:
                if type(nbytes) is not int or nbytes < 0:
                    raise ValueError(f"a stream of {nbytes!r} bytes")
                streams.append((start, nbytes))
                start += nbytes
            coding = block.get("coding", "exact")
            entries = tuple(
                Entry(n, tuple(shape), *counts) for n, shape, *counts in block["arrays"]
            )
            found.append(
                Block(
                    block["encoding"],
                    block["dtype"],
                    coding,
                    block["gaps"],
                    entries,
                    tuple(streams),
                    tuple(Entry(n, tuple(s), math.prod(s)) for n, s in block.get("floats", [])),
                )
            )
            _check(found[-1])
        if start != len(data):
            raise ValueError(f"its streams end at byte {start} of {len(data)}")
        names = [entry.name for block in found for entry in block.members]
        if len(set(names)) < len(names):
            raise ValueError("two arrays have the same name")
    except (zlib.error, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The header of the packed file is malformed: {error}.") from error
    return found


def _header(data: bytes) -> bytes:
    unpacker = zlib.decompressobj()
    text = unpacker.decompress(data, _LARGEST_HEADER + 1)
    if len(text) > _LARGEST_HEADER or not unpacker.eof or unpacker.unused_data:
        raise ValueError(f"its length is wrong or exceeds {_LARGEST_HEADER} bytes")
    return text


def _check(block: Block) -> None:
    """Checks that the header of a block is consistent.

    Raises:
        ValueError: If it contradicts itself.
    """
    sparse, coded = block.encoding == "sparse", block.coding != "exact"
    if block.encoding not in ("sparse", "dense"):
        raise ValueError(f"unknown encoding {block.encoding!r}")
    if coded and _CODES.get(block.coding) != block.dtype:
        raise ValueError(f"codes of kind {block.coding!r} with dtype {block.dtype!r}")
    if not block.entries:
        raise ValueError("a block without arrays")
    if not sparse and block.gaps != 0:
        raise ValueError(f"gaps in a dense block: {block.gaps!r}")
    if len(block.streams) != (1 if coded else dtype_of(block.dtype).itemsize + sparse):
        raise ValueError(f"{len(block.streams)} streams for {block.encoding} {block.dtype}")
    if block.floats and not coded:
        raise ValueError("floats in a block without codes")
    for i, entry in enumerate(block.members):
        numbers: tuple[Any, ...] = (*entry.shape, entry.values, entry.levels, block.gaps)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"counts of '{entry.name}' are {numbers}")
        if entry.levels > 0 and not coded:
            raise ValueError(f"a table for '{entry.name}', which has no codes")
        scaled = block.coding == "scales" and i < len(block.entries)
        if scaled and entry.shape[-1:] != (entry.levels,):
            raise ValueError(f"{entry.levels} scales for '{entry.name}' of shape {entry.shape}")
        if not isinstance(entry.name, str):
            raise ValueError(f"an array is named {entry.name!r}")
        if entry.values > entry.size or (not sparse and entry.values < entry.size):
            raise ValueError(f"{entry.values} values for '{entry.name}' of shape {entry.shape}")
    if sparse and not block.values <= block.gaps <= block.values + block.size // SKIP:
        raise ValueError(f"{block.gaps} gaps for {block.values} values of {block.size} elements")
    for count, (_, nbytes) in zip(block.counts, block.streams, strict=True):
        if count > _MOST_PER_BYTE * nbytes:
            raise ValueError(f"{nbytes} bytes cannot contain the {count} bytes of a stream")


def check_sizes(found: list[Block]) -> None:
    """Checks that arrays do not have more elements than the bytes can justify.

    Raises:
        ValueError: If they do.
    """
    for block in found:
        for entry in block.members:
            # NumPy supports neither; even in an empty array it limits the other lengths.
            lengths = math.prod(length for length in entry.shape if length)
            if len(entry.shape) > 64 or lengths >= 2**60:
                raise ValueError(f"The packed file is malformed: a shape of {entry.shape}.")
    unwritten = sum(
        max(0, block.size - SKIP * block.gaps) for block in found if block.encoding == "sparse"
    )
    if unwritten > _UNWRITTEN:
        raise ValueError(
            f"The packed file is malformed: it contains nothing for {unwritten} of the zeros that "
            f"its header announces; at most {_UNWRITTEN} are allowed."
        )
