"""Packed arrays and reports that are damaged or hostile: a ValueError, in little memory."""

import contextlib
import json
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from masked_layers.serving import encoding, layout
from masked_layers.serving.encoding import blocks, decode, encode
from masked_layers.serving.report import StorageReport, StorageRow

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
ARRAYS = {
    "a": np.where(RNG.random((60, 50)) < 0.02, RNG.standard_normal((60, 50)), 0).astype("float32"),
    "b": np.arange(1.0, 9.0),
    "c": np.zeros((0, 3), "int8"),
}
DATA = encode(ARRAYS)
HEADER = 16


def sealed(header, *streams):
    """Returns a packed file with a correct checksum for any header."""
    body = b"".join([header, *streams])
    return struct.pack("<4sB3xII", b"MLSP", 1, len(header), zlib.crc32(body)) + body


def packed(gaps, arrays, streams, encoding="sparse", dtype="int8", lengths=None):
    block = {
        "encoding": encoding, "dtype": dtype, "gaps": gaps, "arrays": arrays,
        "streams": lengths or [len(stream) for stream in streams],
    }  # fmt: skip
    return sealed(zlib.compress(json.dumps({"blocks": [block]}).encode()), *streams)


def assert_refused(data, megabytes=64, match="packed file"):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=match):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()


