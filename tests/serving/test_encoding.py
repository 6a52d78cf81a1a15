"""The packed format: arrays are restored bit for bit, and damage is detected."""

import math
import struct
import subprocess
import sys
import zlib

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from masked_layers import streams
from masked_layers.serving import codes, encoding, layout
from masked_layers.serving.encoding import DTYPES, blocks, choose, decode, encode
from masked_layers.streams import SKIP

pytestmark = pytest.mark.once

ENCODINGS = [None, "sparse", "dense"]


def dtype_of(name):
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def assert_same_bits(got, wanted):
    """Compares bits, with negative zeros of `wanted` made positive."""
    wanted = np.asarray(wanted)
    assert got.dtype == wanted.dtype.newbyteorder("=")
    assert got.shape == wanted.shape
    flat = wanted.ravel().astype(got.dtype).copy()
    with np.errstate(invalid="ignore"):  # Comparing a signalling NaN.
        flat[flat == np.zeros((), flat.dtype)] = 0
    np.testing.assert_array_equal(
        np.ascontiguousarray(got).ravel().view(np.uint8), flat.view(np.uint8)
    )


def round_trip(array, chosen=None, **kwargs):
    encodings = None if chosen is None else {"w": chosen}
    return decode(encode({"w": array}, encodings=encodings, **kwargs))["w"]


@st.composite
def sparse_arrays(draw):
    """Draws arrays of random bits (NaNs with payloads, infinities, -0.0) with many zeros."""
    dtype = dtype_of(draw(st.sampled_from(sorted(DTYPES))))
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=9))
    size = math.prod(shape)
    raw = draw(st.binary(min_size=size * dtype.itemsize, max_size=size * dtype.itemsize))
    if dtype.kind == "b":
        raw = bytes(byte & 1 for byte in raw)
    array = np.frombuffer(raw, dtype).reshape(shape)
    keep = draw(hnp.arrays(bool, shape))
    return np.where(keep, array, np.zeros((), dtype))


@given(st.dictionaries(st.text(max_size=8), sparse_arrays(), max_size=5), st.data())
@settings(max_examples=80)
def test_any_arrays_are_restored(arrays, data):
    encodings = {
        name: data.draw(st.sampled_from(["sparse", "dense"]))
        for name in arrays
        if data.draw(st.booleans())
    }
    level = data.draw(st.integers(0, 9))
    got = decode(encode(arrays, encodings=encodings, level=level))
    assert got.keys() == arrays.keys()
    for name, array in arrays.items():
        assert_same_bits(got[name], array)


@given(
    st.lists(st.sampled_from([0, 1, 253, 254, 255, 256, 257, 509, 510, 511, 65_536]), max_size=8),
    st.booleans(),
)
@example([], False)
@example([255], True)
@example([65_536, 254], False)
@settings(max_examples=60)
def test_runs_of_zeros_around_the_escape(runs, ends_with_value):
    parts = [part for run in runs for part in (np.zeros(run), [1.5])]
    if parts and not ends_with_value:
        parts = parts[:-1]
    array = np.concatenate([np.zeros(0), *parts]).astype(np.float32)
    assert_same_bits(round_trip(array, "sparse"), array)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 64), ("int8", 256)])
def test_few_zeros_are_stored_where_gaps_are_long(dtype, most):
    """As many as leave no gap of 255, if these are at most 256 bytes."""
    for zeros, stored in (([254, 509, 510], 3), ([255 * most], most), ([255 * most, 255], 0)):
        array = np.concatenate([np.append(np.zeros(gap), 1) for gap in zeros]).astype(dtype)
        data = encode({"w": array}, encodings={"w": "sparse"})
        (block,) = blocks(data)
        assert block.values == len(zeros) + stored
        offset, length = block.streams[0]
        assert (SKIP in zlib.decompress(data[offset : offset + length])) == (not stored)
        assert_same_bits(decode(data)["w"], array)


@pytest.mark.parametrize("chosen", ENCODINGS)
@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: np.zeros((0, 3)), id="empty"),
        pytest.param(lambda: np.zeros((7, 5)), id="all zero"),
        pytest.param(lambda: np.ones((7, 5)), id="all alive"),
        pytest.param(lambda: np.eye(1), id="one weight"),
        pytest.param(lambda: np.array(1.0), id="scalar"),
        pytest.param(lambda: np.eye(1, 1000, 999), id="last of 1000"),
    ],
)
def test_corner_cases(make, name, chosen):
    array = make().astype(dtype_of(name))
    assert_same_bits(round_trip(array, chosen), array)


