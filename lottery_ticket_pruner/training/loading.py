"""Reads data sets that `fit` accepts, which come in batches, into memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner.training.dataset import Arrays


def to_arrays(x: object, y: Arrays | None = None) -> tuple[Arrays, Arrays | None]:
    """Returns inputs and targets as arrays, either unchanged or read from a data set.

    As in `fit`, a data set consists of batches of `(inputs, targets)` or of inputs alone. They are
    concatenated in their order. The data set is read once, as in one epoch, so a data set that
    shuffles has another order each time it is read.

    Args:
        x: Arrays, with `y`; or a finite `tf.data.Dataset`, `keras.utils.PyDataset` or torch
            `DataLoader`, without `y`. Inputs and targets may be lists or dicts of arrays.
        y: Targets as arrays. None for a data set, or if there are no targets.

    Raises:
        ValueError: If `y` is passed with a data set, or if the data set is infinite, has no
            batches, or has elements other than such batches.
    """
    if not _is_dataset(x):
        return x, y
    if y is not None:
        raise ValueError(
            f"A {type(x).__name__} contains its targets: leave out `y`. Received: y of type "
            f"{type(y).__name__}"
        )
    batches = [_checked(x, batch) for batch in _batches(x)]
    if not batches:
        raise ValueError(f"The {type(x).__name__} has no batches: there is nothing to read.")
    arrays = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    return (*arrays, None)[:2]


def pair_of(data: object) -> Sequence[Arrays] | None:
    """Returns `validation_data` as arrays. Tuples are returned unchanged, data sets are read.

    Raises:
        ValueError: If `to_arrays` does not accept the data set.
    """
    return data if data is None or isinstance(data, tuple | list) else to_arrays(data)


def _is_dataset(x: object) -> bool:
    if isinstance(x, keras.utils.PyDataset):
        return True
    # The user of such an object has imported its library. It is not imported for anyone else.
    tensorflow = sys.modules.get("tensorflow")
    torch_data = sys.modules.get("torch.utils.data")
    return (tensorflow is not None and isinstance(x, tensorflow.data.Dataset)) or (
        torch_data is not None and isinstance(x, torch_data.DataLoader)
    )


def _batches(dataset: Any) -> Iterator[Any]:
    """Yields the batches of one epoch."""
    if _is_endless(dataset):
        raise ValueError(
            f"The {type(dataset).__name__} is infinite, but all of it is read into memory. "
            "Leave out `repeat()`, or take a part of it, such as `dataset.take(count)`."
        )
    if not isinstance(dataset, keras.utils.PyDataset):
        yield from dataset
        return
    dataset.on_epoch_begin()
    for number in range(dataset.num_batches):
        yield dataset[number]
    dataset.on_epoch_end()


def _is_endless(dataset: object) -> bool:
    if isinstance(dataset, keras.utils.PyDataset):
        return dataset.num_batches is None
    cardinality = getattr(dataset, "cardinality", None)
    return cardinality is not None and int(cardinality()) == -1  # tf.data.INFINITE_CARDINALITY


def _checked(dataset: object, batch: object) -> tuple[Arrays, ...]:
    """Returns the batch as inputs, or inputs and targets: arrays, or structures of arrays."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 2:
        raise ValueError(
            f"Expected batches of (inputs, targets) from a {type(dataset).__name__}, without "
            f"sample weights. Received a batch of {len(parts)} parts."
        )
    arrays = keras.tree.map_structure(np.asarray, parts)
    shapes = [array.shape for array in keras.tree.flatten(arrays)]
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"Expected batches from a {type(dataset).__name__}, with one entry per example in "
            f"inputs and targets. Received an element of shapes {shapes}: batch the data set, as "
            "for `fit`, with `dataset.batch(...)` or `batch_size=...`."
        )
    return arrays
