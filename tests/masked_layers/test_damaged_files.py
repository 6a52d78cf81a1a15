"""Damaged or hostile files of masks and data: an error that names them."""

import contextlib
import gzip
import io
import pickle
import struct
import tarfile
import tracemalloc
import zipfile

import h5py
import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import masked_layers as ml
from masked_layers.archives import read_npz
from masked_layers.keras_files import load_model

pytest.importorskip("tyro")

from lottery_ticket_pruner.experiments import datasets

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
LABELS = np.arange(60) % 10
IMAGES = RNG.integers(0, 256, (60, 5, 4), dtype="uint8")
ARRAYS = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES, "y_test": LABELS}
MEGABYTES = 30


@contextlib.contextmanager
def little_memory():
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MEGABYTES << 20
    finally:
        tracemalloc.stop()


def stored(compressed, **arrays):
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and one[key].tobytes() == other[key].tobytes()
        for key in one
    )


# --- .npz -----------------------------------------------------------------------------------------

KINDS = {
    "numbers": np.arange(12.0).reshape(3, 4),
    "columns": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "text": np.array("text"),
    "nothing": np.zeros((0, 3), "int8"),
    "one": np.array(3.5, "float16"),
    "a/b": np.array([True, False]),
}


@pytest.mark.parametrize("compressed", [True, False])
def test_arrays_are_read_as_numpy_reads_them(tmp_path, compressed):
    (tmp_path / "a.npz").write_bytes(stored(compressed, **KINDS))
    got = read_npz(tmp_path / "a.npz")
    assert list(got) == list(KINDS)
    for name, array in KINDS.items():
        assert got[name].shape == array.shape
        assert got[name].flags.writeable
        np.testing.assert_array_equal(got[name], array, strict=True)


def test_arrays_of_a_file_of_gigabytes_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 99)  # Lower, so that the file is written like one.
    np.savez(tmp_path / "a.npz", **KINDS)
    assert b"PK\x06\x06" in (tmp_path / "a.npz").read_bytes()
    assert same(read_npz(tmp_path / "a.npz"), KINDS)


STORED = {compressed: stored(compressed, **KINDS) for compressed in (True, False)}


@pytest.mark.parametrize("compressed", [True, False])
@given(data=st.data())
@settings(max_examples=100)
def test_a_damaged_npz_is_refused_or_says_the_same(tmp_path_factory, compressed, data):
    content = bytearray(STORED[compressed])
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file = tmp_path_factory.getbasetemp() / "damaged.npz"
    file.write_bytes(content)
    with little_memory():
        try:
            got = read_npz(file)
        except ml.FileContentError as error:
            assert str(file) in str(error)  # noqa: PT017
        else:  # Names have no checksum; what is under them has.
            assert same(dict(enumerate(got.values())), dict(enumerate(KINDS.values())))


def member(header, data=b""):
    text = repr(header).encode().ljust(118 - 1) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def archive(*members, **options):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as made:
        for number, content in enumerate(members):
            made.writestr(f"{options.get('name', number)}.npy", content)
    return file.getvalue()


def header(shape, descr="|u1"):
    return {"descr": descr, "fortran_order": False, "shape": shape}


def overlapping():
    """Twenty entries, all of which are the bytes of the first."""
    content = archive(*[member(header((10**7,)), bytes(10**7))] * 20)
    made = zipfile.ZipFile(io.BytesIO(content))
    end = content.rindex(b"PK\x05\x06")
    central = content.index(b"PK\x01\x02")
    first = bytearray(content[: made.infolist()[1].header_offset])
    directory = b""
    for entry in content[central:end].split(b"PK\x01\x02")[1:]:
        entry = bytearray(b"PK\x01\x02" + entry)
        entry[42:46] = bytes(4)  # where its data are
        directory += entry
    tail = bytearray(content[end:])
    tail[12:20] = struct.pack("<II", len(directory), len(first))
    return bytes(first + directory + tail)


def hidden():
    """An entry that another one seems to have as its comment, with another signature."""
    content = bytearray(archive(member(header((1,)), b"1"), member(header((1,)), b"2")))
    first, second = content.index(b"PK\x01\x02"), content.rindex(b"PK\x01\x02")
    end = content.rindex(b"PK\x05\x06")
    content[first + 32 : first + 34] = struct.pack("<H", end - second)
    content[second] ^= 1
    return bytes(content)


HOSTILE = {
    "a hidden entry": hidden,
    "an empty archive behind it": lambda: archive(member(header((1,)), b"1")) + archive(),
    "an empty archive with a comment": lambda: archive()[:-2] + b"\x63\x00" + bytes(99),
    "more values than bytes": lambda: archive(member(header((10**12,)), b"1")),
    "a negative length": lambda: archive(member(header((-1,)), b"1")),
    "objects": lambda: archive(member(header((1,), "|O"), pickle.dumps([print]))),
    "no bytes each": lambda: archive(member(header((10**12,), "|V0"))),
    "nested brackets": lambda: archive(
        b"\x93NUMPY\x01\x00" + struct.pack("<H", 9000) + b"(" * 9000
    ),
    "a long header": lambda: archive(
        b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**32 - 1) + bytes(99)
    ),
    "no array": lambda: archive(b"text"),
    "entries that share bytes": overlapping,
    "two of one name": lambda: _twice(),
    "an array and no archive": lambda: member(header((1,)), b"1"),
    "nothing": lambda: b"",
}