@pytest.mark.parametrize("chosen", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["float16", "float32", "float64", "bfloat16"])
def test_special_values_keep_their_bits(name, chosen):
    dtype = dtype_of(name)
    info = ml_dtypes.finfo(dtype)
    array = np.array([np.nan, -np.nan, np.inf, -np.inf, 0.0, 1.0], dtype)
    limits = np.array([info.smallest_subnormal, -info.smallest_subnormal, info.max, info.tiny])
    array = np.concatenate([array, limits.astype(dtype)])
    assert_same_bits(round_trip(array, chosen), array)


@pytest.mark.parametrize("chosen", ["sparse", "dense"])
@pytest.mark.parametrize("name", ["float16", "float32", "float64", "bfloat16"])
def test_negative_zero_becomes_zero(name, chosen):
    got = round_trip(np.array([-0.0, 1.0, -0.0, -1.0], dtype_of(name)), chosen)
    assert np.signbit(got).tolist() == [False, False, False, True]


def test_memory_order_and_byte_order_do_not_matter():
    array = np.arange(12.0, dtype=">f4").reshape(3, 4)
    assert_same_bits(round_trip(array), array)
    assert_same_bits(round_trip(np.asfortranarray(array)), array)
    assert_same_bits(round_trip(array[:, ::-2]), array[:, ::-2])


def test_arrays_larger_than_a_block_and_many_blocks(monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK_SIZE", 1000)
    rng = np.random.default_rng(0)
    arrays = {
        str(i): np.where(rng.random(size) < 0.1, rng.standard_normal(size), 0.0)
        for i, size in enumerate([400, 3000, 400, 400, 0, 1])
    }
    data = encode(arrays, encodings=dict.fromkeys(arrays, "sparse"))
    assert len(blocks(data)) > 2
    for name, got in decode(data).items():
        assert_same_bits(got, arrays[name])


def test_the_header_describes_the_contents():
    arrays = {"a": np.eye(40, dtype=np.float32), "b": np.arange(1.0, 9.0)}
    sparse, dense = blocks(encode(arrays))
    assert (sparse.encoding, sparse.dtype, sparse.size, sparse.values) == (
        ("sparse", "float32", 1600, 40)
    )
    assert (dense.encoding, dense.dtype, dense.gaps, dense.values) == ("dense", "float64", 0, 8)
    assert [entry.shape for entry in sparse.entries] == [(40, 40)]


def test_shares_of_the_streams_add_up():
    rng = np.random.default_rng(0)
    arrays = {str(i): rng.standard_normal(100 * (i + 1)).astype(np.float32) for i in range(5)}
    (block,) = blocks(encode(arrays))
    assert sum(block.nbytes) == sum(length for _, length in block.streams)
    assert block.nbytes == sorted(block.nbytes)


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5])
def test_the_payload_is_below_entropy_plus_four_bytes(density):
    rng = np.random.default_rng(0)
    size = 200_000
    values = rng.standard_normal(size).astype(np.float32)
    array = np.where(np.abs(values) > np.quantile(np.abs(values), 1 - density), values, 0)
    entropy = -size * sum(p * math.log2(p) for p in (density, 1 - density)) / 8
    packed = len(encode({"w": array}, level=9))
    assert packed < entropy + 4 * density * size
    # Two bytes of the mantissa are noise that nothing can compress.
    assert packed > entropy + 2 * density * size


def test_the_choice_takes_fewer_bytes():
    rng = np.random.default_rng(0)
    for share in (0.0, 0.001, 0.01, 0.1, 0.5, 0.9):
        array = np.where(rng.random(50_000) < share, 0, rng.standard_normal(50_000))
        array = array.astype(np.float32)
        nbytes = {e: len(encode({"": array}, encodings={"": e})) for e in ("sparse", "dense")}
        assert nbytes[choose(array)] == min(nbytes.values()), share
    assert choose(rng.standard_normal(1000)) == "dense"


def test_the_same_arrays_give_the_same_bytes():
    array = np.eye(64, dtype=np.float32)
    assert encode({"w": array}) == encode({"w": array.copy()})


