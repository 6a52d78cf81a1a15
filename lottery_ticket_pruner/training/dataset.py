"""A data set in memory, and its copy on the device."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner.training.augmentation import Augmentation

# An array with the examples along the first axis, or a list or dict of such. None in it stands for
# an array that there is not, as for an output without a loss.
Arrays = Any

# Most lengths in a message: there are as many as examples where these came as a list.
_LISTED = 8


def map_arrays(function: Callable[[Any], Any], arrays: Arrays) -> Arrays:
    """Returns the same structure of what `function` makes of each array."""
    return keras.tree.map_structure(function, arrays, none_is_leaf=False)


@dataclasses.dataclass
class Examples:
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
    ) -> Examples:
        """Takes what `fit` takes as arrays; floats become `keras.config.floatx()`, as there.

        Raises:
            ValueError: If the arrays are not of one length, have no examples, or hold something
                else than numbers (TensorFlow takes texts, too), or numbers that overflow in that
                type.
        """
        data = {"x": x}
        # Without targets Keras drops the weights.
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
            named = ", ".join(f"{name}: {_listed(each)}" for name, each in lengths.items())
            raise ValueError(
                "Expected inputs and targets with one entry per example, and at least one example. "
                "A list stands for several arrays: make an array of a list of numbers or examples. "
                f"Received arrays of lengths [{_listed(sorted(found))}] ({named})."
            )
        return cls(tuple(data.values()), augment)

    def __len__(self) -> int:
        return len(_flat(self.host)[0])

    @property
    def bytes_each(self) -> float:
        """The size of one example."""
        return sum(array.nbytes for array in _flat(self.host)) / len(self)

    @property
    def specification(self) -> tuple[str, ...]:
        """The structure, the shapes and the types: what programs are compiled for."""
        each = map_arrays(lambda array: f"{array.dtype}{array.shape}", self.host)
        return tuple(map(str, each))

    @property
    def kinds(self) -> tuple[Any, ...]:
        """The type and the shape of one example, inputs and targets, without sample weights."""
        return tuple(
            map_arrays(lambda array: f"{array.dtype}{array.shape[1:]}", part)
            for part in self.host[:2]
        )

    def take(self, indices: Any) -> tuple[Arrays, ...]:
        """Returns these examples, a copy on the host."""
        return map_arrays(lambda array: array[indices], self.host)

    def rows(self, order: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        """Returns an int32 row for each index of `order`: the index, and what is random then."""
        order = order.astype("int32")[:, None]
        if self.augment is None:
            return order
        return np.concatenate([order, self.augment.draw(rng, len(order))], axis=1)

    def augmented(self, rows: np.ndarray, batch_size: int) -> tuple[Arrays, ...]:
        """Returns the examples of these rows, changed batch by batch, a copy on the host."""
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


def _listed(numbers: list[int]) -> str:
    more = len(numbers) - _LISTED
    return ", ".join(map(str, numbers[:_LISTED])) + (f" and {more} more" if more > 0 else "")


def _as_keras_would(name: str, array: Any) -> np.ndarray:
    try:
        array = np.asarray(array)
    except Exception as error:  # Whatever NumPy, or what stands in for an array, makes of it.
        raise ValueError(f"Expected arrays as {name}: {error}") from error
    texts = array.dtype.kind in "SUT" or (
        array.dtype.kind == "O" and all(isinstance(text, str | bytes) for text in array.flat)
    )
    # Those of the types that NumPy lacks are of kind V, such as bfloat16.
    numbers = array.dtype.kind in "buifc" or "float" in array.dtype.name
    if not numbers and not (texts and keras.backend.backend() == "tensorflow"):
        raise ValueError(
            f"Expected as {name} arrays of numbers. Received: {array.dtype}{array.shape}. Make an "
            "array of rows of equal length, and numbers of texts and dates."
        )
    if not np.issubdtype(array.dtype, np.floating):
        return array
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(keras.config.floatx(), copy=False)
        # A sum with an infinity in it is none: quicker than a look at every entry.
        suspect = cast is not array and not np.isfinite(cast.sum(dtype="float64"))
    lost = np.isinf(cast) & np.isfinite(array) if suspect else np.zeros(0)
    if lost.any():
        raise ValueError(
            f"Expected as {name} numbers that {cast.dtype} holds. Received {array.dtype} such as "
            f"{array[lost][0]}, which becomes infinite: scale the data, or use "
            "`keras.config.set_floatx`."
        )
    return cast
