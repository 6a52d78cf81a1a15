"""Data sets with fixed splits: by name, from a folder or Keras' own downloads, or one's own."""

import contextlib
import dataclasses
import functools
import gzip
import importlib
import importlib.util
import io
import logging
import pickle
import re
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lottery_ticket_pruner.checkpoint import digest
from lottery_ticket_pruner.data import pair_of

logger = logging.getLogger(__name__)

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar10_reduced_10x")

# The splits never depend on a run's seed: every run of a data set sees the same images held out.
_SPLIT_SEED = 20190423
_VALIDATION_SHARE = 5_000 / 60_000
_DIGITS_TEST_SHARE = 1 / 5

_FOLDERS = {
    "mnist": ("mnist", "MNIST", "MNIST/raw", "datasets/mnist"),
    "fashion_mnist": (
        "fashion-mnist",
        "fashion_mnist",
        "FashionMNIST",
        "FashionMNIST/raw",
        "datasets/fashion-mnist",
    ),
    "cifar10": ("cifar10", "cifar-10", "datasets"),
}
_IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

_Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class DatasetNotFoundError(FileNotFoundError):
    """A data set is neither in the folder given nor to be had by download."""


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images in [0, 1] (float32, channels last) with int32 labels, in three disjoint parts.

    One's own data may be other arrays of numbers than images.
    """

    name: str
    x_train: np.ndarray
    y_train: np.ndarray
    x_validation: np.ndarray
    y_validation: np.ndarray
    x_test: np.ndarray
    y_test: np.ndarray

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one image."""
        return self.x_train.shape[1:]

    @property
    def classes(self) -> int:
        """The number of classes: one more than the largest label."""
        return 1 + max(int(y.max()) for y in (self.y_train, self.y_validation, self.y_test))

    @functools.cached_property
    def digest(self) -> str:
        """A short text that is another one for other arrays."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        return digest({name: getattr(self, name) for name in names})


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Load a data set with its fixed split.

    `mnist`, `fashion_mnist` and `cifar10` hold 5 000 of their training images out for
    validation, chosen by a fixed permutation; `digits` (scikit-learn's 1 797 images of 8 x 8)
    holds out a fifth for testing and then the same twelfth or so for validation.
    `cifar10_reduced_10x` takes the first tenth of CIFAR-10's training images of each class, of
    which it holds out a tenth for validation, and keeps the whole test set.

    One's own data comes from a function without arguments, named `module:function` or
    `path/to/file.py:function`. Modules are looked for in the working directory, too. It returns
    `((x_train, y_train), (x_test, y_test))`, as `load_data` of Keras' data sets does, or two data
    sets of batches that `lottery_ticket_pruner.data.arrays_of` takes. Pixels of type uint8 are
    divided by 255, other inputs taken as they are; labels are class indices from 0 on. A twelfth of
    the training data is held out for validation.

    Args:
        name: one of `NAMES`, or where to find a function.
        data_dir: where to look first, see `DatasetNotFoundError`'s message for what may lie
            there. Without it, or with nothing fitting in it, Keras downloads the data.

    Raises:
        ValueError: the name is unknown, a file is not what its name says, there is no such
            function, or it returned something else.
        DatasetNotFoundError: neither the folder nor the download gave the data, or there is no such
            file or module.
    """
    if is_own(name):
        return _own(name)
    if name not in NAMES:
        raise ValueError(
            f"Unknown data set {name!r}. Expected one of: {', '.join(NAMES)}; or where to find a "
            "function that loads your own, as module:function or path/to/file.py:function."
        )
    if name == "digits":
        arrays, held_out = _digits()
    else:
        arrays = _load_arrays(name.removesuffix("_reduced_10x"), data_dir)
        if name == "cifar10_reduced_10x":
            arrays = _first_tenth_per_class(arrays)
            held_out = len(arrays[0]) // 10
        else:
            held_out = round(len(arrays[0]) * _VALIDATION_SHARE) if "mnist" in name else 5_000
    return _split(name, arrays, held_out)


def is_own(name: str) -> bool:
    """Whether a name says where to find a function, and is none of `NAMES`."""
    return ":" in name


def label(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])


