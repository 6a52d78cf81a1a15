"""Data sets: published formats read from a folder, fixed splits, errors that say what to do."""

import gzip
import importlib
import io
import pickle
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.compression import parts_of
from lottery_ticket_pruner.experiments import datasets

pytestmark = pytest.mark.once


def small_images(seed, count, shape):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    return rng.integers(0, 256, (count, *shape), dtype="uint8"), labels.astype("uint8")


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.tobytes()


def write_idx(folder, train, test, compressed=True):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (images, labels) in (("train", train), ("t10k", test)):
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx(array)
            name = f"{stem}-{kind}-ubyte"
            if compressed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)


@pytest.fixture
def no_download(monkeypatch):
    for name in ("mnist", "fashion_mnist", "cifar10"):
        module = importlib.import_module(f"keras.datasets.{name}")

        def fail(*_args):
            raise OSError("no network here")

        monkeypatch.setattr(module, "load_data", fail)


@pytest.fixture
def mnist():
    return small_images(1, 120, (28, 28)), small_images(2, 30, (28, 28))


def assert_same_images(scaled, images):
    """The same images in any order; scaled ones are in [0, 1] with a channel axis."""
    assert scaled.dtype == "float32"
    restored = np.round(scaled * 255).astype("uint8").reshape(len(scaled), -1)
    flat = images.reshape(len(images), -1)
    assert sorted(map(bytes, restored)) == sorted(map(bytes, flat))


def test_a_folder_for_data_that_is_not_read_from_it_gets_a_warning(own):
    for name in ("digits", f"{own}:table"):
        with pytest.warns(UserWarning, match=f"the data '{name}' is not read from 'nowhere'"):
            datasets.load(name, "nowhere")


def test_digits_are_embedded_and_split_the_same_way_every_time():
    digits = datasets.load("digits")
    again = datasets.load("digits")
    assert digits.input_shape == (8, 8, 1)
    assert digits.classes == 10
    parts = [digits.x_train, digits.x_validation, digits.x_test]
    assert [len(part) for part in parts] == [1318, 120, 359]
    from sklearn.datasets import load_digits

    bunch = load_digits()
    for x, y in (
        (digits.x_train, digits.y_train),
        (digits.x_validation, digits.y_validation),
        (digits.x_test, digits.y_test),
    ):
        assert x.min() == 0
        assert x.max() == 1
        assert y.dtype == "int32"
        assert set(y) == set(range(10))
    # Every image is in exactly one part, with its own label.
    everything = np.concatenate([part.reshape(-1, 64) for part in parts])
    labels = np.concatenate([digits.y_train, digits.y_validation, digits.y_test])
    found = sorted(
        (tuple(np.round(i * 16).astype(int)), int(k))
        for i, k in zip(everything, labels, strict=True)
    )
    wanted = sorted(
        (tuple(i.astype(int)), int(k)) for i, k in zip(bunch.data, bunch.target, strict=True)
    )
    assert found == wanted
    np.testing.assert_array_equal(digits.x_train, again.x_train)


@pytest.mark.parametrize("subfolder", ["", "mnist", "MNIST/raw", "datasets/mnist"])
@pytest.mark.parametrize("compressed", [True, False])
def test_mnist_from_idx_files(tmp_path, mnist, no_download, subfolder, compressed):
    write_idx(tmp_path / subfolder, *mnist, compressed=compressed)
    loaded = datasets.load("mnist", tmp_path)
    assert loaded.input_shape == (28, 28, 1)
    assert len(loaded.x_validation) == 10
    together = np.concatenate([loaded.x_train, loaded.x_validation])
    assert_same_images(together, mnist[0][0])
    np.testing.assert_array_equal(np.round(loaded.x_test[..., 0] * 255), mnist[1][0])
    np.testing.assert_array_equal(loaded.y_test, mnist[1][1])


def test_labels_stay_with_their_images(tmp_path, no_download):
    labels = (np.arange(120) % 10).astype("uint8")
    images = np.broadcast_to(labels[:, None, None], (120, 28, 28))
    write_idx(tmp_path, (images, labels), (images[:10], labels[:10]))
    loaded = datasets.load("mnist", tmp_path)
    for x, y in ((loaded.x_train, loaded.y_train), (loaded.x_validation, loaded.y_validation)):
        np.testing.assert_array_equal(np.round(x[:, 0, 0, 0] * 255), y)


