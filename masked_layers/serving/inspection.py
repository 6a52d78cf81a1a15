"""What lies on disk: the weights of a `.keras` file or of a SavedModel, sparse or not."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import keras
import numpy as np

from masked_layers.serving.report import FILE, StorageReport, StorageRow, file_sizes
from masked_layers.serving.tracing import effective_values


def inspect(path: str | os.PathLike[str]) -> StorageReport:
    """Reports sparsity, encoding and bytes of every weight of a saved model.

    Args:
        path: A `.keras` file (masks count: what they prune is zero), or a SavedModel folder. In a
            folder that `export_sparse_saved_model` did not write every tensor of the checkpoint is
            listed; `Model.export` writes each weight twice.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it is neither of the two, or damaged.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"There is no '{path}'.")
    files = file_sizes(path)
    if path.suffix == ".keras" and path.is_file():
        try:
            arrays = effective_values(keras.models.load_model(path, compile=False))
        except KeyError as error:
            raise ValueError(f"'{path}' is no file that Keras wrote: {error}.") from error
    elif FILE in files and "saved_model.pb" in files:
        return dataclasses.replace(StorageReport.from_json((path / FILE).read_bytes()), files=files)
    elif "saved_model.pb" in files:
        arrays = _checkpoint(path)
    else:
        raise ValueError(
            f"'{path}' is neither a '.keras' file nor a SavedModel folder (one that holds a "
            "'saved_model.pb')."
        )
    rows = [
        StorageRow(
            name, array.shape, array.dtype.name, "dense", int(np.count_nonzero(array)), array.nbytes
        )
        for name, array in arrays.items()
    ]
    return StorageReport(tuple(rows), sum(row.nbytes for row in rows), files)


def _checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Returns the numeric tensors in the checkpoint of a SavedModel."""
    import tensorflow as tf

    if not (path / "variables" / "variables.index").is_file():
        return {}
    try:
        reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
    except tf.errors.OpError as error:
        raise ValueError(f"The variables in '{path}' are damaged: {error}.") from error
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    return {
        name.removesuffix(suffix): np.asarray(reader.get_tensor(name))
        for name, dtype in reader.get_variable_to_dtype_map().items()
        if dtype not in (tf.string, tf.resource, tf.variant)
    }
