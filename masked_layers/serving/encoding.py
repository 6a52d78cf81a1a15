"""A compact file format for sparse arrays: converts NumPy arrays to bytes and back, without loss.

Neither this module nor those that it imports depend on a model, so the format can also be used
outside a SavedModel. Every stream is plain zlib, the only entropy coder among TensorFlow's
own ops, so `graph.py` can decode the format inside a graph.

Layout, all integers little-endian:

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
array into the next. Where few zeros among the values save all skips, they are stored. Zeros after
the last value of the block are written only if there are more than `BLOCK_SIZE` of them, so that no
array is larger than its bytes can justify.

Values are stored as byte planes: a stream with the first byte of every value, one with the second
byte, and so on. Sign and exponent compress well, and most bytes of the mantissa do not.

Version 2 adds codes (`codes.py`), which stand for float32 values. Their blocks have two additions:

    {..., "coding": "scales", "arrays": [[name, shape, values, levels], ...], ...}

With `"scales"` the dtype is int8, and a value is its code times the scale at its index on the last
axis. With `"codebook"` the dtype is uint8, and a code is a position in the codebook, whose first
value is 0. With `"joint"`, which needs the fewest operations, it is a position in the codebooks of
all arrays of the block, one after the other. A block of codes has a single stream: the gaps, the
codes, and as float32 byte planes the scales or codebooks of all its arrays (`levels` is the length
of each) and the values of further arrays, which are dense:

    {..., "floats": [[name, shape], ...], ...}
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from masked_layers.serving.codes import Coded
from masked_layers.serving.layout import (
    Block,
    Coding,
    Encoding,
    Entry,
    assemble,
    blocks,
    check_sizes,
)
from masked_layers.streams import (
    DTYPES,
    SKIP,
    deflated,
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
    "Encoding",
    "Entry",
    "blocks",
    "canonical",
    "choose",
    "decode",
    "encode",
]

BLOCK_SIZE = 1 << 22
"""Number of elements at which a block is full, which limits the additional memory of decoding."""

_FEW_SKIPS = 256
"""Bytes of values up to which zeros are stored where gaps are long."""


def encode(
    arrays: Mapping[str, np.ndarray | Coded],
    *,
    encodings: Mapping[str, Encoding] | None = None,
    level: int = 6,
) -> bytes:
    """Packs named arrays into bytes, from which `decode` restores the same arrays.

    All values are preserved bit for bit, except that negative zero becomes zero. Codes are restored
    as the float32 values that they stand for.

    Args:
        arrays: Arrays by name, with any shape and any dtype in `DTYPES`, or codes.
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
    groups: _Groups = {}
    for name, given in arrays.items():
        member = _Member.of(name, given)
        encoding = (encodings or {}).get(name) or choose(member.array)
        if encoding not in ("sparse", "dense"):
            raise ValueError(
                f"The encoding of '{name}' must be 'sparse' or 'dense'. Received: {encoding!r}"
            )
        groups.setdefault((encoding, member.array.dtype.name, member.coding), []).append(member)

    _join_codebooks(groups)
    floats = _riders(groups)
    header, streams = [], []
    for (encoding, dtype, coding), members in groups.items():
        # Arrays of equal shape are adjacent, so that a reader can reshape them together.
        members.sort(key=_order)
        for block in _fill(members):
            flat = np.concatenate([member.array.ravel() for member in block])
            values, gaps, positions = _split(flat, encoding)
            counts = [member.array.size for member in block]
            if encoding == "sparse":
                ends = np.searchsorted(positions, np.cumsum(counts))
                counts = np.diff(ends, prepend=0).tolist()
            described = {"encoding": encoding, "dtype": dtype, "gaps": len(gaps)}
            if coding == "exact":
                raw = [*([gaps] if encoding == "sparse" else []), *planes_of(values)]
                packed = [_compress(stream.tobytes(), level) for stream in raw]
            else:
                described["coding"] = coding
                if floats:
                    described["floats"] = [[rider.name, rider.array.shape] for rider in floats]
                packed = [_compressed_codes(block, floats, gaps, values, counts, level)]
                floats = []  # The first block of codes has them all.
            described["arrays"] = [
                member.described(count) for member, count in zip(block, counts, strict=True)
            ]
            described["streams"] = [len(stream) for stream in packed]
            header.append(described)
            streams += packed
    return assemble(header, streams)


