"""A compact, lossless file format for sparse arrays: converts NumPy arrays to bytes and back.

Neither this module nor `masked_layers.streams` depends on a model, so the format can also be used
outside a SavedModel. Every stream is plain zlib, the only entropy coder among TensorFlow's
own ops, so `saved_model.py` can decode the format inside a graph.

Layout, version 1, all integers little-endian:

    4 s  magic "MLSP"          B  version          3 x  zero
    I    bytes of the header   I  CRC-32 of everything that follows
    header: zlib of JSON {"blocks": [block, ...]}
    streams: one after the other, in the order of the blocks

A block contains arrays with the same dtype and encoding, flattened in C order and concatenated:

    {"encoding": "sparse", "dtype": "float32", "gaps": count,
     "arrays": [[name, shape, values], ...], "streams": [bytes, ...]}

A `dense` block contains all values. A `sparse` block contains only the non-zero values (`values` is
their number) and, before them, a stream of gaps, one byte each: 255 means "skip 255 zeros and
continue", a smaller number means "skip this many zeros, then read a value". Gaps continue from one
array into the next. Zeros after the last value of the block are written only if there are more than
`BLOCK_SIZE` of them, so that no array is larger than its bytes can justify.

Values are stored as byte planes: a stream with the first byte of every value, one with the second
byte, and so on. Sign and exponent compress well, and most bytes of the mantissa do not.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from masked_layers.streams import (
    DTYPES,
    SKIP,
    dtype_of,
    extent,
    gaps_between,
    planes_of,
    positions_of,
    values_of,
)

__all__ = [
    "BLOCK_SIZE",
    "DTYPES",
    "Block",
    "Entry",
    "blocks",
    "canonical",
    "choose",
    "decode",
    "encode",
]

Encoding = Literal["sparse", "dense"]

MAGIC = b"MLSP"
VERSION = 1
_PRELUDE = struct.Struct("<4sB3xII")
_LARGEST_HEADER = 1 << 24  # Bytes before compression, enough for about 200,000 arrays.
_MOST_PER_BYTE = 1032  # A zlib stream never expands to more bytes per byte.
# Maximum number of zeros that are not written. Files of earlier versions omit all zeros at the end
# of a block.
_UNWRITTEN = 1 << 24

BLOCK_SIZE = 1 << 22
"""Number of elements at which a block is full, which limits the additional memory of decoding."""


@dataclass(frozen=True)
class Entry:
    """One array of a block; `values` is the number of its stored values."""

    name: str
    shape: tuple[int, ...]
    values: int

    @property
    def size(self) -> int:
        """Number of elements, including zeros."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Block:
    """Arrays with the same dtype and encoding that share streams.

    Attributes:
        encoding: `"sparse"` or `"dense"`.
        dtype: Name of the dtype of the values, one of `DTYPES`.
        gaps: Length of the stream of gaps; 0 in a dense block.
        entries: The arrays, in the order in which they are concatenated.
        streams: (offset in the file, bytes) for each zlib stream: the gaps (sparse blocks only),
            then the planes from the least to the most significant byte.
    """

    encoding: Encoding
    dtype: str
    gaps: int
    entries: tuple[Entry, ...]
    streams: tuple[tuple[int, int], ...]

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
        return [self.gaps] * sparse + [self.values] * (len(self.streams) - sparse)

    @property
    def nbytes(self) -> list[int]:
        """Bytes of the streams, divided among the entries by their number of stored values."""
        total = sum(length for _, length in self.streams)
        edges = np.cumsum([0, *(entry.values for entry in self.entries)]) / max(self.values, 1)
        return np.diff(np.rint(edges * total).astype(np.int64)).tolist()