def _twice():
    with pytest.warns(UserWarning, match="Duplicate name"):
        return archive(member(header((1,)), b"1"), member(header((1,)), b"2"), name="w")


@pytest.mark.parametrize("kind", HOSTILE)
def test_sizes_announced_by_an_npz_are_not_trusted(tmp_path, kind):
    file = tmp_path / "hostile.npz"
    file.write_bytes(HOSTILE[kind]())
    with (
        little_memory(),
        pytest.raises(ml.FileContentError, match=r"hostile\.npz' is not an \.npz file"),
    ):
        read_npz(file)


def test_an_npz_takes_no_more_memory_than_is_allowed(tmp_path):
    file = tmp_path / "zeros.npz"
    np.savez_compressed(file, zeros=np.zeros(10**8, "uint8"))
    with little_memory(), pytest.raises(ValueError, match=r"100000128 bytes; at most 1000"):
        read_npz(file, limit=1000)


def test_a_missing_npz_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "missing.npz")


# --- Masks ----------------------------------------------------------------------------------------


def masked():
    model = keras.Sequential([keras.Input((7,)), keras.layers.Dense(5), keras.layers.Dense(3)])
    model = ml.convert_to_masked(model)
    masks = {path: RNG.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model, masks


@given(data=st.data())
@settings(max_examples=60)
def test_damaged_masks_are_refused_or_the_same(tmp_path_factory, data):
    model, masks = MODEL
    file = tmp_path_factory.getbasetemp() / "masks.npz"
    ml.save_masks(model, file)
    content = bytearray(file.read_bytes())
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with little_memory(), contextlib.suppress(ml.FileContentError):
        ml.load_masks(model, file)
    assert same(ml.get_masks(model), masks)


MODEL = masked()


def test_hostile_masks_are_refused(tmp_path):
    model, _ = MODEL
    path = next(iter(ml.get_masks(model)))
    file = tmp_path / "masks.npz"
    np.savez_compressed(
        file, **{f"shape/{path}": np.array([8 * 10**8]), f"bits/{path}": np.zeros(10**8, "uint8")}
    )
    with little_memory(), pytest.raises(ml.FileContentError, match=r"masks\.npz.*at most"):
        ml.load_masks(model, file)


# --- Models of Keras ------------------------------------------------------------------------------

HOSTILE_CONFIGS = {
    "announces 400000000000 bytes, but has 0": {"shape": (10**6, 10**5), "chunks": (1000, 1000)},
    "announces 4000000000 bytes, but has 0": {"shape": (10**6, 10**3)},
    "are in another file": {"shape": (4, 3), "external": [("secret", 0, 48)]},
    "is a link": h5py.ExternalLink("secret.h5", "/values"),
}


@pytest.mark.parametrize("suffix", ["keras", "compressed.keras", "h5"])
def test_hostile_weights_of_keras_are_refused(tmp_path, suffix):
    layer = keras.layers.Dense(3, name="d")
    model = keras.Sequential([keras.Input((4,)), layer], name="sequential")
    file = tmp_path / f"model.{suffix}"
    model.save(file)
    whole = file.read_bytes()
    for message, hostile in [("", None), *HOSTILE_CONFIGS.items()]:
        content = io.BytesIO(whole)
        if suffix == "h5":
            change(content, "model_weights/d/sequential/d/kernel", hostile)
        else:
            with zipfile.ZipFile(io.BytesIO(whole)) as old:
                parts = {name: io.BytesIO(old.read(name)) for name in old.namelist()}
            change(parts["model.weights.h5"], "layers/dense/vars/0", hostile)
            kind = zipfile.ZIP_DEFLATED if "compressed" in suffix else zipfile.ZIP_STORED
            with zipfile.ZipFile(content := io.BytesIO(), "w", kind) as new:
                for name, part in parts.items():
                    new.writestr(name, part.getvalue())
        file.write_bytes(content.getvalue())
        if hostile is None:
            assert same_weights(load_model(file), model)
            continue
        with pytest.raises(ml.FileContentError, match=message):
            load_model(file)


def change(file, path, hostile):
    with h5py.File(file, "r+") as stored:
        if hostile is None:
            return
        del stored[path]
        if isinstance(hostile, dict):
            stored.create_dataset(path, dtype="float32", **hostile)
        else:
            stored[path] = hostile


def same_weights(one, other):
    return all(map(np.array_equal, one.get_weights(), other.get_weights()))


def test_a_hostile_config_of_keras_is_refused_unread(tmp_path):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save(tmp_path / "model.keras")
    with zipfile.ZipFile(tmp_path / "model.keras") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(tmp_path / "large.keras", "w", zipfile.ZIP_DEFLATED) as new:
        for name, part in parts.items():
            new.writestr(name, part + bytes(1 << 27) if name == "config.json" else part)
    with little_memory(), pytest.raises(ml.FileContentError, match=r"config\.json' announces"):
        load_model(tmp_path / "large.keras")


# --- Data sets ------------------------------------------------------------------------------------


def idx(array, shape=None):
    shape = shape or array.shape
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + array.tobytes()


IDX = {
    "train-images-idx3-ubyte.gz": gzip.compress(idx(IMAGES), mtime=0),
    "train-labels-idx1-ubyte.gz": gzip.compress(idx(LABELS.astype("uint8")), mtime=0),
    "t10k-images-idx3-ubyte": idx(IMAGES),
    "t10k-labels-idx1-ubyte": idx(LABELS.astype("uint8")),
}


def fuzzed(data, content):
    content = bytearray(content)
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    return content


@given(data=st.data(), name=st.sampled_from([*IDX, "mnist.npz"]))
@settings(max_examples=80)
def test_damaged_mnist_is_named(tmp_path_factory, data, name):
    folder = tmp_path_factory.mktemp("mnist", numbered=True)
    for other, content in IDX.items():
        (folder / other).write_bytes(content)
    content = IDX[name] if name in IDX else stored(True, **ARRAYS)
    (folder / name).write_bytes(fuzzed(data, content))
    with little_memory():
        try:
            datasets.load("mnist", folder)
        except ml.FileContentError as error:
            assert name.partition("-idx")[0] in str(error)  # noqa: PT017


def test_idx_files_of_hostile_size_are_refused(tmp_path):
    for name, content in IDX.items():
        (tmp_path / name).write_bytes(content)
    hostile = {
        "t10k-images-idx3-ubyte": idx(IMAGES, (2**32 - 1, 2**16, 2**16)),
        "train-images-idx3-ubyte.gz": gzip.compress(idx(IMAGES) + bytes(10**8)),
    }
    for name, content in hostile.items():
        (tmp_path / name).write_bytes(content)
        with little_memory(), pytest.raises(ValueError, match=f"{name}.*should hold"):
            datasets.load("mnist", tmp_path)
        (tmp_path / name).write_bytes(IDX[name])


def batch(number):
    rows = IMAGES[:, :4, :4].reshape(60, -1).repeat(192, 1)
    labels = (LABELS + number) % 10
    content = {
        b"data": rows,
        b"labels": labels.tolist(),
        b"filenames": [b"f%d" % n for n in LABELS],
    }
    return pickle.dumps(content, protocol=2)


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar") / "cifar-10-batches-py"
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for number, name in enumerate(names):
        (folder / name).write_bytes(batch(number))
    return folder


@given(data=st.data())
@settings(max_examples=60)
def test_a_damaged_cifar_batch_is_named(cifar, data):
    file = cifar / "data_batch_2"
    whole = batch(1)
    head = data.draw(st.booleans())  # Most of the bytes are pixels.
    position = data.draw(st.integers(0, 150 if head else len(whole) - 1))
    content = bytearray(whole)
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[-position if head and data.draw(st.booleans()) else position] ^= data.draw(
            st.integers(1, 255)
        )
    file.write_bytes(content)
    with little_memory():
        try:
            datasets.load("cifar10_reduced_10x", cifar)
        except ml.FileContentError as error:
            assert "data_batch_2" in str(error) or "cifar-10" in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\xf0.",  # An object number for which the table would take 64 GB.
        b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",  # an array of 2 GB
        pickle.dumps({b"data": np.zeros((2, 7), "uint8"), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [1, 2]}, protocol=2),
        pickle.dumps({b"data": np.zeros((2, 3072), "uint8")}, protocol=2),
        pickle.dumps([], protocol=2),
    ],
)
def test_pickles_of_other_things_are_refused(cifar, content):
    (cifar / "data_batch_2").write_bytes(content)
    with (
        little_memory(),
        pytest.raises(ml.FileContentError, match="data_batch_2' is cut short or damaged"),
    ):
        datasets.load("cifar10", cifar)


@pytest.mark.parametrize("share", [0, 0.1, 0.5, 0.9])
def test_a_cut_archive_of_cifar_is_named(cifar, tmp_path, share):
    (cifar / "data_batch_2").write_bytes(batch(1))
    file = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz", compresslevel=1) as tar:
        tar.add(cifar, "cifar-10-batches-py")
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz.* is cut short or damaged"):
        datasets.load("cifar10", tmp_path)


def test_an_archive_without_a_batch_is_named(tmp_path):
    file = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(file, "w:gz") as tar:
        folder = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with pytest.raises(ValueError, match=r"cifar-10-python\.tar\.gz.* is cut short or damaged"):
        datasets.load("cifar10", tmp_path)
