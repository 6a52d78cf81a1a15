"""Compares any number of models on the same examples: predictions, size, sparsity and latency."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner.checks import line_of
from lottery_ticket_pruner.compression.metrics import FEWEST_GROUPS
from lottery_ticket_pruner.compression.parts import test_part_of
from lottery_ticket_pruner.compression.result import save_model
from lottery_ticket_pruner.finite_data import not_finite
from lottery_ticket_pruner.training import Arrays, map_arrays
from lottery_ticket_pruner.wording import signed
from masked_layers import randomness, serving, shrinking, turns
from masked_layers.files import temporary_folder
from masked_layers.text_tables import aligned

# Means of this many groups of examples are resampled, if there are more examples.
_GROUPS = 500
# Differences that are equal except for rounding differ by this share of the largest at most.
_ROUNDING = 1e-9
# Rounds in which the models are called in turns, and seconds after which no other begins.
_ROUNDS, _SECONDS = (9, 41), 3.0
_HEADINGS = (
    "model",
    "",
    "difference",
    "95 % interval",
    "agreement",
    "sparsity",
    "weights",
    "bytes",
    "ms (middle half)",
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that is compared.

    Attributes:
        name: Its name.
        predict: Function that returns its outputs for inputs, as one array.
        prepare: Function that returns a function that runs it once and waits for the outputs. It
            raises an error if the model cannot be timed. On JAX, `predict` takes the memory of
            variables that were read before, so it is called after all predictions.
        stored: Its weights as they are stored.
        nbytes: Bytes of its sparse SavedModel, or None if there is none.
        note: Sentence about what is not known, or empty.
    """

    name: str
    predict: Callable[[Arrays], np.ndarray]
    prepare: Callable[[], Callable[[], Any]]
    stored: serving.StorageReport
    nbytes: int | None
    note: str = ""

    @classmethod
    def of_model(cls, name: str, model: keras.Model, batch_size: int = 1) -> Subject:
        """Returns a subject for a Keras model, which is exported to measure its size.

        Raises:
            ValueError: If the model is not built.
        """
        note = ""
        if not model.built:
            raise ValueError(f"The model {name!r} is not built: call it on data first.")
        nbytes: int | None = None
        with temporary_folder() as folder:
            try:
                stored = ml.export_sparse_saved_model(model, folder / "served")
                nbytes = stored.disk_nbytes
            except Exception as error:  # TensorFlow has errors of its own.
                note = f"{name} has no size for serving: {type(error).__name__}: {error}"
                file = folder / "model.keras"
                save_model(model, file)
                stored = serving.inspect(file)
        prepare = functools.partial(shrinking.Compiled, model, batch_size)
        return cls(name, _predictor(name, model), prepare, stored, nbytes, note)

    @property
    def weights(self) -> tuple[int, int]:
        """Number of weights in kernels and tables that are not zero, and of all of them."""
        rows = [row for row in self.stored if len(row.shape) > 1]
        return sum(row.alive for row in rows), sum(row.size for row in rows)