def encode(
    arrays: Mapping[str, np.ndarray],
    *,
    encodings: Mapping[str, Encoding] | None = None,
    level: int = 6,
) -> bytes:
    """Packs named arrays into bytes, from which `decode` restores the same arrays.

    All values are preserved bit for bit, except that negative zero becomes zero.

    Args:
        arrays: Arrays by name, with any shape and any dtype in `DTYPES`.
        encodings: Encodings by array name. Default for arrays without an entry: the result of
            `choose`.
        level: Compression level of zlib, 0 to 9.

    Returns:
        The packed bytes.

    Raises:
        TypeError: If an array has a dtype that is not in `DTYPES`.
        ValueError: If the level or an encoding is invalid, `encodings` names an unknown array, or
            there are too many arrays for one file (about 200,000).
    """
    if level not in range(10):
        raise ValueError(f"`level` must be an integer from 0 to 9. Received: {level!r}")
    if unknown := set(encodings or {}) - set(arrays):
        raise ValueError(f"`encodings` names arrays that do not exist: {sorted(unknown)}")
    groups: dict[tuple[Encoding, str], list[tuple[str, np.ndarray]]] = {}
    for name, array in arrays.items():
        array = canonical(name, array)
        encoding = (encodings or {}).get(name) or choose(array)
        if encoding not in ("sparse", "dense"):
            raise ValueError(
                f"The encoding of '{name}' must be 'sparse' or 'dense'. Received: {encoding!r}"
            )
        groups.setdefault((encoding, array.dtype.name), []).append((name, array))

    header, streams = [], []
    for (encoding, dtype), members in groups.items():
        # Arrays of equal shape are adjacent, so that a reader can reshape them together.
        members.sort(key=lambda member: member[1].shape)
        for block in _fill(members):
            flat = np.concatenate([array.ravel() for _, array in block])
            values, gaps = _split(flat, encoding)
            raw = [*([gaps] if encoding == "sparse" else []), *planes_of(values)]
            packed = [_compress(stream.tobytes(), level) for stream in raw]
            streams += packed
            header.append(
                {
                    "encoding": encoding,
                    "dtype": dtype,
                    "gaps": len(gaps),
                    "arrays": [
                        [
                            name,
                            array.shape,
                            int(np.count_nonzero(array)) if encoding == "sparse" else array.size,
                        ]
                        for name, array in block
                    ],
                    "streams": [len(stream) for stream in packed],
                }
            )
    plain = json.dumps({"blocks": header}, separators=(",", ":")).encode()
    if len(plain) > _LARGEST_HEADER:
        raise ValueError(
            f"The header for {len(arrays)} arrays has {len(plain)} bytes; at most "
            f"{_LARGEST_HEADER} are allowed. Use several files."
        )
    text = zlib.compress(plain, 9)
    body = b"".join([text, *streams])
    return _PRELUDE.pack(MAGIC, VERSION, len(text), zlib.crc32(body)) + body


def decode(data: bytes) -> dict[str, np.ndarray]:
    """Unpacks the bytes that `encode` returned into arrays by name.

    The sizes in the header are checked before memory is allocated: no more is allocated than the
    number of bytes can justify.

    Raises:
        ValueError: If the bytes have another format or version, or are cut short or damaged.
    """
    found = blocks(data)
    _check_sizes(found)
    arrays = {}
    for block in found:
        try:
            flat = _decode_block(data, block)
        except MemoryError as error:
            raise ValueError(
                f"The packed file announces a block of {block.size} values of {block.dtype}, "
                "which does not fit into memory."
            ) from error
        edges = np.cumsum([entry.size for entry in block.entries])[:-1]
        for entry, array in zip(block.entries, np.split(flat, edges), strict=True):
            arrays[entry.name] = array.reshape(entry.shape)
    return arrays


