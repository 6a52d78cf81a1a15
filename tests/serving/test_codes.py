"""Codes of one byte: what they stand for, their bytes in a packed file, and damage to them."""

import json
import math
import struct
import zlib

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from masked_layers.serving import codes
from masked_layers.serving.codes import Coded, clustered, scaled
from masked_layers.serving.encoding import blocks, decode, encode

pytestmark = pytest.mark.once


def kernel(shape=(40, 30), share=0.8, seed=0):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(shape) < share, 0, rng.standard_normal(shape)).astype("float32")


def read(data):
    """Decodes a packed file by its documented layout, in plain Python and NumPy."""
    magic, version, length, checksum = struct.unpack_from("<4sB3xII", data)
    assert magic == b"MLSP"
    assert zlib.crc32(data[16:]) == checksum
    header = json.loads(zlib.decompress(data[16 : 16 + length]))
    assert version == (2 if any("coding" in block for block in header["blocks"]) else 1)
    start, arrays = 16 + length, {}
    for block in header["blocks"]:
        streams = []
        for nbytes in block["streams"]:
            streams.append(zlib.decompress(data[start : start + nbytes]))
            start += nbytes
        table = b""
        if "coding" in block:
            (stream,) = streams
            edge = block["gaps"] + sum(values for _, _, values, _ in block["arrays"])
            streams, table = [stream[block["gaps"] : edge]], stream[edge:]
            if block["encoding"] == "sparse":
                streams.insert(0, stream[: block["gaps"]])
        gaps = streams.pop(0) if block["encoding"] == "sparse" else bytes(len(streams[0]))
        stored = np.frombuffer(bytes(sum(zip(*streams, strict=True), ())), block["dtype"])
        count = len(table) // 4
        numbers = [bytes(table[plane * count + i] for plane in range(4)) for i in range(count)]
        levels = np.frombuffer(b"".join(numbers), "<f4")
        flat, position, values = {}, 0, iter(stored)
        for gap in gaps:
            position += gap
            if gap < 255:
                flat[position] = next(values)
                position += 1
        first = taken = 0
        for name, shape, _, *length in block["arrays"]:
            size = math.prod(shape)
            found = np.array([flat.get(first + i, 0) for i in range(size)]).reshape(shape)
            first += size
            if length:
                joint = block["coding"] == "joint"
                own = levels if joint else levels[taken : taken + length[0]]
                taken += length[0]
                scales = block["coding"] == "scales"
                found = found.astype("float32") * own if scales else own[found.astype(int)]
            arrays[name] = found
        for name, shape in block.get("floats", []):
            arrays[name] = levels[taken : taken + math.prod(shape)].reshape(shape)
            taken += math.prod(shape)
    assert start == len(data)
    return arrays


@pytest.mark.parametrize("encoding", ["sparse", "dense"])
def test_the_file_has_the_documented_layout(encoding):
    arrays = {
        "a": scaled(kernel((3, 3, 8, 5))),
        "b": scaled(kernel((60, 7), 0.99)),
        "c": clustered(kernel((20, 30)), 5),
        # Too many values for one byte, or one table for all.
        "d": clustered(kernel((60, 30), seed=1), 8 if encoding == "dense" else 5),
        "e": clustered(kernel((20, 30), seed=2), 3),
        "f": kernel((5, 6)),
    }
    data = encode(arrays, encodings={**dict.fromkeys(arrays, encoding), "f": "dense"})
    kinds = {"dense": "codebook", "sparse": "joint"}
    assert [block.coding for block in blocks(data)] == ["scales", kinds[encoding]]
    assert [entry.name for block in blocks(data) for entry in block.floats] == ["f"]
    restored = decode(data)
    for name, array in read(data).items():
        assert restored[name].dtype == "float32"
        np.testing.assert_array_equal(restored[name], array)
        wanted = arrays[name].values() if isinstance(arrays[name], Coded) else arrays[name]
        np.testing.assert_array_equal(restored[name], wanted)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
MATRICES = hnp.arrays(
    "float32", hnp.array_shapes(min_dims=1, max_dims=3, max_side=8), elements=st.just(0) | FLOATS
)


