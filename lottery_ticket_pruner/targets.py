"""Error messages for targets that do not fit the loss, in place of shape errors deep in Keras."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from masked_layers import workers

_INDICES = ("sparsecategoricalcrossentropy",)
_COLUMNS = ("categoricalcrossentropy", "categoricalfocalcrossentropy")
# Losses of Keras whose targets do not have the shape of the outputs.
_OTHERS = ("categoricalgeneralizedcrossentropy", "circle", "ctc")


@contextlib.contextmanager
def explained(model: keras.Model, x: object, y: object) -> Iterator[None]:
    """Replaces an error in the block by an explanation if the targets do not fit the loss.

    Args:
        model: A compiled model.
        x: Inputs: an array, or a list or dict of arrays.
        y: Targets: an array, a list or dict of arrays, or None.

    Raises:
        ValueError: If the block fails and the targets do not fit the compiled losses. Any other
            error is raised unchanged.
    """
    try:
        yield
    except Exception as error:  # Each backend raises types of its own.
        # A failure of the explanation must not hide the error.
        problem = None
        with contextlib.suppress(Exception):
            problem = mismatch(model, x, y)
        if problem is None:
            workers.note_other_workers(model, error)
            raise
        raise ValueError(problem) from error


def check(model: keras.Model, x: object, y: object) -> None:
    """Checks that targets are numbers and fit the compiled losses.

    Raises:
        ValueError: If they do not. The message says what was received, what was expected and what
            to do.
    """
    for part in keras.tree.flatten(y):
        first = next(iter(np.asarray(part).flat), None)
        if isinstance(first, str | bytes):
            raise ValueError(
                f"Targets must be numbers. Received: text, such as {str(first)!r}. Number classes: "
                "`y = np.unique(y, return_inverse=True)[1]`."
            )
    problem = None
    # Subclassed models are skipped: they would be called on symbols, which they may keep.
    if getattr(model, "outputs", None):
        with contextlib.suppress(Exception):  # The outputs of the model cannot be predicted.
            problem = mismatch(model, x, y)
    if problem is not None:
        raise ValueError(problem)


def mismatch(model: keras.Model, x: object, y: object) -> str | None:
    """Returns why targets do not fit the compiled losses. None if they do or it is unknown."""
    if y is None or getattr(model, "loss", None) is None:
        return None
    specs = keras.tree.map_structure(lambda array: keras.KerasTensor(array.shape, array.dtype), x)
    outputs = model.compute_output_spec(specs)
    count = len(keras.tree.flatten(outputs))
    names = list(getattr(model, "output_names", None) or [])
    if isinstance(outputs, Mapping):
        names = sorted(outputs)
    parts = [y.get(name) for name in names] if isinstance(y, Mapping) else keras.tree.flatten(y)
    losses = losses_of(model, outputs)
    if not len(parts) == len(losses) == count:
        return None
    for number, (loss, part, output) in enumerate(
        zip(losses, parts, keras.tree.flatten(outputs), strict=True)
    ):
        if loss is not None and part is not None:
            problem = _problem(loss, np.asarray(part), tuple(output.shape))
            if problem is not None:
                which = f" for its output {names[number]!r}" if count > 1 and names else ""
                return f"The loss of {model.name!r}{which}, {problem}"
    return None


def losses_of(model: keras.Model, outputs: object) -> list[Any]:
    """Returns the losses of a compiled model, one for each output, in the order of the outputs."""
    loss = model.loss
    if isinstance(loss, Mapping):
        known = getattr(model, "output_names", sorted(loss))
        names = sorted(outputs) if isinstance(outputs, Mapping) else known
        losses = [loss.get(name) for name in names]
    else:
        losses = keras.tree.flatten(loss)
    if len(losses) == 1:  # for all outputs
        losses *= len(keras.tree.flatten(outputs))
    return losses


def name_of(loss: object) -> str:
    """Returns the name of a loss, the same for function and class: `categoricalcrossentropy`."""
    loss = keras.losses.get(loss)
    return getattr(loss, "__name__", type(loss).__name__).replace("_", "").lower()


def _problem(loss: object, y: np.ndarray, outputs: tuple[int | None, ...]) -> str | None:
    name = name_of(loss)
    own = keras.losses.get(loss)
    module = getattr(own, "__module__", None) or type(own).__module__
    along_last = getattr(own, "axis", -1) in (-1, len(outputs) - 1)
    if not module.startswith("keras.") or name in _OTHERS or len(outputs) < 2 or not along_last:
        return None
    classes = outputs[-1]
    if classes is None:
        return None
    if not y.size or y.shape[:1] != outputs[:1]:  # wrong number of examples: reported elsewhere
        return None
    said = getattr(own, "__name__", type(own).__name__)
    received = f"Received: {y.dtype} targets of shape {y.shape}"
    indices = y.shape in (outputs[:-1], (*outputs[:-1], 1)) and y.shape != outputs
    columns = y.shape == outputs
    if name in _INDICES:
        expected = f"{said}, expects class indices: integers from 0 to {classes - 1} in shape "
        expected += f"{outputs[:-1]} or {(*outputs[:-1], 1)}, for outputs of shape {outputs}"
        if indices:
            return _out_of_range(own, y, classes, f"{expected}. {received}")
        remedy = "Give one index for each example"
        if columns:
            received += ", a column for each class"
            remedy = 'Pass `y.argmax(-1)`, or compile with `loss="categorical_crossentropy"`'
    elif columns or (name not in _COLUMNS and _goes_with(y.shape, outputs)):
        return None
    else:
        expected = f"{said}, expects targets of the shape of the outputs, {outputs}"
        remedy = "Change the targets, or the number of units of the output layer"
        if name in _COLUMNS:
            expected = expected.replace("targets", "a column for each class: targets")
            if indices:
                received += ", one class index for each example"
                remedy = (
                    f"Pass `keras.utils.to_categorical(y, {classes})`, or compile with "
                    '`loss="sparse_categorical_crossentropy"`'
                )
    return f"{expected}. {received}. {remedy}."


def _goes_with(targets: tuple[int, ...], outputs: tuple[int | None, ...]) -> bool:
    """Returns True if Keras accepts both shapes, possibly after adding or dropping a last axis."""
    for one, other in ((targets, outputs), ((*targets, 1), outputs), (targets, (*outputs, 1))):
        with contextlib.suppress(ValueError):
            np.broadcast_shapes(one, tuple(1 if size is None else size for size in other))
            return True
    return False


def _out_of_range(loss: Any, y: np.ndarray, classes: int, message: str) -> str | None:
    """Returns `message` with the range of the indices, or None if the loss accepts all of them."""
    used = y[y != loss.ignore_class] if getattr(loss, "ignore_class", None) is not None else y
    if not used.size or (used.min() >= 0 and used.max() < classes):
        return None
    return (
        f"{message} from {used.min()} to {used.max()}. Number the classes from 0, for example with "
        "`np.unique(y, return_inverse=True)[1]`, or add units to the output layer."
    )
