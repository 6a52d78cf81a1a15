"""Checks that an exported folder computes what its model computes."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers.serving.tracing import Traced


def verify(
    folder: Path,
    model: keras.Model,
    traced: Traced,
    expected: Mapping[str, np.ndarray],
    samples: list[Any],
    *,
    given: bool,
    exact: bool,
) -> float | None:
    """Returns the relative difference between the outputs of the folder and of the dense function.

    None if no output is finite. `given`: whether the samples are the caller's.

    Raises:
        RuntimeError: If a weight comes back with another bit, or outputs differ by more than
            rounding.
        ValueError: If the model cannot be called on the samples.
    """
    import ml_dtypes
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder))
    for (name, value), variable in zip(expected.items(), loaded.variables, strict=True):
        if variable.numpy().tobytes() != value.tobytes():
            raise RuntimeError(
                f"Weight '{name}' does not come back from the SavedModel as it was written. "
                "Nothing was changed at the target path; please report this."
            )

    with keras.StatelessScope():
        inputs = samples
        if keras.backend.backend() != "tensorflow":
            inputs = keras.tree.map_structure(lambda sample: sample.numpy(), samples)
        try:
            truth = [keras.ops.convert_to_numpy(x) for x in keras.tree.flatten(model(*inputs))]
        except Exception as error:  # Whatever its layers raise.
            if given:
                raise ValueError(
                    f"The model cannot be called on the `sample_inputs` given: {error}"
                ) from error
            raise ValueError(
                f"The model cannot be called on sample inputs of {traced.signature}, batch and "
                f"other free dimensions chosen. Give `sample_inputs` that it takes. {error}"
            ) from error
    dense = [x.numpy() for x in keras.tree.flatten(traced.function(*samples))]
    sparse = [x.numpy() for x in keras.tree.flatten(loaded.serve(*samples))]

    # Graphs fuse ops and so round elsewhere than the model does when it is called op by op. This
    # much tells wrong weights from rounding; it is the weights that are compared bit for bit.
    dtypes = {model.compute_dtype, *(x.dtype.name for x in truth)}
    floats = [tf.as_dtype(name) for name in dtypes if tf.as_dtype(name).is_floating]
    tolerance = max((float(ml_dtypes.finfo(d.as_numpy_dtype).eps) for d in floats), default=0.0)
    for kind, got, wanted in (("Traced", dense, truth), ("Exported", sparse, dense)):
        error = max(map(_difference, got, wanted), default=0.0)
        if error > tolerance**0.5 and (exact or kind == "Traced"):
            raise RuntimeError(
                f"{kind} outputs differ from the model's by {error:.2g} of the largest output, "
                f"more than the rounding of {sorted(dtypes)} explains. Nothing was changed at the "
                "target path. If the model computes something random, it cannot be compared."
            )
    numbers = [x for x in truth if x.dtype.kind not in "OSUbiu"]
    total = sum(x.size for x in numbers)
    finite = sum(int(np.isfinite(x).sum()) for x in numbers)
    if finite < total:
        warnings.warn(
            f"{total - finite} of {total} outputs of the model itself are NaN or infinite on the "
            "sample inputs, so that comparing the folder's outputs with them says little. Look for "
            "such values among the weights, or give other `sample_inputs`.",
            stacklevel=3,
        )
    return error if finite or not total else None


def _difference(got: np.ndarray, wanted: np.ndarray) -> float:
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
