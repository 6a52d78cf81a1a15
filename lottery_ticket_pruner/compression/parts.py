"""Training, validation and test data of a search, from as many parts as there are."""

import dataclasses
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import ArrayDataset, Arrays, map_arrays

# Splits do not depend on the seed of a search.
_SPLIT_SEED = 20190423
_TEST_SHARE = 0.2
_VALIDATION_SHARE = 0.15
_NAMES = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Parts:
    """Three disjoint parts of the data as pairs of inputs and targets, in memory.

    Attributes:
        train: Inputs and targets to train on.
        validation: Those that decide what is good enough.
        test: Those that are used once, at the end.
        notes: Sentences about parts that were split off.
        permuted: Names of the parts whose examples are not where they were in the data.
    """

    train: tuple[Arrays, Arrays]
    validation: tuple[Arrays, Arrays]
    test: tuple[Arrays, Arrays]
    notes: tuple[str, ...] = ()
    permuted: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """Returns the number of examples of each part by name."""
        return {name: _length(getattr(self, name)) for name in _NAMES}


def parts_of(data: Any) -> Parts:
    """Returns the three parts of data in any of the forms that `prune` accepts.

    What is missing is split off by a fixed permutation: 20 % of the examples for the test, then
    15 % of the training examples for validation.

    Args:
        data: `(x, y)`; `((x, y), (x_test, y_test))`; three such pairs, the second one for
            validation; one to three data sets of batches instead (see `training.to_arrays`); a
            `training.ArrayDataset`; or an object with the attributes `x_train`, `y_train`,
            `x_validation`, `y_validation`, `x_test` and `y_test`.

    Raises:
        ValueError: If the data has another form, pairs differ in their structure or have different
            lengths, or there are too few examples to split.
    """
    pairs = [_checked(name, pair) for name, pair in _pairs(data)]
    kinds = {repr(ArrayDataset(pair).kinds) for pair in pairs}
    if len(kinds) > 1:
        raise ValueError(
            "Expected inputs and targets of the same types and shapes in all parts of the data. "
            f"Received: {' and '.join(sorted(kinds))}"
        )
    notes = []
    permuted = {1: _NAMES, 2: _NAMES[:2]}.get(len(pairs), ())
    train, *others = pairs
    if not others:
        train, test = split_off_test(train)
        others = [test]
        notes.append(
            f"A fifth of the examples ({_length(test)}) was split off for the test by a fixed "
            "permutation. If the model was trained on them, the test flatters it: pass "
            "((x_train, y_train), (x_test, y_test)) instead."
        )
    if len(others) == 1:
        train, validation = _split(train, _VALIDATION_SHARE)
        others.insert(0, validation)
        notes.append(
            f"{_length(validation)} of the training examples were held out by a fixed permutation "
            "to decide what is good enough. If the model was trained on them, it looks better "
            "there than it is: pass three pairs, for training, validation and test, instead."
        )
    validation, test = others
    return Parts(train, validation, test, tuple(notes), permuted)


def test_part_of(data: Any) -> tuple[Arrays, Arrays]:
    """Returns the test part of data in any of the forms of `parts_of`.

    Of a single pair, all examples are returned.

    Raises:
        ValueError: If the data has another form.
    """
    return _checked(*_pairs(data)[-1])


def split_off_test(pair: tuple[Arrays, Arrays]) -> tuple[tuple[Arrays, Arrays], ...]:
    """Splits a pair of inputs and targets into one to train on and one to test on.

    Raises:
        ValueError: If there are too few examples.
    """
    return _split(pair, _TEST_SHARE)


def sample_of(arrays: Any, count: int) -> Any:
    """Returns at most `count` examples of arrays, spread over all of them.

    Examples are often sorted by class, so that the first ones would be of a single class.
    """
    size = len(keras.tree.flatten(arrays)[0])
    chosen = np.linspace(0, size - 1, min(count, size)).round().astype(int)
    return map_arrays(lambda array: array[chosen], arrays)


def _pairs(data: Any) -> list[tuple[str, Any]]:
    """Returns the parts that are there, with the name of each."""
    if isinstance(data, ArrayDataset):
        return [("data", data.host)]
    fields = [(f"x_{name}", f"y_{name}") for name in _NAMES]
    if all(hasattr(data, x) and hasattr(data, y) for x, y in fields):
        parts = [(getattr(data, x), getattr(data, y)) for x, y in fields]
        return list(zip(_NAMES, parts, strict=True))
    if not isinstance(data, tuple | list):
        return [("data", training.pair_of(data))]
    if len(data) == 2 and not all(isinstance(part, tuple) or _is_dataset(part) for part in data):
        return [("data", data)]
    if not 1 <= len(data) <= 3:
        raise ValueError(
            "Expected (x, y), ((x_train, y_train), (x_test, y_test)), or three pairs for training, "
            f"validation and test. Received: a {type(data).__name__} of {len(data)}."
        )
    names = [name for name in _NAMES if name != "validation" or len(data) == 3][: len(data)]
    return [(name, training.pair_of(part)) for name, part in zip(names, data, strict=True)]


def _is_dataset(part: object) -> bool:
    return not isinstance(part, tuple | list | dict) and not hasattr(part, "__array__")


def _checked(name: str, pair: Any) -> tuple[Arrays, Arrays]:
    if not isinstance(pair, tuple | list) or len(pair) != 2 or pair[1] is None:
        what = type(pair).__name__
        if isinstance(pair, tuple | list):
            alone = len(pair) == 2 and pair[1] is None  # As `pair_of` reads what is not a pair.
            what = f"{type(pair[0]).__name__} alone" if alone else f"{what} of {len(pair)}"
        raise ValueError(
            f"Expected the part {name!r} of the data to be a pair of inputs and targets, without "
            f"sample weights, several inputs as a list or dict. Received: {what}."
        )
    try:
        host = ArrayDataset.of(*pair).host
    except ValueError as error:
        raise ValueError(f"The part {name!r} of the data: {error}") from error
    return host[0], host[1]


def _length(pair: tuple[Arrays, Arrays]) -> int:
    return len(keras.tree.flatten(pair[0])[0])


def _split(
    pair: tuple[Arrays, Arrays], share: float
) -> tuple[tuple[Arrays, Arrays], tuple[Arrays, Arrays]]:
    """Returns two disjoint pairs, the second one with this share of the examples."""
    size = _length(pair)
    count = max(1, round(share * size))
    if size - count < 1:
        raise ValueError(f"There are too few examples to split: {size}.")
    order = np.random.default_rng(_SPLIT_SEED).permutation(size)
    first, second = np.sort(order[count:]), np.sort(order[:count])
    return _taken(pair, first), _taken(pair, second)


def _taken(pair: tuple[Arrays, Arrays], indices: np.ndarray) -> tuple[Arrays, Arrays]:
    x, y = map_arrays(lambda array: array[indices], pair)
    return x, y
