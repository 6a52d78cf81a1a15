"""Compressed streams of large parts, which are searched for repeats only if there are some."""

import zlib

import numpy as np
import pytest

from masked_layers import streams

RNG = np.random.default_rng(0)


@pytest.mark.once
def test_large_parts_are_searched_for_repeats_only_where_there_are_signs_of_some():
    exponents = RNG.normal(size=600_000).astype("float32").view("uint8")[3::4].tobytes()
    # Noise in every piece of the sample, and zeros between these.
    hidden = np.zeros(1_200_000, np.uint8)
    apart = (hidden.size - streams._PIECE) // (streams._PIECES - 1)
    for start in range(0, hidden.size, apart):
        hidden[start : start + streams._PIECE] = RNG.integers(0, 256, streams._PIECE)
    parts = [exponents, exponents[:1000] * 600, RNG.bytes(600_000), hidden.tobytes()]
    both = (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
    sizes = [[len(streams._block(part, 9, way)) for way in both] for part in parts]
    signs = [
        streams._has_repeats(part, 9, codes) for part, (codes, _) in zip(parts, sizes, strict=True)
    ]
    assert signs == [False, True, False, True]
    packed = streams.deflated(parts)
    assert zlib.decompress(packed) == b"".join(parts)
    least = sum(map(min, sizes))
    assert least <= len(packed) <= 1.001 * least