@dataclass(frozen=True, eq=False)
class _Member:
    """An array of a block: its values or codes, and the table of the codes."""

    name: str
    array: np.ndarray
    table: np.ndarray
    coding: Coding

    @classmethod
    def of(cls, name: str, given: np.ndarray | Coded) -> _Member:
        if isinstance(given, Coded):
            codes = np.asarray(given.codes, order="C")
            return cls(name, codes, given.table.astype(np.float32), given.coding)
        return cls(name, canonical(name, given), np.empty(0, np.float32), "exact")

    def described(self, values: int) -> list[Any]:
        """Returns the entry of the array in the header, with the number of its stored values."""
        levels = [] if self.coding == "exact" else [len(self.table)]
        return [self.name, self.array.shape, values, *levels]


_Groups = dict[tuple[Encoding, str, Coding], list[_Member]]


def _order(member: _Member) -> tuple[Any, ...]:
    return member.array.shape, len(member.table)


def _join_codebooks(groups: _Groups) -> None:
    """Makes codes positions in all codebooks of a block, if one byte is enough for these."""
    for key in [key for key in groups if key[2] == "codebook"]:
        encoding, dtype, _ = key
        members = groups[key]
        small = sum(member.array.size for member in members) <= BLOCK_SIZE
        if not small or sum(len(member.table) for member in members) > 256:
            continue
        joint, start = [], 0
        for member in sorted(members, key=_order):
            codes = (member.array.astype(int) + start).astype(np.uint8)
            if encoding == "sparse":  # Zeros are not stored.
                codes = np.where(member.array == 0, np.uint8(0), codes)
            joint.append(replace(member, array=codes, coding="joint"))
            start += len(member.table)
        groups[encoding, dtype, "joint"] = joint
        del groups[key]


def _riders(groups: _Groups) -> list[_Member]:
    """Takes from the groups the dense float32 arrays that a block of codes can contain as well."""
    key: tuple[Encoding, str, Coding] = "dense", "float32", "exact"
    coded = any(coding != "exact" for *_, coding in groups)
    if not coded or sum(member.array.size for member in groups.get(key, [])) > BLOCK_SIZE:
        return []
    return sorted(groups.pop(key, []), key=_order)


def _compressed_codes(
    block: list[_Member],
    floats: list[_Member],
    gaps: np.ndarray,
    values: np.ndarray,
    counts: list[int],
    level: int,
) -> bytes:
    """Returns the stream of a block of codes."""
    ends = np.cumsum(counts)[:-1]
    # Gaps up to the last value of each array.
    reached = np.searchsorted(np.cumsum(gaps != SKIP), ends) + 1
    numbers = [member.table for member in block] + [rider.array.ravel() for rider in floats]
    pieces = [
        np.split(gaps, np.minimum(reached, len(gaps))),
        np.split(values, ends),
        *([plane] for plane in planes_of(np.concatenate(numbers))),
    ]
    parts: list[bytes] = []
    for arrays in pieces:
        # Layers of other densities have other frequencies, but every table of codes takes space.
        apart, whole = [array.tobytes() for array in arrays], [np.concatenate(arrays).tobytes()]
        parts += min(apart, whole, key=lambda found: len(deflated(found, level)))
    return deflated(parts, level)


