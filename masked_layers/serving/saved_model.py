"""Exports sparse SavedModels: small on disk, decoded once at loading, then as fast as dense ones.

The folder contains the weights as one file in the format of `encoding.py`, an asset of the
SavedModel. The initializer, which every TensorFlow runtime runs at loading, decodes it into
variables that are not part of the checkpoint. The serving function is that of the dense model. Only
TensorFlow's own ops are used.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers import files
from masked_layers.serving import compaction, encoding, graph
from masked_layers.serving.folder import CONTENTS, check_replaceable
from masked_layers.serving.report import FILE, StorageReport, StorageRow, file_sizes
from masked_layers.serving.samples import samples_of
from masked_layers.serving.tracing import effective_values, trace
from masked_layers.serving.verification import verify

logger = logging.getLogger(__name__)

_PATTERN = re.compile(r"[][*?\\]")
"""Characters that make TensorFlow interpret the path of a checkpoint as a pattern."""

_PACKED_BELOW = 1 << 14
"""Number of elements below which a dense array is packed. In the checkpoint, a bias would take more
bytes for its index entry than for its values. A larger array loads faster from the checkpoint."""

_JOINED_BELOW = 1 << 11
"""Total number of elements of packed dense arrays below which they are encoded as sparse ones."""

_BITCAST = frozenset(
    (
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bfloat16"),
    )
)
"""Dtypes that TensorFlow's `bitcast` can create from bytes; others stay in the checkpoint."""