@dataclasses.dataclass(frozen=True)
class ModelComparison:
    """A comparison of models on the same examples. It prints as a table.

    Attributes:
        metric: `"accuracy"`, or `"mean squared error"` if the targets are not classes.
        rows: One dict per model: `model` (its name), `value` (of the metric), `difference` (from
            the value of the first model), `low` and `high` (the 95 % interval of the difference
            over samples of examples, or None), `agreement` (share of examples for which it
            predicts the class that the first model predicts, or None), `sparsity` (share of zeros
            in kernels and tables), `weights` (number of other values in these), `nbytes` (of its
            sparse SavedModel, or None), and `milliseconds`, `fast` and `slow` (median and quartiles
            of the time of a call in turns with the others, or None).
        examples: Number of examples.
        notes: Sentences about what is not known.
    """

    metric: str
    rows: list[dict[str, Any]]
    examples: int
    notes: tuple[str, ...] = ()

    @property
    def in_points(self) -> bool:
        """True if differences are those of accuracies, which are told in percentage points."""
        return all(row["agreement"] is not None for row in self.rows)

    def to_json(self) -> bytes:
        """Returns the comparison as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def cells(self) -> list[tuple[str, ...]]:
        """Returns the headings of the table and its lines, without empty columns."""
        lines: list[tuple[str, ...]] = [(_HEADINGS[0], self.metric, *_HEADINGS[2:])]
        lines += [_cells(row, is_first=not i) for i, row in enumerate(self.rows)]
        columns = [i for i in range(len(_HEADINGS)) if any(line[i] for line in lines[1:])]
        return [tuple(line[i] for i in columns) for line in lines]

    def __str__(self) -> str:
        table = aligned([list(line) for line in self.cells()], left={0})
        unit = "; differences in points" if self.in_points and len(self.rows) > 1 else ""
        return "\n".join([*table, f"{self.examples} examples{unit}", *self.notes])


def compare(
    models: Mapping[str, keras.Model], data: Any, *, batch_size: int = 1
) -> ModelComparison:
    """Compares models on the same test data with the first one.

    The difference from the first model has an interval, since both are measured on the same
    examples: Newcombe's of paired shares for an accuracy, or else a bootstrap of the mean. Latency
    is measured in turns, so that other load on the machine affects all models equally. Models are
    timed as they are; masked layers compute a selection as well. Scores that are NaN predict no
    class.

    Args:
        models: The models by name. They need not be compiled.
        data: `(x, y)`, or a tuple of two or three such pairs, of which the last one is used; data
            sets of batches in their place (see `training.to_arrays`).
        batch_size: Number of examples of a call whose time is measured.

    Raises:
        TypeError: If the models have no names, or one is not a model.
        ValueError: If there is no model, a model is not built or has several outputs, outputs and
            targets do not fit, or the data has another form.
    """
    if not isinstance(models, Mapping):
        raise TypeError(f"Expected a dict of models by name. Received: {models!r}")
    for name, model in models.items():
        if not isinstance(model, keras.Model):
            raise TypeError(f"Expected a `keras.Model` named {name!r}. Received: {model!r}")
    subjects = [Subject.of_model(name, model, batch_size) for name, model in models.items()]
    return compare_subjects(subjects, test_part_of(data))


def compare_subjects(subjects: Sequence[Subject], pair: tuple[Arrays, Arrays]) -> ModelComparison:
    """Compares subjects on inputs and targets. See `compare`."""
    if not subjects:
        raise ValueError("Expected at least one model. Received: none.")
    x, y = pair
    outputs = subjects[0].predict(x)
    metric, judge = _judge(y, outputs)
    judged, without_number = [], []
    for number, one in enumerate(subjects):
        outputs = one.predict(x) if number else outputs
        judged.append(judge(one.name, outputs))
        without_number += _note_of_nan(one.name, outputs)
    times, untimed = _seconds(subjects)
    first_scores, first_classes = judged[0]
    rows = []
    for number, (one, (scores, classes)) in enumerate(zip(subjects, judged, strict=True)):
        low, high = _interval(scores, first_scores) if number else (None, None)
        alive, size = one.weights
        agreement = None if classes is None else float(np.mean(classes == first_classes))
        quartiles = np.quantile(times[number], (0.25, 0.5, 0.75)) if number in times else None
        fast, middle, slow = [None] * 3 if quartiles is None else (1e3 * quartiles).tolist()
        rows.append(
            {
                "model": one.name,
                "value": float(scores.mean()),
                "difference": float(scores.mean() - first_scores.mean()),
                "low": low,
                "high": high,
                "agreement": agreement,
                "sparsity": 1 - alive / size if size else 0.0,
                "weights": alive,
                "nbytes": one.nbytes,
                "milliseconds": middle,
                "fast": fast,
                "slow": slow,
            }
        )
    notes = [one.note for one in subjects if one.note] + without_number + untimed
    notes += [
        f"The inputs have {found}." for found in map(not_finite, keras.tree.flatten(x)) if found
    ]
    if without := [str(row["model"]) for row in rows[1:] if _has_no_interval(row)]:
        few = f"{len(first_scores)} examples are too few for intervals."
        alike = f"No interval for {', '.join(without)}: the difference is the same everywhere."
        notes.append(few if len(first_scores) < FEWEST_GROUPS else alike)
    return ModelComparison(metric, rows, len(first_scores), tuple(notes))


def _note_of_nan(name: str, outputs: np.ndarray) -> list[str]:
    """Returns a sentence if outputs of a model are NaN."""
    examples = int(np.isnan(outputs.reshape(len(outputs), -1)).any(-1).sum())
    return [f"{name} has outputs that are NaN for {examples:,} examples."] if examples else []


_Judged = tuple[np.ndarray, np.ndarray | None]


def _judge(y: Arrays, outputs: np.ndarray) -> tuple[str, Callable[[str, np.ndarray], _Judged]]:
    """Returns the metric, and a function that scores each example and returns its class."""
    if not isinstance(y, np.ndarray):
        raise ValueError("Models are compared on targets that are one array. Received: several.")
    if y.dtype.kind not in "biuf":
        raise ValueError(
            "Models are compared on targets that are numbers, classes as their indices. Received: "
            f"targets of type {type(y.flat[0]).__name__}."
        )
    found = _classes(y, outputs)

    def scored(other: str, outputs: np.ndarray) -> _Judged:
        if found is None:
            if outputs.size != y.size:
                raise _unfit(other, outputs, y)
            errors = (outputs.reshape(len(y), -1) - y.reshape(len(y), -1)) ** 2
            return errors.mean(-1), None
        labels, width = found
        if outputs.shape[-1] != width:
            raise _unfit(other, outputs, y)
        # Scores of one class may be probabilities or logits.
        least = 0.5 if outputs.min() >= 0 and outputs.max() <= 1 else 0.0
        classes = outputs[..., 0] > least if width == 1 else outputs.argmax(-1)
        if classes.shape != labels.shape:
            raise _unfit(other, outputs, y)
        # For `argmax`, the largest score is the first that is NaN.
        classes = np.where(np.isnan(outputs).any(-1), -1, classes)
        return (classes == labels).reshape(len(labels), -1).mean(-1), classes

    return "mean squared error" if found is None else "accuracy", scored


def _classes(y: np.ndarray, outputs: np.ndarray) -> tuple[np.ndarray, int] | None:
    """Returns the class of each example and the number of scores, or None for other targets."""
    width = outputs.shape[-1]
    whole = bool(np.all(y == np.round(y))) and y.min() >= 0
    if not whole:
        return None
    if y.shape == outputs.shape and width > 1:
        return (y.argmax(-1), width) if np.all(y.sum(-1) == 1) else None
    if y.shape == (*outputs.shape[:-1], 1):
        y = y[..., 0]
    if y.shape != outputs.shape[:-1] or y.max() >= max(width, 2):
        return None
    return y.astype(int), width


def _unfit(name: str, outputs: np.ndarray, y: np.ndarray) -> ValueError:
    return ValueError(
        f"The outputs of {name!r} do not fit the targets. Received: outputs of shape "
        f"{outputs.shape}, targets of shape {y.shape}."
    )


def _interval(scores: np.ndarray, first: np.ndarray) -> tuple[float | None, float | None]:
    """Returns the 95 % interval of the difference of two means over the same examples."""
    from lottery_ticket_pruner.compression import intervals  # Needs SciPy.

    if all(np.isin(one, (0, 1)).all() for one in (scores, first)):
        return intervals.of_paired_shares(scores, first)
    order = randomness.stream("groups of test examples", 0).permutation(len(scores))
    if len(order) < FEWEST_GROUPS:
        return None, None
    groups = np.array_split((scores - first)[order], min(_GROUPS, len(scores)))
    means = np.array([group.mean() for group in groups])
    # Of differences that are all alike, a bootstrap would claim to know the mean exactly.
    vary = np.ptp(means) > _ROUNDING * np.abs(means).max()  # NaN do not.
    return intervals.of_mean(means) if vary else (None, None)


def _has_no_interval(row: Mapping[str, Any]) -> bool:
    return row["low"] is None and math.isfinite(row["difference"])


def _seconds(subjects: Sequence[Subject]) -> tuple[dict[int, list[float]], list[str]]:
    """Returns the seconds of calls by the number of the subject, and why some have none."""
    calls, notes = {}, []
    for number, one in enumerate(subjects):
        try:
            calls[str(number)] = one.prepare()
        except Exception as error:  # Layers raise errors of all types.
            notes.append(f"{one.name} is not timed: {error}")
    found = turns.seconds_per_call(calls, rounds=_ROUNDS, seconds=_SECONDS, warm=1)
    return {int(number): seconds for number, seconds in found.items()}, notes


def _predictor(name: str, model: keras.Model) -> Callable[[Arrays], np.ndarray]:
    def predict(x: Arrays) -> np.ndarray:
        with _named(name):
            outputs = model.predict(x, batch_size=256, verbose=0)
        return one_array(name, outputs)

    return predict


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Names the model in an error about inputs that do not fit."""
    try:
        yield
    except Exception as error:  # Layers raise errors of all types.
        raise ValueError(
            f"{name!r} does not take the inputs of the data. {line_of(error)}"
        ) from error