def decode(data: bytes) -> dict[str, np.ndarray]:
    """Unpacks the bytes that `encode` returned into arrays by name.

    The sizes in the header are checked before memory is allocated: no more is allocated than the
    number of bytes can justify.

    Raises:
        ValueError: If the bytes have another format or version, or are cut short or damaged.
    """
    found = blocks(data)
    check_sizes(found)
    arrays = {}
    for block in found:
        try:
            flat, numbers = _decode_block(data, block)
            parts = _parts(flat, [entry.size for entry in block.entries])
            sizes = [entry.levels for entry in block.entries]
            tables = _parts(numbers, [*sizes, *(entry.size for entry in block.floats)])
            for entry, part, levels in zip(block.entries, parts, tables, strict=False):
                array = part.reshape(entry.shape)
                if block.coding in ("scales", "codebook"):
                    array = Coded(block.coding, array, levels).values()
                arrays[entry.name] = array
            for entry, values in zip(block.floats, tables[len(sizes) :], strict=True):
                arrays[entry.name] = values.reshape(entry.shape)
        except MemoryError as error:
            raise ValueError(
                f"The packed file announces a block of {block.size} values of {block.dtype}, "
                "which does not fit into memory."
            ) from error
    return arrays


def _parts(flat: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(sizes)[:-1])


def _decode_block(data: bytes, block: Block) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values or codes of a block, zeros included, and its numbers, as flat arrays."""
    dtype = dtype_of(block.dtype)
    parts = [
        (data[offset : offset + length], count)
        for (offset, length), count in zip(block.streams, block.counts, strict=True)
    ]
    if max(block.counts) > BLOCK_SIZE:  # Checked before memory is allocated for any of them.
        for part in parts:
            _check_length(*part)
    streams = [np.frombuffer(_decompress(*part), np.uint8) for part in parts]
    numbers = np.empty(0, np.float32)
    if block.coding != "exact":
        gaps, values, planes = _parts(streams[0], block.parts)
        numbers = values_of(list(planes.reshape(4, -1)), np.dtype(np.float32))
        streams = [gaps, values]
    values = values_of(streams[-dtype.itemsize :], dtype)
    if block.coding == "joint":
        tables = numbers[: sum(entry.levels for entry in block.entries)]
        values = Coded("codebook", values, tables).values()
    if block.encoding == "sparse":
        values = _join(values, streams[0], block.size)
    return values, numbers


def choose(array: np.ndarray) -> Encoding:
    """Returns the encoding that takes fewer bytes, determined by compressing the array both ways.

    Random float32 weights break even at about 1 % zeros, depending on the positions of the zeros.

    Raises:
        TypeError: If the dtype is not in `DTYPES`.
    """
    array = canonical("", array)
    values, gaps, _ = _split(array.ravel(), "sparse")
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


def _fill(members: list[_Member]) -> list[list[_Member]]:
    filled: list[list[_Member]] = []
    room = -1
    for member in members:
        if member.array.size > room:
            filled.append([])
            room = BLOCK_SIZE
        filled[-1].append(member)
        room -= member.array.size
    return filled


def _split(flat: np.ndarray, encoding: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the values to store, and their gaps and positions, both empty in a dense block."""
    if encoding == "dense":
        return flat, np.empty(0, np.uint8), np.empty(0, np.intp)
    positions = np.flatnonzero(flat)
    behind = len(flat) - 1 - (positions[-1] if len(positions) else -1)
    if behind <= BLOCK_SIZE:
        behind, positions = 0, _without_skips(positions, _FEW_SKIPS // flat.itemsize)
    return flat[positions], gaps_between(positions, behind), positions


def _without_skips(positions: np.ndarray, most: int) -> np.ndarray:
    """Adds positions of zeros where gaps are longer than a byte, unless there are too many.

    Without skips, decoding takes fewer operations, which are about 200 bytes of a graph.
    """
    before = np.concatenate([[-1], positions])[:-1]
    zeros = (positions - before - 1) // SKIP
    if zeros.sum() > most:
        return positions
    added = [before[i] + SKIP * np.arange(1, zeros[i] + 1) for i in np.flatnonzero(zeros)]
    return np.sort(np.concatenate([positions, *added]))


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