def _own(name: str) -> Dataset:
    """The data that a function of the user's returns."""
    source, _, attribute = name.rpartition(":")
    folder = Path(source).parent if source.endswith(".py") else Path.cwd()
    with _importing_from(folder):
        function = _function(source, attribute)
        returned = function()
        # Read while what it may still import can be found.
        parts = [_checked_part(name, part) for part in _two_parts(name, returned)]
    (x_train, y_train), (x_test, y_test) = parts
    pixels = [x.dtype == np.uint8 for x in (x_train, x_test)]
    if x_train.shape[1:] != x_test.shape[1:] or pixels[0] != pixels[1]:
        raise ValueError(
            f"{name} must return inputs of one shape and type to train and to test on. Received: "
            f"{x_train.dtype}{x_train.shape[1:]} and {x_test.dtype}{x_test.shape[1:]}."
        )
    held_out = max(1, round(len(x_train) * _VALIDATION_SHARE))
    scale = 255 if pixels[0] else 1
    return _split(name, (x_train, y_train, x_test, y_test), held_out, scale)


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Lets modules in a folder be imported, as Python does for those beside a script."""
    before = sys.path[:]
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


def _function(source: str, name: str) -> Callable[[], Any]:
    if source.endswith(".py"):
        path = Path(source)
        if not path.is_file():
            raise DatasetNotFoundError(f"There is no file '{source}' to load data with.")
        spec = importlib.util.spec_from_file_location(f"_{path.stem}_of_data", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # Dataclasses look their module up there.
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise
            raise DatasetNotFoundError(
                f"There is no module {source!r} to load data with, here or among what is "
                "installed. A file is named by its path, as in path/to/file.py:function."
            ) from error
    function = getattr(module, name, None)
    if not callable(function):
        there = [key for key, value in vars(module).items() if _is_own_function(value, module)]
        raise ValueError(
            f"{source} has no function {name!r} to load data with. It has: "
            f"{', '.join(there) or 'none'}."
        )
    return function


def _is_own_function(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _two_parts(name: str, returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        what = type(returned).__name__
        if isinstance(returned, tuple | list):
            what = f"{what} of {len(returned)}: {', '.join(type(p).__name__ for p in returned)}"
        raise ValueError(
            f"{name} must return ((x_train, y_train), (x_test, y_test)), or two data sets of "
            f"batches (inputs, targets). Received: {what}."
        )
    return tuple(returned)


def _checked_part(name: str, part: Any) -> tuple[np.ndarray, np.ndarray]:
    """One part of what a function returned, as inputs and labels."""
    pair = pair_of(part)
    if len(pair) != 2:
        raise ValueError(f"{name} must return pairs (x, y). Received one of {len(pair)} parts.")
    x, y = map(np.asarray, pair)
    received = f"Received: x of {x.dtype}{x.shape}, y of {y.dtype}{y.shape}."
    if x.ndim < 2 or x.dtype.kind not in "buif" or len(x) < 2:
        raise ValueError(
            f"{name} must return as x one array of numbers, with at least two examples along its "
            f"first axis. {received}"
        )
    if not np.isfinite(x).all():
        raise ValueError(f"{name} must return finite numbers as x. There are NaN or infinities.")
    if y.shape not in ((len(x),), (len(x), 1)) or y.dtype.kind not in "buif":
        raise ValueError(
            f"{name} must return as y the index of each example's class, and not one column for "
            f"each class: of those, y.argmax(-1). {received}"
        )
    if (y < 0).any() or (y != y.astype("int32")).any():
        raise ValueError(f"{name} must return class indices 0, 1, ... as y. Received: {y[:10]}...")
    return x, y


def _digits() -> tuple[_Arrays, int]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype("uint8")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    test, train = np.split(order, [round(len(order) * _DIGITS_TEST_SHARE)])
    arrays = images[train], bunch.target[train], images[test], bunch.target[test]
    return arrays, round(len(train) * _VALIDATION_SHARE)


def _first_tenth_per_class(arrays: _Arrays) -> _Arrays:
    x_train, y_train, x_test, y_test = arrays
    chosen = [np.flatnonzero(y_train == label) for label in np.unique(y_train)]
    keep = np.sort(np.concatenate([indices[: len(indices) // 10] for indices in chosen]))
    return x_train[keep], y_train[keep], x_test, y_test


def _split(name: str, arrays: _Arrays, held_out: int, scale: float = 255) -> Dataset:
    x_train, y_train, x_test, y_test = arrays
    order = np.random.default_rng(_SPLIT_SEED + 1).permutation(len(x_train))
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    return Dataset(
        name,
        _scaled(x_train[train], scale),
        _labels(y_train[train]),
        _scaled(x_train[validation], scale),
        _labels(y_train[validation]),
        _scaled(x_test, scale),
        _labels(y_test),
    )


def _scaled(images: np.ndarray, scale: float) -> np.ndarray:
    scaled = images.astype("float32")
    scaled /= scale
    return scaled[..., None] if scaled.ndim == 3 else scaled


def _labels(labels: np.ndarray) -> np.ndarray:
    return labels.astype("int32").reshape(-1)


def _load_arrays(name: str, data_dir: str | Path | None) -> _Arrays:
    if data_dir is not None:
        for folder in _candidate_folders(name, Path(data_dir)):
            arrays = _read_folder(name, folder)
            if arrays is not None:
                logger.info("read %s from %s", name, folder)
                return arrays
    try:
        module = importlib.import_module(f"keras.datasets.{name}")
        (x_train, y_train), (x_test, y_test) = module.load_data()
    except Exception as error:  # a missing network shows in as many types as there are layers
        raise DatasetNotFoundError(_how_to_provide(name, data_dir, error)) from error
    return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)


def _candidate_folders(name: str, data_dir: Path) -> Iterator[Path]:
    yield from (data_dir / folder for folder in _FOLDERS[name])
    # MNIST's and Fashion-MNIST's files have the same names: a folder that is named after one of
    # them is not taken for the other.
    others = {Path(f).name for key, fs in _FOLDERS.items() if key != name for f in fs}
    if data_dir.resolve().name not in others - {"raw", "datasets"}:
        yield data_dir


def _read_folder(name: str, folder: Path) -> _Arrays | None:
    """The four arrays found in a folder, or None where it does not hold this data set."""
    npz = folder / f"{name}.npz"
    if npz.is_file():
        with np.load(npz, allow_pickle=False) as stored:
            missing = [key for key in _NPZ_KEYS if key not in stored]
            if missing:
                raise ValueError(f"{npz} lacks {', '.join(missing)}; it holds {stored.files}.")
            x_train, y_train, x_test, y_test = (stored[key] for key in _NPZ_KEYS)
        if {x_train.dtype, x_test.dtype} != {np.dtype("uint8")}:
            raise ValueError(
                f"{npz} must hold pixels from 0 to 255 as uint8, which are divided by 255. "
                f"Received: x_train of {x_train.dtype}, x_test of {x_test.dtype}."
            )
        return x_train, y_train.reshape(-1), x_test, y_test.reshape(-1)
    if name == "cifar10":
        return _read_cifar_batches(folder)
    files = [_existing(folder / f"{stem}.gz", folder / stem) for stem in _IDX_STEMS]
    if None in files:
        return None
    return tuple(_read_idx(file) for file in files)


def _existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _read_idx(file: Path) -> np.ndarray:
    """Read a file in the IDX format: two zero bytes, type, rank, big-endian sizes, the data."""
    content = file.read_bytes()
    if file.suffix == ".gz":
        content = gzip.decompress(content)
    rank = content[3] if len(content) > 3 else 0
    if content[:3] != b"\x00\x00\x08" or len(content) < 4 + 4 * rank:
        raise ValueError(f"{file} is not an IDX file of unsigned bytes: starts {content[:4]!r}.")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", rank, offset=4))
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{file} should hold {shape} values and holds {values.size}.")
    return values.reshape(shape)


def _read_cifar_batches(folder: Path) -> _Arrays | None:
    plain = [folder / _CIFAR_FOLDER / batch for batch in _CIFAR_BATCHES]
    if folder.name == _CIFAR_FOLDER and (folder / _CIFAR_BATCHES[0]).is_file():
        plain = [folder / batch for batch in _CIFAR_BATCHES]
    archive = folder / _CIFAR_ARCHIVE
    if all(batch.is_file() for batch in plain):
        contents = [batch.read_bytes() for batch in plain]
    elif archive.is_file():
        with tarfile.open(archive) as tar:
            contents = [
                tar.extractfile(f"{_CIFAR_FOLDER}/{batch}").read() for batch in _CIFAR_BATCHES
            ]
    else:
        return None
    batches = [_ArraysOnlyUnpickler(io.BytesIO(content)).load() for content in contents]
    # 3 072 bytes an image: the red plane, then green, then blue, row by row.
    images = [batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for batch in batches]
    labels = [np.asarray(batch[b"labels"]) for batch in batches]
    return np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Reads the published CIFAR-10 batches, and refuses a pickle that holds anything else."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            # Files of before NumPy 2 name `numpy.core`, which warns.
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"A CIFAR-10 batch does not hold {module}.{name}.")


def _how_to_provide(name: str, data_dir: str | Path | None, error: Exception) -> str:
    if name == "cifar10":
        files = (
            f"`{_CIFAR_ARCHIVE}` or its folder `{_CIFAR_FOLDER}`, as published at "
            "https://www.cs.toronto.edu/~kriz/cifar.html, or `cifar10.npz` with the arrays "
            f"{', '.join(_NPZ_KEYS)}"
        )
    else:
        files = f"the four files {', '.join(f'`{stem}.gz`' for stem in _IDX_STEMS)}, as published"
        files += f", or `{name}.npz` with the arrays {', '.join(_NPZ_KEYS)}"
    looked = f"is not in {data_dir}" if data_dir is not None else "was not given a folder"
    return (
        f"The data set {name} {looked} and could not be downloaded ({error}). Put into a folder "
        f"DIR, or into DIR/{_FOLDERS[name][0]}, {files}; then name it with --data-dir DIR "
        "(in Python: data_dir=DIR)."
    )
