"""Sparse SavedModel: small on disk, decoded once when it is loaded, dense speed after that.

The folder holds the weights as one file in the format of `encoding.py`, an asset of the SavedModel.
The initializer that every TensorFlow runtime runs on loading decodes it into variables that are in
no checkpoint; the serving function then is the dense model's. Only TensorFlow's own ops are used.
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
"""Characters that make TensorFlow take the path of a checkpoint for a pattern."""

_PACKED_BELOW = 1 << 14
"""Elements below which a dense array joins the pack: as a variable of its own in the checkpoint, a
bias costs more bytes in indices than in values. A larger one loads faster from the checkpoint."""

_JOINED_BELOW = 1 << 11
"""Elements of all packed dense arrays together below which they join the sparse ones."""

_BITCAST = frozenset(
    (
        *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "bfloat16"),
    )
)
"""Dtypes that TensorFlow's `bitcast` makes from bytes; others stay in the checkpoint."""


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
    """Writes a SavedModel folder whose weights take about the bytes of the non-zero ones.

    The graph comes on top, and is most of the folder of a model with a few thousand weights.

    Any TensorFlow runtime loads it, with neither Keras nor this library nor a custom op; its
    signatures are those of `model.export(path)`. The folder is loaded back and compared with the
    model before it takes its place; if anything fails, what was at `path` is still there.

    Args:
        model: A built model, masked or plain (a plain one with zeros in its kernels).
        path: Folder to write. An empty folder or a SavedModel there is replaced.
        values: `"float32"` keeps every value exactly (whatever its dtype). `"float16"` and
            `"bfloat16"` round the values of sparse weights to 2 bytes on disk; the model still
            computes in its own dtype. The report gives the error of the outputs.
        include: Which weights may be encoded sparsely: a regular expression searched in their
            paths, a list of those (one at least must match), or a function of the path. Default:
            all; a weight for which it does not pay stays dense by itself.
        level: Compression level, 0 to 9.
        input_signature: As in `keras.Model.export`.
        sample_inputs: What to call the model with when outputs are compared, one row at least, as
            `predict` takes it: an array, or a list, a tuple or a dict by name of them; for a model
            whose `call` takes several arguments, the list of these. Default: seeded random numbers
            of the shapes of the signature, zeros and ones for integers.

    Returns:
        The report that also lies in the folder as `assets.extra/sparsity.json`.

    Raises:
        FileExistsError: If something else than a SavedModel is at `path`, or beside it there.
        ImportError: If TensorFlow is missing.
        NotImplementedError: If Keras cannot trace a model into TensorFlow under this backend, or a
            call of the model changes a variable that is not its own.
        OverflowError: If a value does not fit `values`.
        RuntimeError: If the folder that was written does not compute what the model computes.
        TypeError: If `model` is not a Keras model, or `include` none of the kinds above.
        ValueError: If an argument is invalid or the model is not built.

    Warns:
        UserWarning: If outputs on the sample inputs are not finite, so that comparing them says
            little; or if TensorFlow takes the path for a pattern, and may not load from there.
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
    # What else decides on the bits that are decoded.
    traced = trace(model, arrays, input_signature, salt=f"{values}{sorted(allowed)}")
    arrays = {name: _canonical(name, arrays[name]) for name in traced.variables}
    encodings = {name: _encoding(array, name in allowed) for name, array in arrays.items()}
    stored = {
        name: _rounded(name, array, values if encodings[name] == "sparse" else "float32")
        for name, array in arrays.items()
        if encodings[name] != "dense"
    }
    # Decoding one more block takes more bytes of graph than the gaps of so few values.
    odds = sum(arrays[name].size for name in arrays if encodings[name] == "packed")
    names = {"sparse": "sparse", "packed": "sparse" if odds < _JOINED_BELOW else "dense"}
    pack = encoding.encode(
        stored, encodings={name: names[encodings[name]] for name in stored}, level=level
    )
    expected = {
        name: stored[name].astype(array.dtype) if name in stored else array
        for name, array in arrays.items()
    }
    samples = samples_of(model, traced.signature, sample_inputs)

    given = sample_inputs is not None
    with files.scratch_folder(path, CONTENTS) as scratch, _literal(scratch) as folder:
        os.chmod(folder, 0o777 & ~_umask())
        graph.write(folder, traced, pack)
        keep_saver = "dense" in encodings.values() or bool(traced.resources)
        compaction.compact(folder / "saved_model.pb", traced.prefix, keep_saver=keep_saver)
        # A hash of the graph as it was before compaction; loaders take its absence in their stride.
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
        check_replaceable(path)  # Writing took a while.
        if folder != scratch:
            shutil.copytree(folder, scratch, dirs_exist_ok=True)
        files.replace_folder(scratch, path)
    logger.info("Wrote '%s': %d bytes, sparsity %.4f.", path, report.disk_nbytes, report.sparsity)
    return report


def _included(include: Any, paths: Iterable[str]) -> set[str]:
    """Returns the paths that `include` names; see `export_sparse_saved_model`.

    Raises:
        TypeError: If `include` is none of the kinds that are allowed.
        ValueError: If a pattern is not a regular expression, or none matches.
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
            f"`include` holds {error.pattern!r}, which is not a regular expression: {error}."
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
            f"'{name}' holds values up to {np.nanmax(np.abs(array))}, beyond the range of {dtype}. "
            "Use values='bfloat16' or 'float32', or leave the weight out with `include`."
        )
    return encoding.canonical(name, rounded)  # What is too small has become a zero with a sign.


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
    """The folder, or where TensorFlow would take its path for a pattern, another one that is empty.

    Warns:
        UserWarning: If it is another one.
    """
    if not _PATTERN.search(os.path.splitdrive(folder)[1].replace(os.sep, "/")):
        yield folder
        return
    warnings.warn(
        f"TensorFlow takes '{folder.parent}' for a pattern, as it has one of [ ] * ? \\ in it, and "
        "may find no weights there: move the SavedModel elsewhere to load it.",
        stacklevel=4,
    )
    with tempfile.TemporaryDirectory() as elsewhere:
        yield Path(elsewhere)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