@given(MATRICES)
@example(np.float32([3.402823e38]))
@settings(max_examples=200)
def test_int8_rounds_to_the_nearest_multiple_of_each_channels_scale(array):
    coded = scaled(array)
    values = coded.values().astype("float64")
    assert np.isfinite(values).all()
    assert (values[array == 0] == 0).all()
    assert not np.signbit(values[values == 0]).any()
    axes = tuple(range(array.ndim - 1))
    exact = (values == array).all(axis=axes)  # Multiples of a scale keep it.
    largest = np.abs(array).max(axis=axes).astype("float64")
    assert (coded.table >= largest / 127 * (1 - 1e-6)).all()
    assert (coded.table[largest == 0] == 0).all()
    normal = ~exact & (largest > 127 * np.finfo("float32").tiny)
    assert (coded.table[normal] <= largest[normal] / 127 * (1 + 2**-7)).all()
    # Scales have 8 significant bits, so their low bytes are zeros.
    assert not (coded.table[~exact].view("uint32") & 0xFFFF).any()
    assert (np.abs(values - array) <= coded.table.astype("float64") / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("most", [127, 7])
def test_multiples_of_any_scale_by_codes_of_8_or_4_bits_keep_it(most):
    rng = np.random.default_rng(0)
    whole = rng.integers(-most, most, (600, 40), endpoint=True).astype("float32")
    whole[0] = most
    scales = rng.uniform(1e-3, 1, 40).astype("float32")
    array = whole * scales
    array[500, :10] = scales[:10] / 2  # Only late in these channels is there another value.
    coded = scaled(array)
    np.testing.assert_array_equal(coded.values()[:, 10:], array[:, 10:])
    np.testing.assert_array_equal(coded.codes[:, 10:], whole[:, 10:])
    assert not (coded.table[:10].view("uint32") & 0xFFFF).any()


@given(MATRICES, st.integers(1, 8))
@settings(max_examples=200)
def test_codebooks_keep_zeros_and_take_the_nearest_value(array, bits):
    coded = clustered(array, bits)
    values = coded.values()
    assert len(coded.table) <= 2**bits
    assert coded.table[0] == 0
    np.testing.assert_array_equal(coded.codes == 0, array == 0)
    distances = np.abs(array[..., None].astype("float64") - coded.table[1:].astype("float64"))
    nearest = distances.min(axis=-1, initial=np.inf)
    kept = array != 0
    found = np.abs(values.astype("float64") - array)
    assert (found[kept] <= nearest[kept] * (1 + 1e-6)).all()
    if len(np.unique(array[kept])) <= 2**bits - 1:
        np.testing.assert_array_equal(values, array)


@pytest.mark.parametrize("bits", [2, 3, 5, 6])
def test_codebooks_are_about_as_good_as_those_of_scikit_learn(bits):
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.default_rng(0)
    # Without small weights, as after pruning, and with heavy tails.
    weights = rng.standard_t(6, 4000).astype("float32")
    weights[np.abs(weights) < 1] = 0
    points = weights[weights != 0].reshape(-1, 1)
    best = cluster.KMeans(2**bits - 1, n_init=10, random_state=0).fit(points).inertia_
    ours = np.square(clustered(weights, bits).values() - weights, dtype="float64").sum()
    assert ours < 1.02 * best


@pytest.mark.parametrize("outlier", [1e3, -1e6, 1e9, -1e10])
def test_a_huge_weight_leaves_values_for_the_others(outlier):
    array = kernel((100, 100), 0.3)
    usual = np.sqrt(np.mean((clustered(array, 5).values() - array) ** 2))
    array[0, 0] = outlier
    rest = (clustered(array, 5).values() - array).ravel()[1:]
    assert np.sqrt(np.mean(rest**2)) < 1.2 * usual


def test_no_group_of_values_spans_the_gap_around_zero():
    # All but one of them are in a single bin of the histogram.
    values = np.sort([*np.linspace(-3, -0.1, 703), *np.linspace(0.1, 0.9, 900), 1e6])
    sizes, means = codes._grouped(values)
    assert 703 in np.cumsum(sizes)
    parts = np.split(values, np.cumsum(sizes)[:-1])
    np.testing.assert_allclose(means, [part.mean() for part in parts], rtol=1e-9)
    assert len(sizes) <= codes._GROUPS


@pytest.mark.parametrize("step", [5e-324, 1e-45, 1e-40, 1e35])
def test_codebooks_of_the_smallest_and_largest_numbers(step):
    array = step * np.arange(-300.0, 300).reshape(60, 10)
    exact = array.astype("float32")
    values = clustered(array, 5).values()
    error = np.abs(values.astype("float64") - exact).max()
    assert error <= max(20 * step, 1.5e-45)


def test_a_scale_is_rounded_up_to_8_bits_only_if_it_has_more():
    array = np.array([[63.5, 127.0, 63.6], [0.3, 0.7, 0.3]], np.float32)
    # 63.6 / 127 is 0.50079; of 8 significant bits, the next number above 0.5 is 0.50390625.
    assert scaled(array).table.tolist() == [0.5, 1.0, 0.50390625]


def test_labels_name_the_bits():
    assert scaled(kernel()).label == "int8"
    assert [clustered(kernel(), bits).label for bits in (2, 5, 8)] == [
        "codebook-2", "codebook-5", "codebook-8"
    ]  # fmt: skip
    few = [clustered(np.arange(count) * 1.0, 8).label for count in (1, 2, 3, 4, 5, 16, 17)]
    assert few == [f"codebook-{bits}" for bits in (1, 1, 2, 2, 3, 4, 5)]


@pytest.mark.parametrize("share", [0.5, 0.9, 0.98])
def test_codes_take_about_their_entropy(share):
    """Of the mask and of the codes, as a Huffman code of whole symbols can reach it."""
    array = kernel((500, 400), share)
    for coded in (scaled(array), clustered(array, 5)):
        _, counts = np.unique(coded.codes[coded.codes != 0], return_counts=True)
        p = counts / counts.sum()
        entropy = -counts.sum() * (p * np.log2(p)).sum() / 8
        q = counts.sum() / array.size
        mask = -array.size * (q * np.log2(q) + (1 - q) * np.log2(1 - q)) / 8
        assert len(encode({"w": coded})) < 1.04 * (mask + entropy) + coded.table.nbytes + 300


# --- Damage ---------------------------------------------------------------------------------------

DATA = encode({"a": scaled(kernel()), "b": clustered(kernel(), 4), "c": kernel((3, 3))})


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=120)
def test_every_flipped_byte_is_noticed(position, change):
    if 5 <= position < 8:
        return  # Three bytes are reserved.
    data = bytearray(DATA)
    data[position] ^= change
    with pytest.raises(ValueError, match=r"[Pp]acked file"):
        decode(bytes(data))