@pytest.mark.parametrize("array", [np.array(["a"]), np.zeros(2, complex), np.array([None])])
def test_other_dtypes_are_refused(array):
    with pytest.raises(TypeError, match="Cannot store array 'w' of dtype"):
        encode({"w": array})


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"integer from 0 to 9\. Received: 10"):
        encode({}, level=10)
    with pytest.raises(ValueError, match=r"must be 'sparse' or 'dense'\. Received: 'csr'"):
        encode({"w": np.ones(3)}, encodings={"w": "csr"})
    with pytest.raises(ValueError, match=r"arrays that do not exist: \['v'\]"):
        encode({"w": np.ones(3)}, encodings={"v": "sparse"})


# --- Damage ---------------------------------------------------------------------------------------

DATA = encode({"a": np.eye(40, dtype=np.float32), "b": np.arange(1.0, 9.0)})


@given(st.integers(0, len(DATA) - 1), st.integers(1, 255))
@settings(max_examples=120)
def test_every_flipped_byte_is_noticed(position, change):
    if 5 <= position < 8:
        return  # Three bytes are reserved.
    data = bytearray(DATA)
    data[position] ^= change
    with pytest.raises(ValueError, match=r"[Pp]acked file"):
        decode(bytes(data))


@given(st.integers(0, len(DATA) - 1))
@settings(max_examples=60)
def test_every_cut_is_noticed(length):
    with pytest.raises(ValueError, match="packed file"):
        decode(DATA[:length])


@given(st.binary(max_size=100))
def test_other_bytes_are_noticed(data):
    with pytest.raises(ValueError, match="packed file"):
        decode(data)


def test_another_version_is_reported():
    data = bytearray(DATA)
    data[4] = 9
    with pytest.raises(
        ValueError, match="format version 9, but this library reads versions 1 and 2"
    ):
        decode(bytes(data))


def forged(header, *streams):
    text = zlib.compress(header)
    body = b"".join([text, *streams])
    return struct.pack("<4sB3xII", b"MLSP", 1, len(text), zlib.crc32(body)) + body


@pytest.mark.parametrize(
    ("array", "streams"),
    [
        ('["w",[2],1]', [b"\x05", b"\x01"]),  # a value behind the end
        ('["w",[2],1]', [b"\xff", b"\x01"]),  # no value where one is announced
        ('["w",[2],1]', [b"\x00\x00", b"\x01"]),  # a longer stream than announced
        ('["w",[2],1]', [b"", b"\x01"]),  # a shorter one
        ('["w",[2],3]', [b"\x00", b"\x01"]),  # more values than elements
        ('["w",[-2],1]', [b"\x00", b"\x01"]),
        ('["w",[2]]', [b"\x00", b"\x01"]),
        ('["w",[2],1]', [b"\x00"]),  # a plane missing
    ],
)
def test_headers_that_lie_are_noticed(array, streams):
    packed = [zlib.compress(stream) for stream in streams]
    lengths = ",".join(str(len(stream)) for stream in packed)
    header = (
        f'{{"blocks":[{{"encoding":"sparse","dtype":"int8","gaps":1,"arrays":[{array}],'
        f'"streams":[{lengths}]}}]}}'
    )
    with pytest.raises(ValueError, match="packed file"):
        decode(forged(header.encode(), *packed))


@pytest.mark.parametrize(
    "header", [b"", b"[]", b"{}", b'{"blocks":[{"encoding":"x","dtype":"int8"}]}', b"\xff"]
)
def test_malformed_headers_are_noticed(header):
    with pytest.raises(ValueError, match="header of the packed file is malformed"):
        decode(forged(header))


def test_the_format_stands_alone():
    """Its two modules import with only numpy, without Keras, TensorFlow or the rest of this."""
    code = f"""
import importlib.util, sys, types
for name in ("keras", "tensorflow", "jax", "torch"):
    sys.modules[name] = None
sys.modules["masked_layers"] = types.ModuleType("masked_layers")
sys.modules["masked_layers.serving"] = types.ModuleType("masked_layers.serving")
for name, file in (
    ("masked_layers.streams", {streams.__file__!r}),
    ("masked_layers.serving.codes", {codes.__file__!r}),
    ("masked_layers.serving.layout", {layout.__file__!r}),
    ("encoding", {encoding.__file__!r}),
):
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
import numpy as np
array = np.eye(9, dtype="float32")
assert (module.decode(module.encode({{"w": array}}))["w"] == array).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
