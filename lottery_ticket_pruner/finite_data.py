"""Finds NaN and infinities in data, which would otherwise show only after a training."""

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from lottery_ticket_pruner import training
from lottery_ticket_pruner.evidence import loss_gradients
from lottery_ticket_pruner.training import map_arrays

# Entries that are tested at once, so that memory-mapped arrays are not read as a whole.
_BLOCK = 1 << 20
# Number of examples that are evaluated together with the first one that is not finite, and of those
# among which they are chosen.
_OTHERS, _SEARCHED = 31, 256


def not_finite(array: Any) -> str | None:
    """Says how many entries of an array are NaN or infinite and where the first one is, or None."""
    found = _count(array)
    if found is None:
        return None
    count, first = found
    entries = "1 entry that is" if count == 1 else f"{count:,} entries that are"
    return f"{entries} NaN or infinite, the first at [{', '.join(map(str, first))}]"


def check(
    model: keras.Model, name: str, data: tuple[Any, ...] | None, *, trained: bool = False
) -> None:
    """Checks that the values in data are finite, unless the model's loss is finite without that.

    Some losses leave out targets that are NaN, and some layers replace missing inputs. Therefore
    the first example with such a value is evaluated, first alone and then together with others,
    because a mean over the known targets of a batch is NaN where none is known. Where inputs have a
    fixed batch size, examples are repeated to fill it. A finite loss is not enough to train on:
    a ReLU makes 0 of NaN on some backends, but the gradient of the kernel before it is NaN.

    Args:
        model: A compiled model.
        name: Description of the data for messages, such as `"validation data"`.
        data: `(x,)`, `(x, y)` or `(x, y, sample_weight)`, or None.
        trained: Whether the model is trained on the data, so that gradients matter, too.

    Raises:
        ValueError: If an array has entries that are not finite, and the loss of the first of these
            examples is not finite either, neither alone nor in a batch, or its gradient is not.
    """
    for path, array in keras.tree.flatten_with_path(data or ()):
        found = None if array is None else _count(array)
        if found is None:
            continue
        what = _problem(model, data, found[1][0], trained)
        if what is None:
            continue
        part, *inside = path
        place = "".join(f"[{key!r}]" for key in inside)
        raise ValueError(
            f"`{('x', 'y', 'sample_weight')[part]}{place}` of the {name} has "
            f"{not_finite(array)}, and {what}. Replace these values, or leave these examples out."
        )


def _problem(model: keras.Model, data: Any, example: int, trained: bool) -> str | None:
    """Says what becomes NaN or infinite by an example, or returns None. See `check`."""
    fixed = training.fixed_batch_size(model)
    loss = _loss_of(model, data, [example] * (fixed or 1))
    if math.isfinite(loss) and not trained:
        return None
    batch = _batch(data, example)
    together = np.resize(batch, fixed or len(batch))
    if not math.isfinite(loss) and not math.isfinite(_loss_of(model, data, together)):
        return f"the loss of that example is {loss}"
    if trained and not _has_finite_gradients(model, data, together):
        return "gradients of a batch with that example are NaN or infinite"
    return None


def _loss_of(model: keras.Model, data: Any, examples: Sequence[int] | np.ndarray) -> float:
    """Returns the loss of some examples, or 0 if the model does not take them."""
    some = map_arrays(lambda array: np.asarray(array)[examples], data)
    try:
        return float(training.evaluate(model, *some)["loss"])
    except Exception:  # Each backend raises types of its own. The training says what is wrong.
        return 0.0


def _has_finite_gradients(model: keras.Model, data: Any, examples: np.ndarray) -> bool:
    """Returns whether gradients of the loss of some examples are finite.

    True if there are none, or if the model has its own step of training, which may leave out what
    is not finite.
    """
    if training.engine_of(model).has_own_step:
        return True
    chosen = map_arrays(lambda array: np.asarray(array)[examples], data)
    x, y, weights = (*chosen, None, None)[:3]
    try:
        found = loss_gradients(model, x, y, sample_weight=weights)
    except Exception:  # As above.
        return True
    return all(np.isfinite(gradient).all() for gradient in found.values())


def _batch(data: Any, example: int) -> list[int]:
    """Returns an example and others, with as few entries that are not finite as possible."""
    arrays = [np.asarray(array) for array in keras.tree.flatten(data) if array is not None]
    chosen = np.unique(np.linspace(0, len(arrays[0]) - 1, _SEARCHED).round().astype(int))
    wrong = np.zeros(len(chosen), int)
    for array in arrays:
        if array.dtype.kind in "fc":
            wrong += np.count_nonzero(~np.isfinite(array[chosen]).reshape(len(chosen), -1), axis=1)
    others = chosen[np.argsort(wrong, kind="stable")]
    return [example, *others[others != example][:_OTHERS].tolist()]


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
