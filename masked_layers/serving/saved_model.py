"""Exports sparse SavedModels: small on disk, decoded once at loading, then as fast as dense ones.

The folder contains the weights as one file in the format of `encoding.py`, an asset of the
SavedModel. The initializer, which every TensorFlow runtime runs at loading, decodes it into
variables that are not part of the checkpoint. The serving function is that of the dense model. Only
TensorFlow's own ops are used.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import gc
import logging
import numbers
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers import checksums, files, workers
from masked_layers.serving import compaction, encoding, graph
from masked_layers.serving.codes import Coded
from masked_layers.serving.folder import CONTENTS, check_replaceable
from masked_layers.serving.report import FILE, SUMS, StorageReport, StorageRow
from masked_layers.serving.samples import samples_of
from masked_layers.serving.stored_values import CHOICES, Stored, fewest_bits, stored, too_large
from masked_layers.serving.tracing import EffectiveValues, trace, values_of
from masked_layers.serving.verification import error_with, expected, verify

logger = logging.getLogger(__name__)

_PATTERN = re.compile(r"[][*?\\]")
"""Characters that make TensorFlow interpret the path of a checkpoint as a pattern."""

_PACKED_BELOW = 1 << 14
"""Number of elements below which a dense array is packed. In the checkpoint, a bias would take more
bytes for its index entry than for its values. A larger array loads faster from the checkpoint."""

_JOINED_BELOW = 1 << 11
"""Total number of elements of dense arrays, or of their codes, below which they are encoded as
sparse ones."""

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
    tolerance: float | None = None,
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
            round the values of sparse weights to 2 bytes on disk. Codes of one byte, which are
            entropy coded, stand for all floating-point weights with two or more axes, sparse or
            not: `"int8"` for multiples of a scale per output channel (last axis), to which values
            are rounded, and `"codebook-2"` to `"codebook-8"` for one of 4 to 256 values per weight,
            found by k-means. `"codebook"` chooses the bits of each weight to meet `tolerance`, and
            is `"codebook-5"` without one. Zeros stay exact zeros. With int8, kept weights smaller
            than half a step become zeros, too. The model still computes in its own dtype. The
            report contains the resulting error of the outputs.
        tolerance: Largest difference of an output on the sample inputs, relative to the largest
            output. If it is exceeded, the export fails. Default: no limit for rounded values.
        include: Weights that may be stored sparsely or as codes: a regular expression that is
            searched for in their paths, a list of regular expressions (at least one must match), or
            a function of a path. Default: all weights. A weight that would not become smaller stays
            dense.
        level: Compression level of zlib, 0 to 9.
        input_signature: Same as in `keras.Model.export`.
        sample_inputs: Inputs for comparing outputs, with at least one row, in the forms that
            `predict` accepts: an array, or a list, tuple or dict of arrays. For a model whose
            `call` takes several arguments, a list of these. Default: seeded random numbers with
            the shapes of the signature, zeros and ones for integers.

    Returns:
        The report, which is also stored in the folder as `assets.extra/sparsity.json`, next to the
        checksums of all files (`assets.extra/SHA256SUMS`).

    Raises:
        FileExistsError: If `path` is not a SavedModel folder, or contains other files.
        ImportError: If TensorFlow is missing.
        NotImplementedError: If Keras cannot trace a model into TensorFlow on this backend, or a
            call of the model changes a variable that the model does not track.
        OverflowError: If a value is outside the range of `values`.
        RuntimeError: If the outputs of the written folder differ from those of the model, by more
            than `tolerance` if values are rounded.
        TypeError: If `model` is not a Keras model, or `include` has another type than listed above.
        ValueError: If an argument is invalid or the model is not built, or inside the scope of a
            `tf.distribute` strategy. If a normalization leaves channels out: `shrink` removes them.
            If layers need sizes that the signature leaves out.

    Warns:
        UserWarning: If outputs on the sample inputs are not finite, so comparing them is of little
            value, or if TensorFlow would interpret the path as a pattern and may not load from it.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    if values not in CHOICES:
        raise ValueError(
            "`values` must be 'float32' (exact), 'float16', 'bfloat16', 'int8', 'codebook' or "
            f"'codebook-2' to 'codebook-8'. Received: {values!r}"
        )
    if tolerance is not None and not (_is_number(tolerance) and tolerance > 0):
        raise ValueError(f"`tolerance` must be a number above 0. Received: {tolerance!r}")
    workers.check_outside_scope("export_sparse_saved_model")
    path = Path(path).resolve()  # Behind a link, the folder is replaced and not the link.
    check_replaceable(path)
    given = EffectiveValues(model, _canonical)
    allowed = _included(include, given)
    traced = trace(model, given, input_signature)
    import tensorflow as tf  # `trace` explains an error if it is missing.

    arguments = samples_of(model, traced.signature, sample_inputs)
    samples = keras.tree.map_structure(tf.convert_to_tensor, arguments)
    exact = {
        name: replace(_exact(values_of(x), name in allowed), trainable=x.trainable)
        for name, x in traced.variables.items()
    }
    measure = functools.partial(error_with, traced, samples)
    if values == "codebook" and tolerance is not None:
        weights = fewest_bits(exact, allowed, measure, tolerance)
    else:
        weights = {
            name: stored(name, weight, values) if name in allowed else weight
            for name, weight in exact.items()
        }
    pack = _packed(weights, level)
    contents = ((name, weight.values) for name, weight in weights.items())
    wanted = expected(model, traced, contents, samples, given=sample_inputs is not None)
    keep_saver = bool(traced.resources) or any(w.content is None for w in weights.values())
    rows = _rows(weights, pack)
    dense_nbytes = sum(weight.array.nbytes for weight in weights.values())
    with files.scratch_folder(path, CONTENTS) as scratch, _literal(scratch) as folder:
        graph.write(folder, traced, pack)
        compaction.compact(folder, traced.prefix, pack, keep_saver=keep_saver)
        del traced, exact, weights, contents, pack, measure
        gc.collect()  # A large model and the loaded folder may not fit into memory together.
        error = verify(folder, wanted, samples, exact=values == "float32")
        if tolerance is not None and not (error is not None and error <= tolerance):
            raise RuntimeError(too_large(error, tolerance, values))
        report = StorageReport(
            rows=rows,
            dense_nbytes=dense_nbytes,
            files=files.file_sizes(folder),
            values=values,
            output_error=error,
        )
        report = _describe(folder, report)
        check_replaceable(path)  # Again, since writing takes time.
        if folder != scratch:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
        files.replace_folder(scratch, path)
    logger.info("Wrote '%s': %d bytes, sparsity %.4f.", path, report.disk_nbytes, report.sparsity)
    return report


def stored_nbytes(arrays: Mapping[str, np.ndarray]) -> int:
    """Returns the bytes that `export_sparse_saved_model` stores for weights with exact values.

    This is the folder without the graph and the report. No TensorFlow is needed.

    Args:
        arrays: Effective values by path.
    """
    weights = {name: _exact(_canonical(name, array), True) for name, array in arrays.items()}
    dense = sum(weight.array.nbytes for weight in weights.values() if weight.content is None)
    return len(_packed(weights, 6)) + dense


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


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


def _exact(array: np.ndarray, allowed: bool) -> Stored:
    if array.dtype.name not in _BITCAST:
        return Stored(array, "dense", None)
    if allowed and encoding.choose(array) == "sparse":
        return Stored(array, "sparse", array)
    if array.size < _PACKED_BELOW:
        return Stored(array, "packed", array)
    return Stored(array, "dense", None)


def _packed(weights: Mapping[str, Stored], level: int) -> bytes:
    contents = {name: w.content for name, w in weights.items() if w.content is not None}
    # Decoding one more block would take more bytes in the graph than the gaps of so few values.
    sizes: dict[tuple[bool, str], int] = collections.Counter()
    for name, content in contents.items():
        sizes[isinstance(content, Coded), weights[name].encoding] += weights[name].array.size
    encodings: dict[str, encoding.Encoding] = {}
    for name, content in contents.items():
        kind, coded = weights[name].encoding, isinstance(content, Coded)
        few = [kind for kind in ("sparse", "packed") if sizes[coded, kind] < _JOINED_BELOW]
        if kind in few:
            # A dense block takes fewer operations.
            kind = "packed" if len(few) == 2 else "sparse"
        encodings[name] = "sparse" if kind == "sparse" else "dense"
    return encoding.encode(contents, encodings=encodings, level=level)


def _rows(weights: Mapping[str, Stored], pack: bytes) -> tuple[StorageRow, ...]:
    nbytes = {
        entry.name: count
        for block in encoding.blocks(pack)
        for entry, count in zip(block.members, block.nbytes, strict=True)
    }
    rows = []
    for name, weight in weights.items():
        array = weight.values
        alive = array.size - int(np.count_nonzero(array == np.zeros((), array.dtype)))
        size = nbytes.get(name, array.nbytes)
        rows.append(StorageRow(name, array.shape, weight.dtype, weight.encoding, alive, size))
    return tuple(rows)


# --- Files ----------------------------------------------------------------------------------------


def _describe(folder: Path, report: StorageReport) -> StorageReport:
    """Writes the report and the checksums, and returns the report with the sizes of both."""
    names = [*report.files, FILE]
    sizes = {**report.files, SUMS: checksums.length(names)}
    report = replace(report, files=sizes).with_own_size()
    (folder / FILE).parent.mkdir()
    (folder / FILE).write_bytes(report.to_json())
    sums = {name: checksums.checksum(folder / name) for name in names}
    (folder / SUMS).write_bytes(checksums.lines(sums))
    return report


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
    with files.temporary_folder() as elsewhere:
        yield elsewhere
