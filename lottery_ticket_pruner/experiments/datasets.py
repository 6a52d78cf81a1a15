"""Data sets with fixed splits: published ones from a folder or download, and custom ones."""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from _lottery_ticket import unknown
from _lottery_ticket.names import DOWNLOADED
from lottery_ticket_pruner import notices
from lottery_ticket_pruner.experiments import downloads, own
from lottery_ticket_pruner.experiments.labelled import Arrays, checked
from lottery_ticket_pruner.experiments.own import DatasetNotFoundError, UserCodeError
from lottery_ticket_pruner.fingerprints import digest
from masked_layers.files import FileContentError

__all__ = [
    "IMAGES",
    "NAMED",
    "NAMES",
    "Dataset",
    "DatasetNotFoundError",
    "Named",
    "UserCodeError",
    "is_own",
    "label",
    "load",
]

# Splits do not depend on the seed of a run: the same images are held out in every run.
_SPLIT_SEED = 20190423
_VALIDATION_SHARE = 5_000 / 60_000
_DIGITS_TEST_SHARE = 1 / 5


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Images in [0, 1] (float32, channels last) with int32 labels, in three disjoint parts.

    Custom data may be any numeric arrays.
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
        """Shape of one image."""
        return self.x_train.shape[1:]

    @property
    def classes(self) -> int:
        """Number of classes: one more than the largest label."""
        return 1 + max(int(y.max()) for y in (self.y_train, self.y_validation, self.y_test))

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the arrays."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "name"]
        return digest({name: getattr(self, name) for name in names})


def load(name: str, data_dir: str | Path | None = None) -> Dataset:
    """Loads a data set with its fixed split.

    A part of the training examples is held out for validation, chosen by a fixed permutation: 5 000
    of `mnist`, `fashion_mnist` and `cifar10`, a tenth of `cifar10_reduced_10x`, and a twelfth of
    other data. `digits` are 1 797 images of 8 x 8 from scikit-learn, a fifth of which is held out
    for testing. `cifar10_reduced_10x` consists of the first tenth of CIFAR-10's training images of
    each class and the complete test set.

    Custom data is loaded by a function without arguments, given as `module:function` or
    `path/to/file.py:function`. Modules are also searched in the working directory. The function
    returns `((x_train, y_train), (x_test, y_test))`, like `load_data` of Keras' data sets; three
    such pairs, the second one for validation; one pair of arrays `(x, y)`, a fifth of which is then
    the test data; or as many data sets of batches that `lottery_ticket_pruner.training.to_arrays`
    accepts. Pixels of type uint8 are divided by 255, other inputs are used unchanged. Labels are
    class indices from 0. Unless the function says which, a twelfth of the training data is held out
    for validation.

    Args:
        name: One of `NAMES`, or the location of a function.
        data_dir: Folder to search first. The message of `DatasetNotFoundError` says which files it
            may contain. If None, or if nothing is found there, Keras downloads the data.

    Raises:
        FileContentError: If a file is damaged or has unexpected content.
        ValueError: If the name is unknown, the function does not exist, or it does not return
            inputs with class labels.
        UserCodeError: If the function raises an exception (also a ValueError).
        DatasetNotFoundError: If the data is neither in the folder nor could be downloaded, or the
            file or module of the function does not exist.
    """
    warn_of_folder(name, data_dir)
    if is_own(name):
        train, *validation, test = own.parts_of(name)
        arrays = checked(name, (*train, *test))
        if not validation:
            return _split(name, name, arrays, _held_out(arrays))
        subjects = (f"{name}, to train on", f"{name}, to validate on")
        _, _, *held_out = checked(name, (*train, *validation[0]), places=subjects)
        return _dataset(name, arrays[:2], held_out, arrays[2:])
    if name not in NAMED:
        unknown.check_data(name)
    named = NAMED[name]
    source, places, arrays = named.read(data_dir)
    try:
        if named.is_image:
            _check_images(source, arrays[0], arrays[2])
        arrays = named.part(checked(source, arrays, places=places, classes=named.classes))
    except ValueError as error:  # The published files pass these checks.
        raise FileContentError(str(error)) from None
    return _split(name, source, arrays, named.held_out(arrays))


def warn_of_folder(name: str, data_dir: str | Path | None) -> None:
    """Warns if a folder is given for data that is not read from it.

    Args:
        name: Name of a data set, or the location of a function.
        data_dir: The folder, or None.
    """
    if data_dir is not None and (is_own(name) or name == "digits"):
        notices.warn(
            f"`data_dir` is not used: the data {name!r} is not read from '{data_dir}'. The folder "
            f"is for the published files of {', '.join(DOWNLOADED)}."
        )


