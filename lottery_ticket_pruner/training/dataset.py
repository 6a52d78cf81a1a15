"""A data set in memory and its copy on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner.training.augmentation import Augmentation
from masked_layers.text_tables import shortened

# An array with examples along the first axis, or a list or dict of such arrays. None stands for a
# missing array, such as the targets of an output without a loss.
Arrays = Any

# Maximum number of lengths in a message. If a list was passed, there may be one per example.
_LISTED = 8


def map_arrays(function: Callable[[Any], Any], arrays: Arrays) -> Arrays:
    """Applies `function` to each array and returns the results in the same structure."""
    return keras.tree.map_structure(function, arrays, none_is_leaf=False)


@dataclasses.dataclass
class ArrayDataset:
    """A data set in memory: `(x,)`, `(x, y)` or `(x, y, sample_weight)`."""

    host: tuple[Arrays, ...]
    augment: Augmentation | None = None

    @classmethod
    def of(
        cls,
        x: Arrays,
        y: Arrays | None = None,
        sample_weight: Arrays | None = None,
        augment: Augmentation | None = None,
    ) -> ArrayDataset:
        """Creates a data set from the arrays that `fit` takes, with floats as in `floatx()`.

        Raises:
            ValueError: If the arrays differ in length, contain no examples, values other than
                numbers (on TensorFlow, texts are allowed), or numbers that overflow in that type.
        """
        data = {"x": x}
        # Without targets, Keras ignores the weights.
        if y is not None:
            data["y"] = y
            if sample_weight is not None:
                data["sample_weight"] = sample_weight
        data = {
            name: map_arrays(functools.partial(_as_keras_would, name), arrays)
            for name, arrays in data.items()
        }
        lengths = {
            name: [len(array) if array.ndim else 0 for array in _flat(arrays)]
            for name, arrays in data.items()
        }
        found = {length for each in lengths.values() for length in each}
        if len(found) != 1 or 0 in found:
            shown = functools.partial(shortened, most=_LISTED)
            named = ", ".join(f"{name}: {shown(each)}" for name, each in lengths.items())
            raise ValueError(
                "Expected inputs and targets with one entry per example, and at least one example. "
                "A list stands for several arrays: convert a list of numbers or examples to an "
                f"array. Received arrays of lengths [{shown(sorted(found))}] ({named})."
            )
        return cls(tuple(data.values()), augment)

    def __len__(self) -> int:
        return len(_flat(self.host)[0])

    @property
    def bytes_each(self) -> float:
        """Size of one example in bytes."""
        return sum(array.nbytes for array in _flat(self.host)) / len(self)

    @property
    def specification(self) -> tuple[str, ...]:
        """The structure, shapes and types, for which programs are compiled."""
        each = map_arrays(lambda array: f"{array.dtype}{array.shape}", self.host)
        return tuple(map(str, each))

    @property
    def kinds(self) -> tuple[Any, ...]:
        """Type and shape of one example (inputs and targets), without sample weights."""
        return tuple(
            map_arrays(lambda array: f"{array.dtype}{array.shape[1:]}", part)
            for part in self.host[:2]
        )

    def take(self, indices: Any) -> tuple[Arrays, ...]:
        """Returns a copy of these examples on the host."""
        return map_arrays(lambda array: array[indices], self.host)

    def indices(self, order: np.ndarray) -> np.ndarray:
        """Returns an int32 row for each index in `order`, which contains only the index."""
        return order.astype("int32")[:, None]

    def rows(self, order: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns an int32 row for each index in `order`: the index and its random numbers."""
        indices = self.indices(order)
        if self.augment is None:
            return indices
        return np.concatenate([indices, self.augment.draw(rng, len(order))], axis=1)

    def augmented(self, rows: np.ndarray, batch_size: int) -> tuple[Arrays, ...]:
        """Returns a copy of the examples of these rows on the host, augmented batch by batch."""
        x, *rest = self.take(rows[:, 0])
        if self.augment is not None:
            starts = range(0, len(rows), batch_size)
            batches = (slice(start, start + batch_size) for start in starts)
            changed = [self.augment.apply(x[batch], rows[batch, 1:]) for batch in batches]
            x = np.concatenate([keras.ops.convert_to_numpy(batch) for batch in changed])
        return (x, *rest)

    @functools.cached_property
    def device(self) -> tuple[Arrays, ...]:
        """The data as tensors of the backend."""
        return map_arrays(keras.ops.convert_to_tensor, self.host)


def _flat(arrays: Arrays) -> list[np.ndarray]:
    return [array for array in keras.tree.flatten(arrays) if array is not None]


def _as_keras_would(name: str, array: object) -> np.ndarray:
    try:
        array = np.asarray(array)
    except Exception as error:  # NumPy and array-like objects raise errors of any type here.
        raise ValueError(f"Expected arrays as {name}: {error}") from error
    texts = array.dtype.kind in "SUT" or (
        array.dtype.kind == "O" and all(isinstance(text, str | bytes) for text in array.flat)
    )
    # Types that NumPy lacks, such as bfloat16, are of kind V.
    numbers = array.dtype.kind in "buifc" or "float" in array.dtype.name
    if not numbers and not (texts and keras.backend.backend() == "tensorflow"):
        raise ValueError(
            f"Expected arrays of numbers as {name}. Received: {array.dtype}{array.shape}. Make all "
            "rows the same length, and convert texts and dates to numbers."
        )
    if texts:  # Keras takes texts only as objects.
        return array.astype(object)
    if not np.issubdtype(array.dtype, np.floating):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(keras.config.floatx(), copy=False)
        # A sum that contains infinity is not finite, which is faster than testing every entry.
        suspect = cast is not array and not np.isfinite(cast.sum(dtype="float64"))
    lost = np.isinf(cast) & np.isfinite(array) if suspect else np.zeros(0)
    if lost.any():
        raise ValueError(
            f"Expected as {name} numbers that fit into {cast.dtype}. Received {array.dtype} such "
            f"as {array[lost][0]}, which becomes infinite: scale the data, or use "
            "`keras.config.set_floatx`."
        )
    return cast