def predict_in_batches(
    name: str, function: Callable[[Any], Any], x: Arrays, size: int = 256
) -> np.ndarray:
    """Returns the outputs of a function for inputs, which it receives in batches.

    Raises:
        ValueError: If the function does not take them, or has several outputs.
    """
    count = len(keras.tree.flatten(x)[0])
    parts = []
    for start in range(0, count, size):
        batch = map_arrays(functools.partial(_rows, start, start + size), x)
        with _named(name):
            outputs = function(batch)
        parts.append(one_array(name, outputs))
    return np.concatenate(parts)


def _rows(start: int, end: int, array: np.ndarray) -> np.ndarray:
    return array[start:end]


def one_array(name: str, outputs: Any) -> np.ndarray:
    """Returns outputs as an array.

    Raises:
        ValueError: If there are several.
    """
    if isinstance(outputs, dict | list | tuple) and len(outputs) == 1:
        outputs = keras.tree.flatten(outputs)[0]
    if isinstance(outputs, dict | list | tuple):
        raise ValueError(f"{name!r} has {len(outputs)} outputs; models with one are compared.")
    array = np.asarray(outputs, "float64")
    return array[:, None] if array.ndim == 1 else array


def _cells(row: Mapping[str, Any], is_first: bool) -> tuple[str, ...]:
    def shown(form: str, *values: float | None) -> str:
        return "" if any(value is None for value in values) else form.format(*values)

    share = row["agreement"] is not None  # Then the metric is an accuracy.
    return (
        row["model"],
        f"{row['value']:.2%}" if share else f"{row['value']:.4g}",
        "" if is_first else _signed(row["difference"], share),
        "" if row["low"] is None else " to ".join(_signed(row[k], share) for k in ("low", "high")),
        "" if is_first else shown("{:.2%}", row["agreement"]),
        f"{row['sparsity']:.2%}",
        f"{row['weights']:,}",
        shown("{:,}", row["nbytes"]),
        shown("{:.3g} ({:.3g} to {:.3g})", row["milliseconds"], row["fast"], row["slow"]),
    )


def _signed(value: float, share: bool) -> str:
    return signed(100 * value, ".2f") if share else signed(value, ".3g")
