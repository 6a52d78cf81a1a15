"""The check that inputs and class labels pass, wherever they come from."""

from collections.abc import Sequence
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_PARTS = ("to train on", "to test on")


def checked(
    source: str,
    arrays: Sequence[Any],
    *,
    places: tuple[str, str] | None = None,
    classes: int | None = None,
) -> Arrays:
    """Returns arrays that a classifier can be trained and tested on, as they are.

    Args:
        source: Where they come from: a function, a file, or a folder of files.
        arrays: `x_train, y_train, x_test, y_test`, of anything.
        places: Where each of the two parts comes from, if not from one source.
        classes: How many classes there are; None: one more than the largest label to train on.

    Returns:
        The arrays, `x` of numbers that float32 holds and `y` of class indices, of shape
        `(examples,)` or `(examples, 1)`.

    Raises:
        ValueError: They are something else; the message says where, what was expected and what was
            received.
    """
    x_train, y_train, x_test, y_test = arrays
    subjects = places or tuple(f"{source}, {part}" for part in _PARTS)
    train = _checked_part(subjects[0], x_train, y_train)
    test = _checked_part(subjects[1], x_test, y_test)
    pixels = [x.dtype == np.uint8 for x, _ in (train, test)]
    if train[0].shape[1:] != test[0].shape[1:] or pixels[0] != pixels[1]:
        received = " and ".join(f"{x.dtype}{x.shape[1:]}" for x, _ in (train, test))
        raise ValueError(
            f"{source}: expected inputs of one shape and type to train and to test on. "
            f"Received: {received}."
        )
    _check_classes(subjects, train[1], test[1], classes)
    return *train, *test


def _checked_part(subject: str, x: Any, y: Any) -> tuple[np.ndarray, np.ndarray]:
    x, y = _array(subject, "x", x), _array(subject, "y", y)
    received = f"Received: x of {x.dtype}{x.shape}, y of {y.dtype}{y.shape}."
    if x.ndim < 2 or x.dtype.kind not in "buif" or len(x) < 2 or not x.size:
        raise ValueError(
            f"{subject}: expected as x one array of numbers, with at least two examples along its "
            f"first axis. {received}"
        )
    if x.dtype.kind == "f":
        _check_finite(subject, x)
    if not y.ndim or len(y) != len(x):
        raise ValueError(
            f"{subject}: expected as y the labels of all inputs, one for each. {received}"
        )
    if y.dtype.kind not in "buif":
        raise ValueError(
            f"{subject}: expected as y (the labels) numbers, the index of each example's class. Of "
            f"names of classes: np.unique(y, return_inverse=True)[1]. {received}"
        )
    if y.shape not in ((len(x),), (len(x), 1)):
        columns = y.ndim == 2
        hint = ", and not one column for each class: of those, y.argmax(-1)" if columns else ""
        raise ValueError(
            f"{subject}: expected as y (the labels) the index of each example's class{hint}. "
            f"{received}"
        )
    wrong = ~np.isfinite(y) | (y < 0) | (y != np.floor(y)) if y.dtype.kind != "b" else ~(y == y)
    if wrong.any():
        shown = y[:10] if wrong[:10].any() else y[wrong][:10]
        raise ValueError(
            f"{subject}: expected labels that are class indices 0, 1, ... as y. "
            f"Received: {shown}..."
        )
    return x, y


def _array(subject: str, name: str, value: Any) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # Whatever NumPy, or what stands in for an array, makes of it.
        raise ValueError(f"{subject}: {name} cannot be made an array: {error}") from error


def _check_finite(subject: str, x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise ValueError(
            f"{subject}: expected finite numbers as x. There are NaN or infinities in "
            f"{x.dtype}{x.shape}."
        )
    largest = max(abs(float(x.min())), abs(float(x.max())))
    limit = float(np.finfo("float32").max)
    if largest > limit:
        raise ValueError(
            f"{subject}: expected as x numbers that float32 holds, up to {limit:.2g}. Received: x "
            f"of {x.dtype} up to {largest:.3g}."
        )


def _check_classes(
    subjects: tuple[str, str], y_train: np.ndarray, y_test: np.ndarray, classes: int | None
) -> None:
    largest = int(y_train.max())
    if classes is None and largest >= len(y_train):
        raise ValueError(
            f"{subjects[0]}: expected labels that are class indices 0, 1, ... as y. Received: "
            f"up to {largest} for {len(y_train)} examples, which have no more classes than that. "
            "Number the classes: np.unique(y, return_inverse=True)[1]."
        )
    if y_train.min() == largest:
        raise ValueError(
            f"{subjects[0]}: expected labels of two classes at least. Received: {largest} alone."
        )
    count = classes or largest + 1
    for subject, y in zip(subjects, (y_train, y_test), strict=True):
        if y.max() >= count:
            raise ValueError(
                f"{subject}: expected labels of {count} classes, 0 to {count - 1}"
                f"{'' if classes else ', as there are to train on'}. Received labels up to "
                f"{int(y.max())}."
            )