def test_files_of_the_same_name_are_distinguished_by_their_folder(tmp_path, mnist, no_download):
    write_idx(tmp_path / "mnist", *mnist)
    with pytest.raises(datasets.DatasetNotFoundError, match="fashion_mnist"):
        datasets.load("fashion_mnist", tmp_path)
    with pytest.raises(datasets.DatasetNotFoundError, match="fashion_mnist"):
        datasets.load("fashion_mnist", tmp_path / "mnist")
    fashion = small_images(3, 120, (28, 28)), small_images(4, 30, (28, 28))
    write_idx(tmp_path / "datasets" / "fashion-mnist", *fashion)
    loaded = datasets.load("fashion_mnist", tmp_path)
    np.testing.assert_array_equal(np.round(loaded.x_test[..., 0] * 255), fashion[1][0])
    direct = datasets.load("fashion_mnist", tmp_path / "datasets" / "fashion-mnist")
    np.testing.assert_array_equal(direct.x_train, loaded.x_train)


@pytest.fixture
def cifar():
    train, test = small_images(5, 6_000, (32, 32, 3)), small_images(6, 20, (32, 32, 3))
    return *train, *test


def planes(images):
    return images.transpose(0, 3, 1, 2).reshape(len(images), 3072)


def write_batches(folder, cifar):
    folder.mkdir(parents=True)
    x_train, y_train, x_test, y_test = cifar
    parts = [(x_train[i::5], y_train[i::5]) for i in range(5)] + [(x_test, y_test)]
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, (images, labels) in zip(names, parts, strict=True):
        content = {b"data": planes(images), b"labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("form", ["npz", "folder", "its own folder", "archive"])
def test_cifar10_in_its_published_forms(tmp_path, cifar, no_download, form):
    x_train, y_train, x_test, y_test = cifar
    data_dir = tmp_path
    if form == "npz":
        np.savez(
            tmp_path / "cifar10.npz",
            x_train=x_train, y_train=y_train[:, None], x_test=x_test, y_test=y_test[:, None],
        )  # fmt: skip
    else:
        folder = tmp_path / "cifar-10-batches-py"
        write_batches(folder, cifar)
        if form == "its own folder":
            data_dir = folder
        if form == "archive":
            data_dir = tmp_path / "elsewhere"
            data_dir.mkdir()
            with tarfile.open(data_dir / "cifar-10-python.tar.gz", "w:gz", compresslevel=1) as tar:
                tar.add(folder, "cifar-10-batches-py")
    loaded = datasets.load("cifar10", data_dir)
    assert loaded.x_train.shape == (1_000, 32, 32, 3)
    assert len(loaded.x_validation) == 5_000
    assert_same_images(np.concatenate([loaded.x_train, loaded.x_validation]), x_train)
    np.testing.assert_array_equal(np.round(loaded.x_test * 255), x_test)
    np.testing.assert_array_equal(loaded.y_test, y_test)


def test_the_reduced_set_is_the_first_tenth_of_each_class(tmp_path, cifar, no_download):
    x_train, y_train, x_test, y_test = cifar
    np.savez(
        tmp_path / "cifar10.npz", x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test
    )
    loaded = datasets.load("cifar10_reduced_10x", tmp_path)
    assert len(loaded.x_train) == 540
    assert len(loaded.x_validation) == 60
    together = np.concatenate([loaded.x_train, loaded.x_validation])
    first = np.concatenate([np.flatnonzero(y_train == label)[:60] for label in range(10)])
    assert_same_images(together, x_train[first])
    assert len(loaded.x_test) == 20


def test_pickles_with_other_objects_are_refused(tmp_path, cifar, no_download):
    folder = tmp_path / "cifar-10-batches-py"
    write_batches(folder, cifar)
    harmful = pickle.dumps({b"data": io.StringIO("x")})
    (folder / "data_batch_3").write_bytes(harmful)
    with pytest.raises(ValueError, match=r"data_batch_3.*StringIO"):
        datasets.load("cifar10", tmp_path)


def test_missing_data_is_an_error_that_lists_the_files(tmp_path, no_download):
    with pytest.raises(datasets.DatasetNotFoundError) as caught:
        datasets.load("mnist", tmp_path)
    message = str(caught.value)
    for part in (str(tmp_path), "no network here", "train-images-idx3-ubyte.gz", "--data-dir"):
        assert part in message
    with pytest.raises(datasets.DatasetNotFoundError, match=r"cifar-10-python\.tar\.gz"):
        datasets.load("cifar10")


def test_download_is_the_last_resort(tmp_path, mnist, monkeypatch):
    module = importlib.import_module("keras.datasets.mnist")
    monkeypatch.setattr(module, "load_data", lambda: mnist)
    loaded = datasets.load("mnist", tmp_path)
    np.testing.assert_array_equal(loaded.y_test, mnist[1][1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file"),
        (b"\x00\x00\x0d\x01", "not an IDX file"),
        (b"\x00\x00\x08\x01\x00\x00\x00\x05ab", r"should hold \(5,\) values and holds 2"),
    ],
)
def test_broken_files_are_named(tmp_path, mnist, content, message):
    write_idx(tmp_path, *mnist)
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"t10k-labels-idx1-ubyte\.gz.*{message}"):
        datasets.load("mnist", tmp_path)


