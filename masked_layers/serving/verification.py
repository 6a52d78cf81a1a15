"""Checks that an exported folder computes what its model computes."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers.inference import inferred
from masked_layers.paths import walk
from masked_layers.serving.tracing import Traced, bytes_of, values_of


@dataclass(frozen=True, eq=False)
class Expected:
    """The expected content and outputs of an exported folder.

    It holds no weights, so that those of a large model can be freed before the folder is loaded.

    Attributes:
        weights: Digests of the weights by path, in the order of the variables in the folder.
        truth: Outputs of the model.
        dense: Outputs of the function that was exported.
        dtypes: Names of the dtypes whose rounding explains differences of outputs.
    """

    weights: Mapping[str, bytes]
    truth: Sequence[np.ndarray]
    dense: Sequence[np.ndarray]
    dtypes: frozenset[str]


def expected(
    model: keras.Model,
    traced: Traced,
    weights: Iterable[tuple[str, np.ndarray]],
    samples: list[Any],
    *,
    given: bool,
) -> Expected:
    """Computes what an exported folder should contain and compute.

    Args:
        model: Model that is exported.
        traced: Function that is exported.
        weights: Paths and values of the weights that the folder should contain.
        samples: Positional arguments for the calls.
        given: Whether the user chose the samples.

    Raises:
        ValueError: If the model cannot be called on the samples.
    """
    digests = {name: _digest(value) for name, value in weights}
    with keras.StatelessScope():
        inputs = samples
        if keras.backend.backend() != "tensorflow":
            inputs = keras.tree.map_structure(lambda sample: sample.numpy(), samples)
        try:
            outputs = keras.tree.flatten(inferred(model, *inputs))
            truth = [keras.ops.convert_to_numpy(output) for output in outputs]
        except Exception as error:  # Layers may raise any error.
            if given:
                raise ValueError(
                    f"The model cannot be called on the given `sample_inputs`: {error}"
                ) from error
            raise ValueError(
                f"The model cannot be called on random sample inputs for {traced.signature} with "
                f"default free dimensions. Pass `sample_inputs` that it accepts. {error}"
            ) from error
    dense = _executed(traced, samples)
    computed = {layer.compute_dtype for _, layer in walk(model)}
    dtypes = frozenset({*computed, *(x.dtype.name for x in truth)})
    return Expected(digests, truth, dense, dtypes)


def _executed(traced: Traced, samples: Sequence[Any]) -> list[np.ndarray]:
    """Returns the outputs of a traced function.

    Raises:
        NotImplementedError: If TensorFlow does not know an operation that JAX has written.
    """
    import tensorflow as tf

    try:
        return [x.numpy() for x in keras.tree.flatten(traced.function(*samples))]
    except tf.errors.InvalidArgumentError as error:
        if "failed to deserialize portable artifact" not in str(error):
            raise
        found = re.search(r"in bytecode version.*?(StableHLO_v[\d.]+)", str(error))
        written = f" ({found[1]})" if found else ""
        raise NotImplementedError(
            f"TensorFlow {tf.__version__} cannot execute an operation of the model that this "
            f"version of JAX writes{written}. Install a newer TensorFlow or an older JAX, or save "
            "the model and export it on the TensorFlow backend."
        ) from error


def _digest(array: np.ndarray) -> bytes:
    about = f"{array.dtype.name}{array.shape}".encode()
    return hashlib.sha256(about + hashlib.sha256(bytes_of(array)).digest()).digest()


def verify(folder: Path, expected: Expected, samples: list[Any], *, exact: bool) -> float | None:
    """Compares an exported folder with its model.

    Args:
        folder: Folder of the SavedModel.
        expected: What it should contain and compute.
        samples: The positional arguments with which this was computed.
        exact: Whether all values were stored exactly.

    Returns:
        The largest absolute difference between the outputs of the folder and the dense function,
        relative to the largest absolute output, or None if no output is finite.

    Raises:
        RuntimeError: If a weight differs in any bit, or outputs differ by more than rounding.
    """
    import ml_dtypes
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    for (name, digest), variable in zip(expected.weights.items(), loaded.variables, strict=True):
        if _digest(values_of(variable)) != digest:
            raise RuntimeError(
                f"Weight '{name}' loaded from the SavedModel differs from the value that was "
                "written. Nothing was changed at the target path; please report this."
            )
    truth, dense = expected.truth, expected.dense
    sparse = [x.numpy() for x in keras.tree.flatten(loaded.serve(*samples))]

    # Graphs fuse ops, so their rounding differs from that of a model called op by op. This
    # tolerance distinguishes wrong weights from rounding; the weights themselves are compared bit
    # for bit.
    dtypes = expected.dtypes
    floats = [tf.as_dtype(name) for name in dtypes if tf.as_dtype(name).is_floating]
    tolerance = max((float(ml_dtypes.finfo(d.as_numpy_dtype).eps) for d in floats), default=0.0)
    for kind, got, wanted in (("Traced", dense, truth), ("Exported", sparse, dense)):
        difference = max(map(relative_difference, got, wanted), default=0.0)
        if difference > tolerance**0.5 and (exact or kind == "Traced"):
            raise RuntimeError(
                f"{kind} outputs differ from the model's by {difference:.2g} of the largest one, "
                f"which the rounding of {sorted(dtypes)} does not explain. Nothing was changed at "
                "the target path. A model with random outputs cannot be compared."
            )
    finite, total = _finite(truth)
    if finite < total:
        warnings.warn(
            f"{total - finite} of {total} outputs of the model are NaN or infinite on the sample "
            "inputs, so comparing them with the outputs of the folder is of little value. Look "
            "for such values among the weights, or pass other `sample_inputs`.",
            stacklevel=3,
        )
    return difference if finite or not total else None


def _finite(outputs: Sequence[np.ndarray]) -> tuple[int, int]:
    """Returns how many numbers among the outputs are finite, and how many there are."""
    numbers = [x for x in outputs if x.dtype.kind not in "OSUbiu"]
    return sum(int(np.isfinite(x).sum()) for x in numbers), sum(x.size for x in numbers)


def error_with(
    traced: Traced, samples: Sequence[Any], values: Mapping[str, np.ndarray]
) -> float | None:
    """Returns the error that other values of some weights cause, as `verify` measures it.

    Args:
        traced: Function whose variables have the exact values, which they get back, as do states
            that it changes.
        samples: Positional arguments for the calls.
        values: Other values, by path.
    """
    exact = {name: variable.numpy() for name, variable in traced.variables.items()}

    def outputs(given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        try:
            for name, value in given.items():
                traced.variables[name].assign(value)
            return _executed(traced, samples)
        finally:
            for name, value in exact.items():
                traced.variables[name].assign(value)

    wanted = outputs({})
    finite, total = _finite(wanted)
    found = max(map(relative_difference, outputs(values), wanted), default=0.0)
    return found if finite or not total else None


def relative_difference(got: np.ndarray, wanted: np.ndarray) -> float:
    """Returns max abs(got - wanted) / max abs(wanted); equal NaNs and infinities differ by 0."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.size or got.tobytes() == wanted.tobytes():
        return 0.0
    if wanted.dtype.kind in "OSUb":
        return 0.0 if (got == wanted).all() else float("inf")
    got, wanted = (
        np.asarray(x, "complex128" if x.dtype.kind == "c" else "float64") for x in (got, wanted)
    )
    same = (got == wanted) | (np.isnan(got) & np.isnan(wanted))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(got - wanted))
    if not np.isfinite(difference).all():
        return float("inf")
    finite = np.abs(wanted[np.isfinite(wanted)])
    return float(difference.max() / max(finite.max(initial=0.0), np.finfo("float32").tiny))
