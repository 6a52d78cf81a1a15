"""Data sets with fixed splits: named ones from a folder or from Keras, and custom ones."""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

from lottery_ticket_pruner.experiments import own, published
from lottery_ticket_pruner.experiments.labelled import Arrays, checked
from lottery_ticket_pruner.experiments.own import DatasetNotFoundError, UserCodeError
from lottery_ticket_pruner.fingerprints import digest
from lottery_ticket_pruner.registry import UnknownNameError

__all__ = ["NAMES", "Dataset", "DatasetNotFoundError", "UserCodeError", "is_own", "label", "load"]

NAMES = ("digits", "mnist", "fashion_mnist", "cifar10", "cifar10_reduced_10x")

# The splits never depend on a run's seed: every run of a data set sees the same images held out.
_SPLIT_SEED = 20190423
_VALIDATION_SHARE = 5_000 / 60_000
_DIGITS_TEST_SHARE = 1 / 5

_CLASSES = 10


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
    sets of batches that `lottery_ticket_pruner.training.arrays_of` takes. Pixels of type uint8 are
    divided by 255, other inputs taken as they are; labels are class indices from 0 on. A twelfth of
    the training data is held out for validation.

    Args:
        name: One of `NAMES`, or where to find a function.
        data_dir: Where to look first, see `DatasetNotFoundError`'s message for what may lie
            there. Without it, or with nothing fitting in it, Keras downloads the data.

    Raises:
        ValueError: The name is unknown, a file is damaged or not what its name says, there is no
            such function, or it does not return inputs with class labels.
        UserCodeError: The function raised an exception (a ValueError, too).
        DatasetNotFoundError: Neither the folder nor the download gave the data, or there is no such
            file or module.
    """
    if is_own(name):
        arrays = checked(name, own.arrays_of(name))
        return _split(name, name, arrays, _held_out(arrays))
    if name not in NAMES:
        hint = " Name its function, too: " + f"{name}:FUNCTION." if name.endswith(".py") else ""
        raise UnknownNameError(
            "data set",
            name,
            NAMES,
            "Or say where a function is that loads your own: module:function or "
            f"path/to/file.py:function.{hint}",
        )
    if name == "digits":
        arrays = checked(name, _digits(), classes=_CLASSES)
        return _split(name, name, arrays, _held_out(arrays))
    source, places, arrays = published.load(name.removesuffix("_reduced_10x"), data_dir)
    _check_images(source, arrays[0], arrays[2])
    arrays = checked(source, arrays, places=places, classes=_CLASSES)
    if name == "cifar10_reduced_10x":
        arrays = _first_tenth_per_class(arrays)
        return _split(name, source, arrays, len(arrays[0]) // 10)
    return _split(name, source, arrays, _held_out(arrays) if "mnist" in name else 5_000)


def is_own(name: str) -> bool:
    """Returns True for a name that says where to find a function, and is not in `NAMES`."""
    return ":" in name


def label(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])


def _held_out(arrays: Arrays) -> int:
    return max(1, round(len(arrays[0]) * _VALIDATION_SHARE))


def _check_images(source: str, x_train: np.ndarray, x_test: np.ndarray) -> None:
    """Raises ValueError where arrays are not images as they are published."""
    if any(x.dtype != np.uint8 or x.ndim not in (3, 4) for x in (x_train, x_test)):
        raise ValueError(
            f"{source} must hold images, of rows and columns of pixels from 0 to 255 as uint8, "
            f"which are divided by 255. Received: x_train of {x_train.dtype}, x_test of "
            f"{x_test.dtype}, of shapes {x_train.shape} and {x_test.shape}."
        )


def _digits() -> Arrays:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype("uint8")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    test, train = np.split(order, [round(len(order) * _DIGITS_TEST_SHARE)])
    return images[train], bunch.target[train], images[test], bunch.target[test]


def _first_tenth_per_class(arrays: Arrays) -> Arrays:
    x_train, y_train, x_test, y_test = arrays
    chosen = [np.flatnonzero(y_train == label) for label in np.unique(y_train)]
    keep = np.sort(np.concatenate([indices[: len(indices) // 10] for indices in chosen]))
    return x_train[keep], y_train[keep], x_test, y_test


def _split(name: str, source: str, arrays: Arrays, held_out: int) -> Dataset:
    x_train, y_train, x_test, y_test = arrays
    if not 0 < held_out < len(x_train):
        raise ValueError(
            f"{source} leaves {len(x_train)} examples for {name} to train on, of which {held_out} "
            "are held out for validation: there must be some of both."
        )
    scale = 255 if x_train.dtype == np.uint8 else 1
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
