"""Checks of inputs and class labels from any source."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lottery_ticket_pruner.finite_data import not_finite

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def checked(
    source: str,
    arrays: Sequence[Any],
    *,
    places: tuple[str, str] | None = None,
    classes: int | None = None,
) -> Arrays:
    """Checks that a classifier can be trained and judged on arrays, and returns them unchanged.

    Args:
        source: Source of the arrays for messages: a function, a file, or a folder of files.
        arrays: Inputs and labels to train on, and those to judge by, objects of any type.
        places: Sources of both, if they differ.
        classes: Number of classes. By default one more than the largest training label.

    Returns:
        The arrays: `x` of numbers in the range of float32, and `y` of class indices, of shape
        `(examples,)` or `(examples, 1)`.

    Raises:
        ValueError: If the arrays are anything else. The message names the source, what was expected
            and what was received.
    """
    x_train, y_train, x_test, y_test = arrays
    subjects = places or (f"{source}, to train on", f"{source}, to test on")
    train = _checked_part(subjects[0], x_train, y_train)
    test = _checked_part(subjects[1], x_test, y_test)
    pixels = [x.dtype == np.uint8 for x, _ in (train, test)]
    if train[0].shape[1:] != test[0].shape[1:] or pixels[0] != pixels[1]:
        received = " and ".join(f"{x.dtype}{x.shape[1:]}" for x, _ in (train, test))
        raise ValueError(
            f"{source}: expected inputs of one shape and type in all parts. Received: {received}."
        )
    _check_classes(subjects, train[1], test[1], classes)
    return *train, *test


def _checked_part(subject: str, x: object, y: object) -> tuple[np.ndarray, np.ndarray]:
    x, y = _array(subject, "x", x), _array(subject, "y", y)
    received = f"Received: x of {x.dtype}{x.shape}, y of {y.dtype}{y.shape}."
    if x.ndim < 2 or x.dtype.kind not in "buif" or len(x) < 2 or not x.size:
        raise ValueError(
            f"{subject}: expected x to be one array of numbers, with at least two examples along "
            f"its first axis. {received}"
        )
    if x.dtype.kind == "f":
        _check_finite(subject, x)
    if not y.ndim or len(y) != len(x):
        raise ValueError(f"{subject}: expected y to contain one label for each input. {received}")
    if y.dtype.kind not in "buif":
        raise ValueError(
            f"{subject}: expected y (the labels) to be numbers, the index of each example's class. "
            f"For class names: np.unique(y, return_inverse=True)[1]. {received}"
        )
    if y.shape not in ((len(x),), (len(x), 1)):
        columns = y.ndim == 2
        hint = ", not one column for each class: use y.argmax(-1)" if columns else ""
        raise ValueError(
            f"{subject}: expected y (the labels) to be the index of each example's class{hint}. "
            f"{received}"
        )
    wrong = ~np.isfinite(y) | (y < 0) | (y != np.floor(y)) if y.dtype.kind != "b" else ~(y == y)
    if wrong.any():
        shown = y[:10] if wrong[:10].any() else y[wrong][:10]
        raise ValueError(
            f"{subject}: expected y to contain the class indices 0, 1, ... as labels. "
            f"Received: {', '.join(map(str, np.ravel(shown).tolist()))}, ..."
        )
    return x, y


def _array(subject: str, name: str, value: object) -> np.ndarray:
    try:
        return np.asarray(value)
    except Exception as error:  # NumPy and array-like objects raise errors of any type here.
        raise ValueError(f"{subject}: {name} cannot be converted to an array: {error}") from error


def _check_finite(subject: str, x: np.ndarray) -> None:
    if (found := not_finite(x)) is not None:
        raise ValueError(
            f"{subject}: expected x to be finite numbers. {x.dtype}{x.shape} has {found}."
        )
    largest = max(abs(float(x.min())), abs(float(x.max())))
    limit = float(np.finfo("float32").max)
    if largest > limit:
        raise ValueError(
            f"{subject}: expected x to be in the range of float32, up to {limit:.2g}. Received: x "
            f"of {x.dtype} up to {largest:.3g}."
        )


def _check_classes(
    subjects: tuple[str, str], y_train: np.ndarray, y_test: np.ndarray, classes: int | None
) -> None:
    largest = int(y_train.max())
    if classes is None and largest >= len(y_train):
        raise ValueError(
            f"{subjects[0]}: expected y to contain the class indices 0, 1, ... as labels. Received "
            f"up to {largest} for {len(y_train)} examples, which cannot have that many classes. "
            "Number the classes: np.unique(y, return_inverse=True)[1]."
        )
    if y_train.min() == largest:
        raise ValueError(
            f"{subjects[0]}: expected labels of at least two classes. Received: only {largest}."
        )
    count = classes or largest + 1
    for subject, y in zip(subjects, (y_train, y_test), strict=True):
        if y.max() >= count:
            raise ValueError(
                f"{subject}: expected labels of {count} classes, 0 to {count - 1}"
                f"{'' if classes else ', as in the training data'}. Received labels up to "
                f"{int(y.max())}."
            )
