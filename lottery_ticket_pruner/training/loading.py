"""Data that comes in batches, read into memory: the data sets that `fit` takes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner.training.dataset import Arrays


def arrays_of(x: Any, y: Arrays | None = None) -> tuple[Arrays, Arrays | None]:
    """Inputs and targets as arrays: as they are given, or read from a data set.

    A data set is one that `fit` takes, and like there it consists of batches of `(inputs, targets)`
    or of inputs alone, which are put together again in their order. It is read once, as in one
    epoch. One that shuffles gives another order each time it is read.

    Args:
        x: Arrays, with `y`; or a finite `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch
            `DataLoader`, without it. Inputs and targets may be lists or dicts of arrays.
        y: Targets of arrays; None beside a data set, or where there are none.

    Raises:
        ValueError: Targets beside a data set, one without end or without batches, or one whose
            elements are not batches of that kind.
    """
    if not _is_dataset(x):
        return x, y
    if y is not None:
        raise ValueError(
            f"A {type(x).__name__} brings its targets with it: leave `y` out. Received: y of type "
            f"{type(y).__name__}"
        )
    batches = [_checked(x, batch) for batch in _batches(x)]
    if not batches:
        raise ValueError(f"The {type(x).__name__} has no batches: there is nothing to read.")
    arrays = keras.tree.map_structure(lambda *parts: np.concatenate(parts), *batches)
    return (*arrays, None)[:2]


def pair_of(data: Any) -> tuple[Arrays, ...] | None:
    """Returns `validation_data` as arrays: a tuple as it is, a data set read into memory.

    Raises:
        ValueError: As for `arrays_of`.
    """
    return data if data is None or isinstance(data, tuple | list) else arrays_of(data)


def _is_dataset(x: Any) -> bool:
    if isinstance(x, keras.utils.PyDataset):
        return True
    # Who has such an object has imported its library, which is imported for nobody else.
    tensorflow = sys.modules.get("tensorflow")
    torch_data = sys.modules.get("torch.utils.data")
    return (tensorflow is not None and isinstance(x, tensorflow.data.Dataset)) or (
        torch_data is not None and isinstance(x, torch_data.DataLoader)
    )


def _batches(dataset: Any) -> Iterator[Any]:
    """The batches of one epoch."""
    if _is_endless(dataset):
        raise ValueError(
            f"The {type(dataset).__name__} has no end, and all of it is to be read into memory. "
            "Leave `repeat()` out, or take a part of it, as with `dataset.take(count)`."
        )
    if not isinstance(dataset, keras.utils.PyDataset):
        yield from dataset
        return
    dataset.on_epoch_begin()
    for number in range(dataset.num_batches):
        yield dataset[number]
    dataset.on_epoch_end()


def _is_endless(dataset: Any) -> bool:
    if isinstance(dataset, keras.utils.PyDataset):
        return dataset.num_batches is None
    cardinality = getattr(dataset, "cardinality", None)
    return cardinality is not None and int(cardinality()) == -1  # tf.data.INFINITE_CARDINALITY


def _checked(dataset: Any, batch: Any) -> tuple[Arrays, ...]:
    """The batch as inputs, or inputs and targets: arrays, or structures of them."""
    parts = tuple(batch) if isinstance(batch, tuple | list) else (batch,)
    if not 1 <= len(parts) <= 2:
        raise ValueError(
            f"Expected of a {type(dataset).__name__} batches of (inputs, targets), without weights "
            f"of examples. Received a batch of {len(parts)} parts."
        )
    arrays = keras.tree.map_structure(np.asarray, parts)
    shapes = [array.shape for array in keras.tree.flatten(arrays)]
    if () in shapes or len({shape[0] for shape in shapes}) > 1:
        raise ValueError(
            f"Expected of a {type(dataset).__name__} batches, with one entry per example in inputs "
            f"and targets. Received an element of shapes {shapes}: batch the data set, as for "
            "`fit`, with `dataset.batch(...)` or `batch_size=...`."
        )
    return arrays