Z = zlib.compress
MANY = 10**9
NESTED = {
    "lists": b'{"blocks":' + b"[" * 100_000,
    "an integer of many digits": b'{"blocks":[{"gaps":' + b"9" * 10_000 + b"}]}",
    "numbers that are none": b'{"blocks":[{"encoding":"dense","dtype":"int8","gaps":NaN,'
    b'"arrays":[["w",[1],1]],"streams":[1]}]}',
}
HOSTILE = {
    "a header of zeros": lambda: sealed(Z(bytes(2 * 10**8), 1)),
    "a header of spaces in a long file": lambda: sealed(Z(b" " * 10**8, 1), bytes(10**6)),
    "values beyond the bytes": lambda: packed(0, [["w", [MANY], MANY]], [Z(b"1")], "dense"),
    "a plane that ends early": lambda: packed(
        0, [["w", [10**8], 10**8]], [Z(bytes(10**8), 1), Z(bytes(10**8 - 1), 1)], "dense", "int16"
    ),
    "a plane that goes on": lambda: packed(
        0, [["w", [10**8], 10**8]], [Z(bytes(10**8), 1), Z(bytes(10**8 + 1), 1)], "dense", "int16"
    ),
    "zeros that nothing stands for": lambda: packed(1, [["w", [MANY], 1]], [Z(b"\0"), Z(b"1")]),
    "more elements than there are": lambda: packed(
        1, [["w", [2**31, 2**31, 4], 1]], [Z(b"\0"), Z(b"1")]
    ),
    "an empty array of long sides": lambda: packed(0, [["w", [0, 2**62, 2**62], 0]], [Z(b"")] * 2),
    "more gaps than zeros": lambda: packed(10**8, [["w", [9], 1]], [Z(bytes(10**8), 1), Z(b"1")]),
    "a run beyond the end": lambda: packed(2, [["w", [300], 1]], [Z(b"\xff\x63"), Z(b"1")]),
    "streams of negative length": lambda: packed(
        1, [["w", [2], 1]], [Z(b"\0"), Z(b"1")], lengths=[30, -12]
    ),
    "two arrays of one name": lambda: packed(
        2, [["w", [1], 1], ["w", [1], 1]], [Z(b"\0\0"), Z(b"12")]
    ),
    "a name that is none": lambda: packed(1, [[["w"], [1], 1]], [Z(b"\0"), Z(b"1")]),
    "lengths of truth": lambda: packed(1, [["w", [True], 1]], [Z(b"\0"), Z(b"1")]),
    "65 axes": lambda: packed(1, [["w", [1] * 65, 1]], [Z(b"\0"), Z(b"1")]),
    **{name: lambda text=text: sealed(Z(text)) for name, text in NESTED.items()},
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_sizes_announced_by_a_header_are_not_trusted(kind):
    assert_refused(HOSTILE[kind]())


def test_forged_files_are_read_where_they_are_right():
    """Shows that the files above are refused for the stated reason."""
    got = decode(packed(2, [["w", [300], 1]], [Z(b"\xff\x07"), Z(b"1")]))["w"]
    assert got.tolist() == [0] * 262 + [49] + [0] * 37


@given(st.data())
@settings(max_examples=300)
def test_damage_that_the_checksum_fits_is_noticed_or_changes_nothing(data):
    """Restores all checksums, as if every file had been sealed after it was damaged."""
    text = bytearray(zlib.decompress(DATA[HEADER : HEADER + struct.unpack_from("<I", DATA, 8)[0]]))
    streams = bytearray(DATA[HEADER + struct.unpack_from("<I", DATA, 8)[0] :])
    for part in data.draw(st.lists(st.sampled_from([text, streams]), min_size=1, max_size=3)):
        if data.draw(st.booleans()):
            part[data.draw(st.integers(0, len(part) - 1))] ^= data.draw(st.integers(1, 255))
        else:
            del part[data.draw(st.integers(1, max(1, len(part) - 1))) :]
    forged = sealed(zlib.compress(bytes(text)), bytes(streams))
    tracemalloc.start()
    try:
        with contextlib.suppress(ValueError):
            assert all(isinstance(array, np.ndarray) for array in decode(forged).values())
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200 << 20


@pytest.mark.parametrize("length", range(0, len(DATA), 7))
def test_every_cut_is_noticed(length):
    with pytest.raises(ValueError, match="packed file"):
        decode(DATA[:length])


def test_zeros_at_the_end_are_written_where_they_are_many(monkeypatch):
    monkeypatch.setattr(encoding, "BLOCK_SIZE", 1000)
    few, many = np.eye(1, 1255, dtype="int8")[0], np.eye(1, 5101, dtype="int8")[0]
    # 255 zeros are a gap of their own, and 254 are none.
    cases = [(few[:1001], 1), (few[:1002], 4), (few[:1020], 4), (few[:1021], 5), (few, 5)]
    cases += [(many, 21), (many * 0, 20), (many[:5099] * 0, 19), (many[:1000] * 0, 0)]
    for array, gaps in cases:
        data = encode({"w": array}, encodings={"w": "sparse"})
        assert blocks(data)[0].gaps == gaps
        got = decode(data)["w"]
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(got, array)


def test_files_of_before_end_with_the_last_value():
    """Version 1 left out trailing zeros. A few million of them are no reason to refuse a file."""
    got = decode(packed(1, [["w", [4000, 4000], 1]], [Z(b"\x05"), Z(b"1")]))["w"]
    assert got.shape == (4000, 4000)
    assert np.flatnonzero(got).tolist() == [5]


def test_arrays_of_many_blocks_of_gaps(monkeypatch):
    array = np.where(RNG.random(30_000) < 0.01, 1, 0).astype("int16")
    data = encode({"w": array}, encodings={"w": "sparse"})
    monkeypatch.setattr(encoding, "BLOCK_SIZE", 64)
    np.testing.assert_array_equal(decode(data)["w"], array)


@pytest.mark.parametrize(("number", "received"), [(999, "999"), (1001, "more"), (40_000, "more")])
def test_lengths_of_long_streams_are_checked_first(number, received, monkeypatch):
    data = packed(0, [["w", [1000], 1000]], [Z(bytes(number))], "dense")
    monkeypatch.setattr(encoding, "BLOCK_SIZE", 500)
    monkeypatch.setattr(encoding, "_decompress", None)
    with pytest.raises(ValueError, match=f"expected 1000 bytes, received {received}"):
        decode(data)


def test_a_header_for_too_many_arrays_is_refused(monkeypatch):
    monkeypatch.setattr(layout, "_LARGEST_HEADER", 1000)
    decode(encode({str(i): np.zeros(2) for i in range(20)}))
    with pytest.raises(ValueError, match=r"header for 200 arrays has \d+ bytes; at most 1000"):
        encode({str(i): np.zeros(2) for i in range(200)})


# --- Reports --------------------------------------------------------------------------------------

REPORT = StorageReport(
    rows=(StorageRow("a/kernel", (3, 4), "float32", "sparse", 5, 31),),
    dense_nbytes=48,
    files={"saved_model.pb": 1234, "assets/weights.mlsp": 99},
    output_error=1e-7,
)


def mutated(path, value):
    content = json.loads(REPORT.to_json())
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize("value", [None, "x", -1, 1.5, [], {}, [[]], True, 2**70])
@pytest.mark.parametrize(
    "path",
    [
        ("rows",), ("columns",), ("files",), ("dense_nbytes",), ("values",), ("rows", 0),
        ("columns", 1), ("files", "saved_model.pb"), *(("rows", 0, cell) for cell in range(6)),
        ("more",),
    ],
)  # fmt: skip
def test_reports_of_other_things_are_refused(path, value):
    shape = ("rows", 0, 1)
    texts = {("rows", 0, 0), ("rows", 0, 2), ("rows", 0, 3), ("values",)}
    empty = (path == ("rows",) and value in ([], {})) or (path == ("files",) and value == {})
    if empty or (path in texts and value == "x"):
        str(StorageReport.from_json(mutated(path, value)))  # Another report.
        return
    if path == shape and value == []:
        value = [1]  # 5 of them are not zero.
    with pytest.raises(ValueError, match="Not a storage report"):
        StorageReport.from_json(mutated(path, value))


@given(st.integers(0, len(REPORT.to_json()) - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=200)
def test_a_damaged_report_is_refused_or_prints(position, byte, cut):
    data = bytearray(REPORT.to_json())
    data[position] = byte
    with contextlib.suppress(ValueError):
        assert str(StorageReport.from_json(bytes(data[:position] if cut else data)))


# --- In a SavedModel ------------------------------------------------------------------------------


def test_a_graph_decodes_zeros_that_are_written(monkeypatch, tmp_path):
    import keras

    import masked_layers as ml

    monkeypatch.setattr(encoding, "BLOCK_SIZE", 500)
    model = keras.Sequential([keras.Input((40,)), keras.layers.Dense(50)])
    kernel = np.eye(40, 50, dtype="float32")
    kernel[4:] = 0  # 1,796 zeros behind the last value
    model.set_weights([kernel, np.zeros(50)])
    report = ml.export_sparse_saved_model(model, tmp_path / "served")
    assert report.output_error == 0  # Every bit of every weight is also compared.
    found = blocks((tmp_path / "served" / "assets" / "weights.mlsp").read_bytes())
    assert max(block.gaps - block.values for block in found) == 7
