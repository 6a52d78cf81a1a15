"""Arrays as compressed streams of bytes: gaps between kept entries, and values by byte planes.

The streams are those of packed weights (`serving/encoding.py`) and of ticket files.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

SKIP = 255
"""The gap that means 255 entries that are left out, and no kept one."""

CHUNK = 1 << 22
"""Number of gaps that are decoded together, which limits the additional memory."""

# A sample is of as many pieces, each with twice as many bytes as repeats may be apart.
_PIECES, _PIECE = 4, 1 << 16

DTYPES = frozenset(
    (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2"),
    )
)
"""Names of the dtypes that can be stored."""


def dtype_of(name: object) -> np.dtype:
    """Returns the dtype with a name from `DTYPES`.

    Raises:
        ValueError: If the name is another one.
    """
    if not isinstance(name, str) or name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}")
    if name.startswith(("bfloat", "float8")):
        import ml_dtypes

        return np.dtype(getattr(ml_dtypes, name))
    return np.dtype(name)


def gaps_between(positions: np.ndarray, behind: int = 0) -> np.ndarray:
    """Encodes increasing positions as the numbers of entries between them, one byte each.

    255 means "skip 255 entries and continue", a smaller number means "skip this many entries, then
    keep one".

    Args:
        positions: Positions of the kept entries.
        behind: Number of entries after the last kept one. They are written in units of 255; the
            rest of them is not.

    Returns:
        A uint8 array.
    """
    skipped = np.diff(positions, prepend=-1) - 1
    # A run is stored as 255s, as many as fit, and a byte for the rest.
    last = np.cumsum(skipped // SKIP + 1) - 1
    count = (last[-1] + 1 if len(last) else 0) + behind // SKIP
    gaps = np.full(count, SKIP, np.uint8)
    gaps[last] = skipped % SKIP
    return gaps


def extent(gaps: np.ndarray) -> tuple[int, int]:
    """Returns how many entries gaps keep, and how many entries they cover in all."""
    kept = int(np.count_nonzero(gaps != SKIP))
    return kept, int(gaps.sum(dtype=np.int64)) + kept


def positions_of(gaps: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the positions of kept entries in parts; the inverse of `gaps_between`."""
    end = -1
    for start in range(0, len(gaps), CHUNK):  # Positions need 8 times the memory of gaps.
        part = gaps[start : start + CHUNK]
        ends = end + np.cumsum(np.minimum(part.astype(np.int64) + 1, SKIP))
        yield ends[part != SKIP]
        end = ends[-1]


def planes_of(values: np.ndarray) -> np.ndarray:
    """Returns uint8 of shape (bytes per value, values), least significant byte first.

    Sign and exponent, together in a plane, compress well; most bytes of the mantissa do not.
    """
    little = np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<"), copy=False)
    return little.view(np.uint8).reshape(len(values), -1 if len(values) else values.itemsize).T


def values_of(planes: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """Returns the values of byte planes; the inverse of `planes_of`."""
    interleaved = np.stack(planes, axis=-1)
    return interleaved.view(dtype.newbyteorder("<")).ravel().astype(dtype, copy=False)


def deflated(parts: Iterable[bytes], level: int = 9) -> bytes:
    """Compresses parts to one zlib stream of the concatenated parts.

    Each part has its own codes, and is compressed with or without a search for repeats, whichever
    is smaller: gaps and mantissas have skewed symbols but no repeats, so that the search only costs
    bits, while exponents at a high sparsity have repeats. The search takes up to sixty times as
    long, so a large part is searched only if there are signs of repeats.
    """
    checksum, blocks = zlib.adler32(b""), []
    for part in parts:
        checksum = zlib.adler32(part, checksum)
        block = _block(part, level, zlib.Z_HUFFMAN_ONLY)
        if len(part) < 2 * _PIECES * _PIECE or _has_repeats(part, level, len(block)):
            block = min(block, _block(part, level, zlib.Z_DEFAULT_STRATEGY), key=len)
        blocks.append(block)
    return b"".join([b"\x78\xda", *blocks, b"\x03\x00", checksum.to_bytes(4, "big")])


def _has_repeats(part: bytes, level: int, size: int) -> bool:
    """Returns whether searching a part may make it smaller than `size`, that of its codes alone.

    A quick search of all of it finds long repeats anywhere. A thorough search of a sample finds
    short ones, if these are everywhere, and has to save over a thousandth.
    """
    if len(_block(part, 1, zlib.Z_DEFAULT_STRATEGY)) < size:
        return True
    apart = (len(part) - _PIECE) // (_PIECES - 1)
    sample = b"".join(part[i * apart : i * apart + _PIECE] for i in range(_PIECES))
    codes_only = len(_block(sample, level, zlib.Z_HUFFMAN_ONLY))
    return codes_only > 1.001 * len(_block(sample, level, zlib.Z_DEFAULT_STRATEGY))


def _block(part: bytes, level: int, strategy: int) -> bytes:
    packer = zlib.compressobj(level, zlib.DEFLATED, -zlib.MAX_WBITS, 9, strategy)
    # A flush ends at a whole byte, so that the next part can follow.
    return packer.compress(part) + packer.flush(zlib.Z_SYNC_FLUSH)


def inflated(data: bytes, most: int) -> bytes:
    """Decompresses a zlib stream of not more than `most` bytes.

    Raises:
        ValueError: If the stream is damaged, cut short or longer, or followed by other bytes.
    """
    unpacker = zlib.decompressobj()
    try:
        # One byte more than expected is enough to detect a stream that is too long.
        unpacked = unpacker.decompress(data, most + 1)
    except zlib.error as error:
        raise ValueError(f"a compressed stream is malformed: {error}") from error
    if len(unpacked) > most or not unpacker.eof or unpacker.unused_data:
        raise ValueError(
            f"a compressed stream of {len(data)} bytes does not end where expected, after at "
            f"most {most} bytes"
        )
    return unpacked
