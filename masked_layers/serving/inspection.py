"""Reads the weights of a `.keras` file or of a SavedModel, sparse or not."""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from masked_layers import checksums
from masked_layers.files import FileContentError, file_sizes
from masked_layers.keras_files import how_to_save
from masked_layers.serving import encoding
from masked_layers.serving.graph import PACK
from masked_layers.serving.report import FILE, SUMS, StorageReport, StorageRow
from masked_layers.serving.tracing import effective_values
from masked_layers.ticket_files import SUFFIX, load_saved


def inspect(path: str | os.PathLike[str]) -> StorageReport:
    """Reports the sparsity, encoding and size in bytes of every weight of a saved model.

    Args:
        path: A `.keras` file or a ticket file (`.safetensors`), whose pruned weights count as
            zeros and whose weights are listed as in memory, or a SavedModel folder. For a
            folder that was not written by `export_sparse_saved_model`, every tensor of the
            checkpoint is listed. `Model.export` on TensorFlow writes weights twice; they are listed
            once, but the sizes of files include both copies.

    Returns:
        A report that prints as a table.

    Raises:
        FileNotFoundError: If `path` does not exist.
        FileContentError: If `path` is neither of the two, is damaged, or is a model that Keras
            cannot load.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"There is no '{path}'. Expected a '.keras' file, a ticket ('{SUFFIX}') or a "
            "SavedModel folder."
        )
    files = file_sizes(path)
    if path.suffix in (".keras", SUFFIX) and path.is_file():
        arrays = effective_values(load_saved(path))
    elif "saved_model.pb" in files and (FILE in files or f"assets/{PACK}" in files):
        return _written_report(path, files)
    elif "saved_model.pb" in files:
        arrays = _without_second_copies(_checkpoint(path))
    else:
        remedy = how_to_save(path) if path.is_file() else ""
        raise FileContentError(
            f"'{path}' is neither a '.keras' file, a ticket ('{SUFFIX}') nor a SavedModel folder "
            f"(a folder with a file 'saved_model.pb'). {remedy}".rstrip()
        )
    rows = [
        StorageRow(
            name, array.shape, array.dtype.name, "dense", int(np.count_nonzero(array)), array.nbytes
        )
        for name, array in arrays.items()
    ]
    return StorageReport(tuple(rows), sum(row.nbytes for row in rows), files)


def _written_report(path: Path, files: Mapping[str, int]) -> StorageReport:
    """Returns the report stored in a sparse folder, after checking the files of the folder.

    Every byte of all files is checked. In a folder of an earlier version, which has no checksums,
    these are the bytes of the packed weights and the lengths of all other files.

    Raises:
        FileContentError: If the report or another file is missing or was changed.
    """
    if FILE not in files:
        raise FileContentError(
            f"The report '{path / FILE}' is missing: copy `assets.extra` together with the rest "
            "of the folder, or export the model again."
        )
    try:
        report = StorageReport.from_json((path / FILE).read_bytes())
    except ValueError as error:
        raise FileContentError(f"'{path / FILE}' is damaged: {error}") from error
    for name, nbytes in report.files.items():
        if name != FILE and files.get(name) != nbytes:
            found = f"has {files[name]} bytes" if name in files else "is missing"
            raise FileContentError(
                f"'{path / name}' {found}; {nbytes} bytes were written. Restore it from where the "
                "folder was copied, or export the model again."
            )
    if SUMS in report.files:
        names = [name for name in report.files if name != SUMS]
        wrong = checksums.first_wrong(path, checksums.read(path / SUMS), names)
        if wrong is not None:
            raise FileContentError(
                f"'{wrong}' does not have the checksum in '{SUMS}', so one of the two is damaged. "
                "Restore both from where the folder was copied, or export the model again."
            )
    elif f"assets/{PACK}" in files:
        file = path / "assets" / PACK
        try:
            encoding.blocks(file.read_bytes())
        except ValueError as error:
            raise FileContentError(f"'{file}' is damaged: {error}") from error
    return dataclasses.replace(report, files=files)


def _checkpoint(path: Path) -> dict[str, np.ndarray]:
    """Returns the numeric tensors in the checkpoint of a SavedModel."""
    import tensorflow as tf

    if not (path / "variables" / "variables.index").is_file():
        return {}
    suffix = "/.ATTRIBUTES/VARIABLE_VALUE"
    try:
        reader = tf.train.load_checkpoint(str(path / "variables" / "variables"))
        return {
            name.removesuffix(suffix): np.asarray(reader.get_tensor(name))
            for name, dtype in reader.get_variable_to_dtype_map().items()
            if dtype not in (tf.string, tf.resource, tf.variant)
        }
    # TensorFlow raises many kinds of errors for missing shards, wrong checksums and bad indices.
    except Exception as error:
        raise FileContentError(f"The variables in '{path}' are damaged: {error}.") from error


def _without_second_copies(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Removes the second copies of weights in a folder written by `Model.export`.

    Keras' export archive lists variables in `variables` and in `_all_variables` and, on TensorFlow,
    writes the tensors of both lists. Equal weights within one list are different weights.
    """
    second = [name for name in arrays if name.startswith("_all_variables/")]
    kept = {name: array for name, array in arrays.items() if name not in second}
    left = collections.Counter(map(_content, kept.values()))
    for name in second:
        content = _content(arrays[name])
        if left[content]:
            left[content] -= 1
        else:
            kept[name] = arrays[name]
    return kept


def _content(array: np.ndarray) -> tuple[tuple[int, ...], str, bytes]:
    return array.shape, array.dtype.name, hashlib.sha256(array.tobytes()).digest()