def test_an_npz_without_its_arrays_is_named(tmp_path):
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros(1))
    with pytest.raises(ValueError, match=r"mnist\.npz lacks y_train, x_test, y_test"):
        datasets.load("mnist", tmp_path)


def test_an_npz_of_scaled_pixels_is_refused(tmp_path):
    x, y = np.zeros((12, 28, 28)), np.zeros(12)
    np.savez(tmp_path / "mnist.npz", x_train=x, y_train=y, x_test=x.astype("uint8"), y_test=y)
    with pytest.raises(ValueError, match=r"uint8, .*x_train of float64, x_test of uint8"):
        datasets.load("mnist", tmp_path)


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match=r"'svhn'.*digits, mnist, fashion_mnist, cifar10"):
        datasets.load("svhn")


# --- Custom data ----------------------------------------------------------------------------------

OWN = """
import dataclasses

import keras
import numpy as np

from beside import COUNT

rng = np.random.default_rng(0)


@dataclasses.dataclass
class Noted:
    rows: "int"


def table():
    import beside_too

    labels = np.arange(COUNT) % 3
    rows = labels[:, None] + [0.25, 1000.0]
    return (rows, labels), (rows[:6], labels[:6, None].astype("float64"))


def pictures():
    labels = np.arange(COUNT, dtype="uint8") % 5
    images = np.broadcast_to(labels[:, None, None], (COUNT, 9, 7))
    return [(images, labels), (images[:5], labels[:5])]


def one():
    return np.arange(COUNT)[:, None], np.arange(COUNT) % 3


class Batches(keras.utils.PyDataset):
    num_batches = 4

    def __getitem__(self, number):
        x = np.full((6, 2), number, "float32")
        return x, x[:, 0]


def batches():
    return Batches(), Batches()


def datasets():
    import tensorflow as tf

    return [tf.data.Dataset.from_tensor_slices(part).batch(7) for part in table()]


def single():
    return Batches()


def three():
    (x, y), _ = table()
    return (x[:20], y[:20]), (x[20:27], y[20:27]), (x[27:], y[27:])


def other_widths():
    (x, y), _ = table()
    return (x, y), (x[:, :1], y), (x, y)


def one_hot():
    (x, y), _ = table()
    return (x, np.eye(3)[y]), (x, np.eye(3)[y])


def four():
    (x, y), _ = table()
    return x, y, x, y


def weighted():
    (x, y), _ = table()
    return (x, y, y), (x, y, y)


def negative():
    (x, y), _ = table()
    return (x, y - 1), (x, y)


def widths():
    (x, y), _ = table()
    return (x, y), (x[:, :1], y)


def gaps():
    (x, y), _ = table()
    return (np.where(x > 1, np.nan, x), y), (x, y)


def texts():
    (x, y), _ = table()
    return (x.astype(str), y), (x.astype(str), y)


nothing = None
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The path of a file with functions that load data, with modules next to it."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "own.py").write_text(OWN)
    (folder / "beside.py").write_text("COUNT = 36")
    (folder / "beside_too.py").write_text("")
    yield folder / "own.py"
    # Other modules imported in the meantime are used by other tests.
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")
        if file and Path(file).is_relative_to(folder):
            del sys.modules[name]


def test_custom_rows_are_not_changed(own):
    path = list(sys.path)
    loaded = datasets.load(f"{own}:table")
    assert sys.path == path
    assert (loaded.input_shape, loaded.classes) == ((2,), 3)
    assert [len(x) for x in (loaded.x_train, loaded.x_validation, loaded.x_test)] == [33, 3, 6]
    for part in ("train", "validation", "test"):
        x, y = getattr(loaded, f"x_{part}"), getattr(loaded, f"y_{part}")
        assert (x.dtype, y.dtype, y.ndim) == ("float32", "int32", 1)
        np.testing.assert_array_equal(x, y[:, None] + np.float32([0.25, 1000]))
    again = datasets.load(f"{own}:table")
    np.testing.assert_array_equal(loaded.x_validation, again.x_validation)


def test_of_one_pair_the_test_data_is_that_of_prune(own):
    with pytest.warns(UserWarning, match=r"one pair \(x, y\): a fifth of the examples \(7\)"):
        loaded = datasets.load(f"{own}:one")
    x = np.arange(36)[:, None]
    there = parts_of((x, x[:, 0] % 3)).test
    np.testing.assert_array_equal(loaded.x_test, there[0])
    np.testing.assert_array_equal(loaded.y_test, there[1])
    everything = np.concatenate([loaded.x_train, loaded.x_validation, loaded.x_test])
    np.testing.assert_array_equal(np.sort(everything, axis=0), x)


def test_three_parts_and_one_data_set_are_taken_as_by_prune(own):
    loaded = datasets.load(f"{own}:three")
    y = np.arange(36) % 3
    for name, chosen in (("train", y[:20]), ("validation", y[20:27]), ("test", y[27:])):
        np.testing.assert_array_equal(getattr(loaded, f"x_{name}")[:, 0], chosen + 0.25)
        np.testing.assert_array_equal(getattr(loaded, f"y_{name}"), chosen)
    with pytest.warns(UserWarning, match="a fifth of the examples"):
        loaded = datasets.load(f"{own}:single")
    x = np.repeat(np.arange(4.0), 6)[:, None]
    np.testing.assert_array_equal(loaded.x_test[:, :1], parts_of((x, x[:, 0])).test[0])


def test_custom_pixels_are_scaled(own):
    loaded = datasets.load(f"{own}:pictures")
    assert (loaded.input_shape, loaded.classes) == ((9, 7, 1), 5)
    np.testing.assert_allclose(loaded.x_train[:, 4, 4, 0], loaded.y_train / 255, rtol=1e-6)


def test_custom_data_from_a_module_of_the_working_directory(own, monkeypatch):
    monkeypatch.chdir(own.parent)
    loaded = datasets.load("own:batches")
    assert sorted([*loaded.y_train, *loaded.y_validation]) == sorted([0, 1, 2, 3] * 6)
    np.testing.assert_array_equal(loaded.x_train[:, 1], loaded.y_train)


def test_custom_data_from_tensorflow_data_sets(own):
    loaded, arrays = (datasets.load(f"{own}:{name}") for name in ("datasets", "table"))
    for part in ("x_train", "y_train", "x_validation", "x_test", "y_test"):
        np.testing.assert_array_equal(getattr(loaded, part), getattr(arrays, part))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("tabel", r"no function 'tabel'.*It has: Noted, table, pictures, one, Batches"),
        ("nothing", "no function 'nothing'"),
        ("one_hot", r"index of each example's class.*y.argmax\(-1\).*float64\(36, 3\)"),
        (
            "four",
            r"\(\(x_train, y_train\), \(x_test, y_test\)\).*: a tuple of 4 \(ndarray of shape",
        ),
        ("weighted", r"must return \(\(x_train.* Received: a tuple of 2 \(a tuple of 3 \("),
        ("negative", r"class indices 0, 1, ... as labels. Received: -1, 0, 1"),
        ("widths", r"of one shape and type.*float64\(2,\) and float64\(1,\)"),
        ("other_widths", r"of one shape and type.*float64\(2,\) and float64\(1,\)"),
        ("gaps", "x to be finite numbers"),
        ("texts", "one array of numbers.*x of <U"),
    ],
)
def test_errors_in_custom_data_are_reported(own, function, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(f"{own}:{function}")


def test_missing_files_and_modules_of_custom_data_are_named(own, monkeypatch):
    with pytest.raises(datasets.DatasetNotFoundError, match=r"no file 'nowhere/own.py'"):
        datasets.load("nowhere/own.py:table")
    monkeypatch.chdir(own.parent)
    for name in ("no_such_package.own", "own.inside"):
        with pytest.raises(datasets.DatasetNotFoundError, match=f"no module '{name}'.*by its path"):
            datasets.load(f"{name}:table")
    # The user's own error is more helpful than one about the missing function.
    (own.parent / "broken.py").write_text("import no_such_package_either")
    with pytest.raises(
        datasets.UserCodeError, match=r"no_such_package_either.*broken\.py', line 1"
    ):
        datasets.load("broken:load")