def packed(coding, array, streams, dtype, gaps=0, **further):
    block = {
        **further,
        "encoding": "dense", "dtype": dtype, "coding": coding, "gaps": gaps,
        "arrays": [array] if array else [],
        "streams": [len(stream) for stream in streams],
    }  # fmt: skip
    header = zlib.compress(json.dumps({"blocks": [block]}).encode())
    body = b"".join([header, *streams])
    return struct.pack("<4sB3xII", b"MLSP", 2, len(header), zlib.crc32(body)) + body


Z = zlib.compress
TABLE = np.array([0, 1.5], "<f4")
PLANES = TABLE.view("uint8").reshape(2, 4).T.tobytes()
FOUR = np.array([0, 1.5, 3, -4], "<f4").view("uint8").reshape(4, 4).T.tobytes()


@pytest.mark.parametrize(
    ("coding", "array", "streams", "dtype"),
    [
        ("codebook", ["w", [2], 2, 2], [Z(b"\1\2" + PLANES)], "uint8"),  # a code beyond the table
        ("codebook", ["w", [2], 2, 0], [Z(b"\1\1")], "uint8"),  # no table
        ("codebook", ["w", [2], 2, 10**9], [Z(b"\1\1" + PLANES)], "uint8"),
        ("codebook", ["w", [2], 2, 3], [Z(b"\1\1" + PLANES)], "uint8"),  # a table that is too short
        ("codebook", ["w", [2], 2, -2], [Z(b"\1\1" + PLANES)], "uint8"),
        ("codebook", ["w", [2], 2], [Z(b"\1\1" + PLANES)], "uint8"),
        ("codebook", ["w", [2], 2, 2, 2], [Z(b"\1\1" + PLANES)], "uint8"),
        ("codebook", ["w", [2], 2, 2], [Z(b"\1\1" + PLANES)], "int8"),
        ("codebook", ["w", [2], 2, 2], [Z(b"\1\1"), Z(PLANES)], "uint8"),
        ("scales", ["w", [1, 3], 3, 2], [Z(b"\1\1\1" + PLANES)], "int8"),  # 2 scales, 3 channels
        ("scales", ["w", [], 1, 2], [Z(b"\1" + PLANES)], "int8"),
        ("scales", ["w", [2], 2, 2], [Z(b"\1\1" + PLANES)], "uint8"),
        ("exact", ["w", [2], 2, 2], [Z(b"\1\1")], "int8"),
        ("sums", ["w", [2], 2, 2], [Z(b"\1\1" + PLANES)], "int8"),
        (["scales"], ["w", [2], 2, 2], [Z(b"\1\1" + PLANES)], "int8"),
    ],
)
def test_headers_that_lie_about_codes_are_noticed(coding, array, streams, dtype):
    with pytest.raises(ValueError, match="packed file"):
        decode(packed(coding, array, streams, dtype))


