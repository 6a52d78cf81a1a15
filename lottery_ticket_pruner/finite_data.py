"""Finds NaN and infinities in data, which would otherwise show only after a training."""

import math
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import map_arrays

# Entries that are tested at once, so that memory-mapped arrays are not read as a whole.
_BLOCK = 1 << 20


def not_finite(array: Any) -> str | None:
    """Says how many entries of an array are NaN or infinite and where the first one is, or None."""
    found = _count(array)
    if found is None:
        return None
    count, first = found
    entries = "1 entry that is" if count == 1 else f"{count:,} entries that are"
    return f"{entries} NaN or infinite, the first at [{', '.join(map(str, first))}]"


def check(model: keras.Model, name: str, data: tuple[Any, ...] | None) -> None:
    """Checks that the values in data are finite, unless the model's loss is finite without that.

    Some losses leave out targets that are NaN, and some layers replace missing inputs. Therefore
    the first example with such a value is evaluated.

    Args:
        model: A compiled model.
        name: Description of the data for messages, such as `"validation data"`.
        data: `(x,)`, `(x, y)` or `(x, y, sample_weight)`, or None.

    Raises:
        ValueError: If an array has entries that are not finite, and the loss of the first of these
            examples is not finite either.
    """
    for path, array in keras.tree.flatten_with_path(data or ()):
        found = None if array is None else _count(array)
        if found is None:
            continue
        loss, (part, *inside) = _loss_of(model, data, found[1][0]), path
        if not math.isfinite(loss):
            place = "".join(f"[{key!r}]" for key in inside)
            raise ValueError(
                f"`{('x', 'y', 'sample_weight')[part]}{place}` of the {name} has "
                f"{not_finite(array)}, and the loss of that example is {loss}. "
                "Replace these values, or leave these examples out."
            )


def _loss_of(model: keras.Model, data: Any, example: int) -> float:
    """Returns the loss of an example, or 0 if the model does not take a single one."""
    one = map_arrays(lambda array: np.asarray(array)[example : example + 1], data)
    try:
        return float(training.evaluate(model, *one)["loss"])
    except Exception:  # Each backend raises types of its own, such as for a fixed batch size.
        return 0.0


def _count(array: Any) -> tuple[int, tuple[int, ...]] | None:
    """Returns the number of entries that are not finite and the index of the first, if any."""
    array = np.asarray(array)
    if array.dtype.kind not in "fc" or not array.size:
        return None
    count, first = 0, None
    rows = max(1, _BLOCK * len(array) // array.size) if array.ndim else 1
    for start in range(0, len(array) if array.ndim else 0, rows):
        wrong = ~np.isfinite(array[start : start + rows])
        if not wrong.any():
            continue
        count += int(np.count_nonzero(wrong))
        if first is None:
            row, *rest = np.unravel_index(int(wrong.argmax()), wrong.shape)
            first = (start + int(row), *map(int, rest))
    return None if first is None else (count, first)