def blocks(data: bytes) -> list[Block]:
    """Reads the header, which lists the arrays and their positions, without decoding values.

    Raises:
        ValueError: If the bytes have another format or version, or are cut short or damaged.
    """
    if len(data) < _PRELUDE.size or data[:4] != MAGIC:
        raise ValueError(
            f"Not a packed file of sparse arrays: expected bytes that begin with {MAGIC!r}. "
            f"Received: {len(data)} bytes that begin with {bytes(data[:4])!r}."
        )
    _, version, length, checksum = _PRELUDE.unpack_from(data)
    if version != VERSION:
        raise ValueError(
            f"The packed file has format version {version}, but this library reads version "
            f"{VERSION}. Read it with the version of the library that wrote it."
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
            entries = tuple(Entry(name, tuple(s), n) for name, s, n in block["arrays"])
            found.append(
                Block(block["encoding"], block["dtype"], block["gaps"], entries, tuple(streams))
            )
            _check(found[-1])
        if start != len(data):
            raise ValueError(f"its streams end at byte {start} of {len(data)}")
        names = [entry.name for block in found for entry in block.entries]
        if len(set(names)) < len(names):
            raise ValueError("two arrays have the same name")
    except (zlib.error, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"The header of the packed file is malformed: {error}.") from error
    return found


def _decode_block(data: bytes, block: Block) -> np.ndarray:
    """Returns all values of a block, including zeros, as one flat array."""
    dtype = dtype_of(block.dtype)
    parts = [
        (data[offset : offset + length], count)
        for (offset, length), count in zip(block.streams, block.counts, strict=True)
    ]
    if max(block.counts) > BLOCK_SIZE:  # Checked before memory is allocated for any of them.
        for part in parts:
            _check_length(*part)
    streams = [np.frombuffer(_decompress(*part), np.uint8) for part in parts]
    values = values_of(streams[-dtype.itemsize :], dtype)
    return values if block.encoding == "dense" else _join(values, streams[0], block.size)


def choose(array: np.ndarray) -> Encoding:
    """Returns the encoding that takes fewer bytes, determined by compressing the array both ways.

    Random float32 weights break even at about 1 % zeros, depending on the positions of the zeros.

    Raises:
        TypeError: If the dtype is not in `DTYPES`.
    """
    array = canonical("", array)
    values, gaps = _split(array.ravel(), "sparse")
    if len(values) == array.size:
        return "dense"

    def cost(*streams: np.ndarray) -> int:
        # Level 1 ranks the two encodings like the best level and takes a tenth of the time.
        return sum(len(_compress(stream.tobytes(), 1)) for stream in streams)

    sparse = cost(gaps, *planes_of(values))
    # Planes of the dense encoding are compressed only until it takes more bytes.
    dense = 0
    for plane in planes_of(array.ravel()):
        dense += cost(plane)
        if dense > sparse:
            return "sparse"
    return "dense"


def canonical(name: str, array: np.ndarray) -> np.ndarray:
    """Returns the array as `decode` restores it: in C order and native byte order, +0 for -0.

    Args:
        name: Name of the array in messages.
        array: The array.

    Raises:
        TypeError: If the dtype is not in `DTYPES`.
    """
    array = np.asarray(array)
    if array.dtype.name not in DTYPES:
        raise TypeError(
            f"Cannot store array '{name}' of dtype {array.dtype}. Expected one of: "
            f"{', '.join(sorted(DTYPES))}."
        )
    array = array.astype(array.dtype.newbyteorder("="), order="C", copy=False)
    if array.dtype.kind not in "iub":
        with np.errstate(invalid="ignore"):  # For comparisons with a signaling NaN.
            negative = np.signbit(array) & (array == 0)
        if negative.any():
            array = np.where(negative, np.zeros((), array.dtype), array)
    return array


def _fill(members: list[tuple[str, np.ndarray]]) -> list[list[tuple[str, np.ndarray]]]:
    filled: list[list[tuple[str, np.ndarray]]] = []
    room = -1
    for member in members:
        if member[1].size > room:
            filled.append([])
            room = BLOCK_SIZE
        filled[-1].append(member)
        room -= member[1].size
    return filled


def _split(flat: np.ndarray, encoding: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values to store and the gaps between them (none in a dense block)."""
    if encoding == "dense":
        return flat, np.empty(0, np.uint8)
    positions = np.flatnonzero(flat)
    behind = len(flat) - 1 - (positions[-1] if len(positions) else -1)
    gaps = gaps_between(positions, behind if behind > BLOCK_SIZE else 0)
    return flat[positions], gaps


def _join(values: np.ndarray, gaps: np.ndarray, size: int) -> np.ndarray:
    """Restores a sparse block of `size` elements; the inverse of `_split`."""
    count, end = extent(gaps)
    if count != len(values) or end > size:
        raise ValueError(
            f"The packed file is malformed: {count} gaps for {len(values)} values, which end at "
            f"element {end} of {size}."
        )
    flat = np.zeros(size, values.dtype)
    taken = 0
    for positions in positions_of(gaps):
        flat[positions] = values[taken : taken + len(positions)]
        taken += len(positions)
    return flat


def _compress(data: bytes, level: int) -> bytes:
    # Gaps and mantissas have skewed symbols but no repeats, so a search for repeats only costs bits
    # (gaps at 80 % sparsity take 18 % more). Exponents at high sparsity have repeats.
    candidates = [zlib.compress(data, 0)]
    if level:
        for strategy in (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY):
            packer = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, 9, strategy)
            candidates.append(packer.compress(data) + packer.flush())
    return min(candidates, key=len)


def _decompress(data: bytes, size: int) -> bytes:
    unpacker = zlib.decompressobj()
    try:
        # One byte more than expected is enough to detect a stream that is too long.
        unpacked = unpacker.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"A stream of the packed file is malformed: {error}.") from error
    if len(unpacked) != size or not unpacker.eof:
        raise ValueError(
            f"A stream of the packed file is malformed: expected {size} bytes, received "
            f"{len(unpacked)}{'' if unpacker.eof else ' and more'}."
        )
    return unpacked


def _check_length(data: bytes, size: int) -> None:
    """Checks the length of a stream in little memory, by decompressing it piece by piece.

    Raises:
        ValueError: If the length differs from `size`, or the stream is malformed.
    """
    unpacker, found, piece = zlib.decompressobj(), 0, 1 << 16
    try:
        for start in range(0, len(data), piece):
            rest = data[start : start + piece]
            while rest and found <= size:
                found += len(unpacker.decompress(rest, BLOCK_SIZE))
                rest = unpacker.unconsumed_tail
    except zlib.error as error:
        raise ValueError(f"A stream of the packed file is malformed: {error}.") from error
    if found != size:
        raise ValueError(
            f"A stream of the packed file is malformed: expected {size} bytes, received "
            f"{'more' if found > size else found}."
        )


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
    sparse = block.encoding == "sparse"
    if block.encoding not in ("sparse", "dense"):
        raise ValueError(f"unknown encoding {block.encoding!r}")
    if len(block.streams) != dtype_of(block.dtype).itemsize + sparse:
        raise ValueError(f"{len(block.streams)} streams for {block.encoding} {block.dtype}")
    for entry in block.entries:
        numbers: tuple[Any, ...] = (*entry.shape, entry.values, block.gaps)
        if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
            raise ValueError(f"counts of '{entry.name}' are {numbers}")
        if not isinstance(entry.name, str):
            raise ValueError(f"an array is named {entry.name!r}")
        if entry.values > entry.size or (not sparse and entry.values < entry.size):
            raise ValueError(f"{entry.values} values for '{entry.name}' of shape {entry.shape}")
    if sparse and not block.values <= block.gaps <= block.values + block.size // SKIP:
        raise ValueError(f"{block.gaps} gaps for {block.values} values of {block.size} elements")
    for count, (_, nbytes) in zip(block.counts, block.streams, strict=True):
        if count > _MOST_PER_BYTE * nbytes:
            raise ValueError(f"{nbytes} bytes cannot contain the {count} bytes of a stream")


def _check_sizes(found: list[Block]) -> None:
    """Checks that arrays do not have more elements than the bytes can justify.

    Raises:
        ValueError: If they do.
    """
    for block in found:
        for entry in block.entries:
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