def is_own(name: str) -> bool:
    """Returns True for a name outside `NAMES` that gives the location of a function."""
    return ":" in name


def label(name: str) -> str:
    """Converts a name to a part of a file name."""
    return re.sub(r"[^\w.-]+", "-", name.rpartition("/")[2])


def _held_out(arrays: Arrays) -> int:
    return max(1, round(len(arrays[0]) * _VALIDATION_SHARE))


def _check_images(source: str, x_train: np.ndarray, x_test: np.ndarray) -> None:
    """Raises ValueError if arrays are not images in the published format."""
    if any(x.dtype != np.uint8 or x.ndim not in (3, 4) for x in (x_train, x_test)):
        raise ValueError(
            f"{source} must hold images, of rows and columns of pixels from 0 to 255 as uint8, "
            f"which are divided by 255. Received: x_train of {x_train.dtype}, x_test of "
            f"{x_test.dtype}, of shapes {x_train.shape} and {x_test.shape}."
        )


def _digits(data_dir: str | Path | None) -> downloads.Found:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images = (bunch.images * (255 / 16)).astype("uint8")
    order = np.random.default_rng(_SPLIT_SEED).permutation(len(images))
    test, train = np.split(order, [round(len(order) * _DIGITS_TEST_SHARE)])
    arrays = images[train], bunch.target[train], images[test], bunch.target[test]
    return downloads.Found("digits", None, arrays)


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
            "are held out for validation. Both must contain at least one example."
        )
    order = np.random.default_rng(_SPLIT_SEED + 1).permutation(len(x_train))
    validation, train = np.sort(order[:held_out]), np.sort(order[held_out:])
    parts = [(x_train[chosen], y_train[chosen]) for chosen in (train, validation)]
    return _dataset(name, *parts, (x_test, y_test))


def _dataset(name: str, *parts: Sequence[np.ndarray]) -> Dataset:
    """Returns a data set of checked training, validation and test data."""
    arrays = [array for x, y in parts for array in (_scaled(x), _labels(y))]
    return Dataset(name, *arrays)


def _scaled(images: np.ndarray) -> np.ndarray:
    scaled = images.astype("float32")
    scaled /= 255 if images.dtype == np.uint8 else 1
    return scaled[..., None] if scaled.ndim == 3 else scaled


def _labels(labels: np.ndarray) -> np.ndarray:
    return labels.astype("int32").reshape(-1)


@dataclasses.dataclass(frozen=True)
class Named:
    """A data set with a name, for `load`, the command line and the examples.

    Attributes:
        read: Returns its arrays, not checked, given the folder to search first (or None).
        classes: Number of classes.
        network: Network of an experiment that names none.
        held_out: Returns how many of the training examples in these arrays validate.
        part: Returns the part of the checked arrays that is used.
        is_image: Whether it consists of images of pixels from 0 to 255, for which all networks and
            the examples are made. Other inputs need a network without convolutions.
        is_small: Whether an experiment trains for hundreds of steps by default instead of the tens
            of thousands of the network's recipe.
        is_downloaded: Whether it is read from a folder or downloaded, instead of being installed.
    """

    read: Callable[[str | Path | None], downloads.Found]
    classes: int
    network: str
    held_out: Callable[[Arrays], int] = _held_out
    part: Callable[[Arrays], Arrays] = lambda arrays: arrays
    is_image: bool = True
    is_small: bool = False
    is_downloaded: bool = True


# The order is that of lists for users.
NAMED = {
    "digits": Named(_digits, 10, "lenet-300-100", is_small=True, is_downloaded=False),
    "mnist": Named(functools.partial(downloads.load, "mnist"), 10, "lenet-300-100"),
    "fashion_mnist": Named(functools.partial(downloads.load, "fashion_mnist"), 10, "lenet-300-100"),
    "cifar10": Named(
        functools.partial(downloads.load, "cifar10"), 10, "conv-2", held_out=lambda arrays: 5_000
    ),
    "cifar10_reduced_10x": Named(
        functools.partial(downloads.load, "cifar10"),
        10,
        "conv-2",
        held_out=lambda arrays: len(arrays[0]) // 10,
        part=_first_tenth_per_class,
    ),
}
NAMES = tuple(NAMED)
# Names of the data sets of images.
IMAGES = tuple(name for name, named in NAMED.items() if named.is_image)