@pytest.mark.parametrize(
    ("array", "stream", "gaps"),
    [
        ([], b"", 0), ([], b"", 0.5), ([], b"", -1),
        (["w", [2], 2, 2], b"\1\1" + PLANES, 0.5),
        (["w", [2], 2, 2], b"\1\1" + PLANES, "0"),
        (["w", [2], 2, 2], b"abc\1\1" + PLANES, 3),
    ],
)  # fmt: skip
def test_gaps_and_arrays_that_no_block_has_are_noticed(array, stream, gaps):
    with pytest.raises(ValueError, match="header of the packed file is malformed"):
        decode(packed("codebook", array, [Z(stream)], "uint8", gaps))


@pytest.mark.parametrize(
    ("coding", "floats"),
    [
        ("joint", [["b", [3]]]),
        ("joint", [["b", [2**40]]]),
        ("joint", [["w", [2]]]),
        ("joint", [["b", [-2]]]),
        ("joint", ["b"]),
        ("exact", [["b", [2]]]),
    ],
)
def test_headers_that_lie_about_floats_are_noticed(coding, floats):
    array = ["w", [2], 2, *([2] if coding == "joint" else [])]
    streams = [Z(b"\1\1" + FOUR)] if coding == "joint" else [Z(b"\1\1")]
    with pytest.raises(ValueError, match="packed file"):
        decode(packed(coding, array, streams, "uint8", floats=floats))
    got = decode(
        packed("joint", ["w", [2], 2, 2], [Z(b"\1\0" + FOUR)], "uint8", floats=[["b", [2]]])
    )
    assert got["w"].tolist() == [1.5, 0]
    assert got["b"].tolist() == [3, -4]


def test_forged_files_are_read_where_they_are_right():
    """Shows that the files above are refused for the stated reason."""
    got = decode(packed("codebook", ["w", [3], 3, 2], [Z(b"\1\0\1" + PLANES)], "uint8"))
    assert got["w"].tolist() == [1.5, 0, 1.5]
    got = decode(packed("scales", ["w", [2, 2], 4, 2], [Z(b"\1\2\3\xff" + PLANES)], "int8"))
    assert got["w"].tolist() == [[0, 3], [0, -1.5]]


def test_other_files_keep_the_first_version():
    assert encode({"w": kernel()})[4] == 1
    assert DATA[4] == 2
    assert [block.coding for block in blocks(DATA)] == ["scales", "exact", "joint"]