def export_sparse_saved_model(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    values: str = "float32",
    include: str | Iterable[str] | Callable[[str], bool] | None = None,
    level: int = 6,
    input_signature: Any = None,
    sample_inputs: Any = None,
) -> StorageReport:
    """Exports a model as a SavedModel folder whose size is about that of its non-zero weights.

    The size of the graph is added to this. In a model with a few thousand weights, the graph is
    most of the folder.

    Any TensorFlow runtime can load the folder, without Keras, this library or custom ops. Its
    signatures are those of `model.export(path)`. The new folder is loaded and compared with the
    model before it replaces an existing one. If anything fails, the existing folder is unchanged.

    Args:
        model: A built model, either masked, or plain with zeros in its kernels.
        path: Folder to write. An existing SavedModel or empty folder is replaced.
        values: `"float32"` keeps every value exactly, for any dtype. `"float16"` and `"bfloat16"`
            round the values of sparse weights to 2 bytes on disk; the model still computes in its
            own dtype. The report contains the resulting error of the outputs.
        include: Weights that may be stored sparsely: a regular expression that is searched for in
            their paths, a list of regular expressions (at least one must match), or a function of a
            path. Default: all weights. A weight that would not become smaller stays dense.
        level: Compression level of zlib, 0 to 9.
        input_signature: Same as in `keras.Model.export`.
        sample_inputs: Inputs for comparing outputs, with at least one row, in the forms that
            `predict` accepts: an array, or a list, tuple or dict of arrays. For a model whose
            `call` takes several arguments, a list of these. Default: seeded random numbers with
            the shapes of the signature, zeros and ones for integers.

    Returns:
        The report, which is also stored in the folder as `assets.extra/sparsity.json`.

    Raises:
        FileExistsError: If `path` is not a SavedModel folder, or contains other files.
        ImportError: If TensorFlow is missing.
        NotImplementedError: If Keras cannot trace a model into TensorFlow on this backend, or a
            call of the model changes a variable that the model does not track.
        OverflowError: If a value is outside the range of `values`.
        RuntimeError: If the outputs of the written folder differ from those of the model.
        TypeError: If `model` is not a Keras model, or `include` has another type than listed above.
        ValueError: If an argument is invalid or the model is not built. If a normalization leaves
            channels out: `shrink` removes them.

    Warns:
        UserWarning: If outputs on the sample inputs are not finite, so comparing them is of little
            value, or if TensorFlow would interpret the path as a pattern and may not load from it.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    if values not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f"`values` must be 'float32' (exact), 'float16' or 'bfloat16'. Received: {values!r}"
        )
    path = Path(path).resolve()  # Behind a link, the folder is replaced and not the link.
    check_replaceable(path)
    arrays = effective_values(model)
    allowed = _included(include, arrays)
    # The salt covers the arguments that change the decoded values.
    traced = trace(model, arrays, input_signature, salt=f"{values}{sorted(allowed)}")
    import tensorflow as tf  # `trace` explains an error if it is missing.

    arrays = {name: _canonical(name, arrays[name]) for name in traced.variables}
    encodings = {name: _encoding(array, name in allowed) for name, array in arrays.items()}
    stored = {
        name: _rounded(name, array, values if encodings[name] == "sparse" else "float32")
        for name, array in arrays.items()
        if encodings[name] != "dense"
    }
    # Decoding one more block would take more bytes in the graph than the gaps of so few values.
    odds = sum(arrays[name].size for name in arrays if encodings[name] == "packed")
    names: dict[str, encoding.Encoding]
    names = {"sparse": "sparse", "packed": "sparse" if odds < _JOINED_BELOW else "dense"}
    pack = encoding.encode(
        stored, encodings={name: names[encodings[name]] for name in stored}, level=level
    )
    expected = {
        name: stored[name].astype(array.dtype) if name in stored else array
        for name, array in arrays.items()
    }
    arguments = samples_of(model, traced.signature, sample_inputs)
    samples = keras.tree.map_structure(tf.convert_to_tensor, arguments)
    given = sample_inputs is not None
    with files.scratch_folder(path, CONTENTS) as scratch, _literal(scratch) as folder:
        os.chmod(folder, 0o777 & ~_umask())
        graph.write(folder, traced, pack)
        keep_saver = "dense" in encodings.values() or bool(traced.resources)
        compaction.compact(folder / "saved_model.pb", traced.prefix, keep_saver=keep_saver)
        # A hash of the graph before compaction, which loaders do not require.
        (folder / "fingerprint.pb").unlink(missing_ok=True)
        exact = values == "float32"
        error = verify(folder, model, traced, expected, samples, given=given, exact=exact)
        report = StorageReport(
            rows=_rows(arrays, stored, pack, encodings),
            dense_nbytes=sum(array.nbytes for array in arrays.values()),
            files=file_sizes(folder),
            values=values,
            output_error=error,
        ).with_own_size()
        (folder / FILE).parent.mkdir()
        (folder / FILE).write_bytes(report.to_json())
        check_replaceable(path)  # Again, since writing takes time.
        if folder != scratch:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
        files.replace_folder(scratch, path)
    logger.info("Wrote '%s': %d bytes, sparsity %.4f.", path, report.disk_nbytes, report.sparsity)
    return report


def _included(include: Any, paths: Iterable[str]) -> set[str]:
    """Returns the paths that `include` selects, as described in `export_sparse_saved_model`.

    Raises:
        TypeError: If `include` has another type than allowed.
        ValueError: If a pattern is not a regular expression, or no pattern matches.
    """
    if include is None:
        return set(paths)
    if callable(include):
        return {path for path in paths if include(path)}
    single = isinstance(include, str) or not isinstance(include, Iterable)
    patterns = [include] if single else list(include)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            "`include` must be a regular expression, a list of them or a function of a path. "
            f"Received: {include!r}"
        )
    paths = list(paths)
    try:
        found = {path for path in paths if any(re.search(pattern, path) for pattern in patterns)}
    except re.error as error:
        raise ValueError(
            f"`include` contains {error.pattern!r}, which is not a regular expression: {error}."
        ) from error
    if not found:
        raise ValueError(f"include={patterns} matches no weight. The weights: {paths}")
    return found


# --- Weights --------------------------------------------------------------------------------------


def _canonical(name: str, array: np.ndarray) -> np.ndarray:
    return encoding.canonical(name, array) if array.dtype.name in _BITCAST else array


def _encoding(array: np.ndarray, allowed: bool) -> str:
    if array.dtype.name not in _BITCAST:
        return "dense"
    if allowed and encoding.choose(array) == "sparse":
        return "sparse"
    return "packed" if array.size < _PACKED_BELOW else "dense"


def _rounded(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32" or array.dtype.kind in "iu" or array.dtype.itemsize <= 2:
        return array
    import ml_dtypes

    with np.errstate(over="ignore"):
        rounded = array.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    if (np.isfinite(array) & ~np.isfinite(rounded)).any():
        raise OverflowError(
            f"'{name}' has values up to {np.nanmax(np.abs(array))}, beyond the range of {dtype}. "
            "Use values='bfloat16' or 'float32', or leave the weight out with `include`."
        )
    return encoding.canonical(name, rounded)  # Tiny values may have been rounded to -0.0.


def _rows(
    arrays: Mapping[str, np.ndarray],
    stored: Mapping[str, np.ndarray],
    pack: bytes,
    encodings: Mapping[str, str],
) -> tuple[StorageRow, ...]:
    nbytes = {
        entry.name: count
        for block in encoding.blocks(pack)
        for entry, count in zip(block.entries, block.nbytes, strict=True)
    }
    rows = []
    for name, array in arrays.items():
        array = stored.get(name, array)
        alive = array.size - int(np.count_nonzero(array == np.zeros((), array.dtype)))
        rows.append(
            StorageRow(
                name,
                array.shape,
                array.dtype.name,
                encodings[name],
                alive,
                nbytes.get(name, array.nbytes),
            )
        )
    return tuple(rows)


# --- Files ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _literal(folder: Path) -> Iterator[Path]:
    """Yields the folder, or an empty temporary one if TensorFlow would treat its path as a pattern.

    Warns:
        UserWarning: If it yields a temporary folder.
    """
    if not _PATTERN.search(os.path.splitdrive(folder)[1].replace(os.sep, "/")):
        yield folder
        return
    warnings.warn(
        f"TensorFlow interprets '{folder.parent}' as a pattern, because it contains one of "
        "[ ] * ? \\, and may not find the weights there: move the SavedModel elsewhere to load it.",
        stacklevel=4,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        yield Path(elsewhere)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
