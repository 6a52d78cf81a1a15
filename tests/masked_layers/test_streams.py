"""Compressed streams of large parts, which are searched for repeats only if there are some."""

import zlib

import numpy as np
import pytest

from masked_layers import streams

RNG = np.random.default_rng(0)


@pytest.mark.once
def test_large_parts_are_searched_for_repeats_only_where_a_sample_has_some():
    exponents = RNG.normal(size=600_000).astype("float32").view("uint8")[3::4].tobytes()
    parts = [exponents, exponents[:1000] * 600, RNG.bytes(600_000)]
    chosen = [streams._strategies(part, 9) for part in parts]
    codes, both = (zlib.Z_HUFFMAN_ONLY,), (zlib.Z_HUFFMAN_ONLY, zlib.Z_DEFAULT_STRATEGY)
    assert chosen == [codes, both, codes]
    packed = streams.deflated(parts)
    assert zlib.decompress(packed) == b"".join(parts)
    least = [min(len(streams._block(part, 9, way)) for way in both) for part in parts]
    assert sum(least) <= len(packed) <= 1.001 * sum(least)
