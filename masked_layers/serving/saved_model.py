"""Sparse SavedModel: small on disk, decoded once when it is loaded, dense speed after that.

The folder holds the weights as one file in the format of `encoding.py`, an asset of the SavedModel.
The initializer that every TensorFlow runtime runs on loading decodes it into variables that are in
no checkpoint; the serving function then is the dense model's. Only TensorFlow's own ops are used.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from masked_layers import files
from masked_layers.serving import encoding
from masked_layers.serving.folder import CONTENTS, check_replaceable
from masked_layers.serving.report import FILE, StorageReport, StorageRow, file_sizes
from masked_layers.serving.samples import samples_of
from masked_layers.serving.tracing import Traced, effective_values, trace
from masked_layers.serving.verification import verify

if TYPE_CHECKING:
    import tensorflow as tf

logger = logging.getLogger(__name__)

PACK = "weights.mlsp"

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
        _write(folder, traced, pack)
        keep_saver = "dense" in encodings.values() or bool(traced.resources)
        _compact(folder / "saved_model.pb", traced.prefix, keep_saver=keep_saver)
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


# --- Graph ----------------------------------------------------------------------------------------


def _write(folder: Path, traced: Traced, pack: bytes) -> None:
    """Writes the SavedModel: the serving function, the pack as an asset, what decodes it."""
    import tensorflow as tf

    packed = {entry.name for block in encoding.blocks(pack) for entry in block.entries}

    class Weights(tf.saved_model.experimental.TrackableResource):
        """Decodes the pack into the variables when the SavedModel is loaded."""

        def _create_resource(self) -> Any:
            # A resource must have a handle; the weights are variables, so nothing is behind it.
            name = f"{traced.prefix}/decoder"
            return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=[], shared_name=name)

        def _initialize(self) -> None:
            decode(root.pack.asset_path, encoding.blocks(pack), traced.variables)

    for name in packed:
        _keep_out_of_checkpoint(traced.variables[name])
    with tempfile.TemporaryDirectory() as assets:
        file = Path(assets, PACK)
        file.write_bytes(pack)
        # Whatever the functions touch hangs on the root: a `TrackableResource` tracks nothing by
        # itself, and an untracked asset would leave the path of this machine in the graph.
        root = tf.__internal__.tracking.AutoTrackable()
        root.serve = traced.function
        root.variables = list(traced.variables.values())
        root.resources = list(traced.resources)
        if packed:
            root.pack = tf.saved_model.Asset(str(file))
            root.weights = Weights()
        # Keras gives the endpoint its own name and makes it TensorFlow Serving's default.
        signatures = {"serve": traced.function, "serving_default": traced.function}
        tf.saved_model.save(root, str(folder), signatures=signatures)


def decode(
    file: Any, blocks: Sequence[encoding.Block], variables: Mapping[str, tf.Variable]
) -> None:
    """Adds the ops to a graph that decode a packed file into variables.

    One block after the other, so that memory holds one decoded block beside the variables.

    Args:
        file: String tensor, path of the packed file.
        blocks: `encoding.blocks` of its bytes.
        variables: Variables by name of the array; values are cast to their dtype.
    """
    import tensorflow as tf

    data = tf.io.read_file(file)
    for block in blocks:
        flat = _decode_block(data, block)
        # Arrays of equal shape lie side by side: few ops for many variables.
        shapes = [
            (shape, list(members))
            for shape, members in itertools.groupby(block.entries, lambda entry: entry.shape)
        ]
        sizes = [sum(entry.size for entry in members) for _, members in shapes]
        parts = tf.split(flat, sizes) if len(sizes) > 1 else [flat]
        assigned = []
        for (shape, members), part in zip(shapes, parts, strict=True):
            if len(members) == 1:
                arrays = [part if len(shape) == 1 else tf.reshape(part, shape)]
            else:
                arrays = tf.unstack(tf.reshape(part, [len(members), *shape]))
            for entry, array in zip(members, arrays, strict=True):
                variable = variables[entry.name]
                value = tf.cast(array, variable.dtype)
                assigned.append(tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value))
        if block is not blocks[-1]:
            # On this op alone: an edge from every assignment to every op of the next block would
            # take TensorFlow's graph optimizer longer than decoding does.
            with tf.control_dependencies(assigned):
                data = tf.identity(data)


def _decode_block(data: tf.Tensor, block: encoding.Block) -> tf.Tensor:
    """Returns the values of a block, zeros included, as one flat tensor."""
    import tensorflow as tf

    def stream(place: Any) -> tf.Tensor:
        offset, length = np.asarray(place).T
        index = np.int32 if (offset + length).max() < 2**31 else np.int64
        packed = tf.strings.substr(data, offset.astype(index), length.astype(index))
        return tf.io.decode_raw(tf.io.decode_compressed(packed, "ZLIB"), tf.uint8)

    sparse = block.encoding == "sparse"
    dtype = tf.as_dtype(block.dtype)
    planes = stream(block.streams[sparse:])
    if dtype.size == 1:
        values = tf.bitcast(tf.reshape(planes, [-1]), dtype)
    else:
        values = tf.bitcast(tf.transpose(planes), dtype)
    if not sparse:
        return values
    gaps = stream(block.streams[0])
    index = tf.int32 if block.size < 2**31 else tf.int64
    steps = tf.cast(gaps, index) + 1
    if block.gaps == block.values:
        positions = tf.cumsum(steps) - 1
    else:
        # A gap of g < 255 moves on by g zeros and one value, 255 by 255 zeros.
        ends = tf.cumsum(tf.minimum(steps, encoding.SKIP)) - 1
        taken = tf.where(tf.not_equal(gaps, encoding.SKIP))
        positions = tf.reshape(tf.gather(ends, taken), [-1])
    # Five times faster than `scatter_nd`, which treats every value as a slice.
    return tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=tf.constant([block.size], index),
        sparse_values=values,
        default_value=tf.zeros([], dtype),
        validate_indices=False,
    )


def _keep_out_of_checkpoint(variable: tf.Variable) -> None:
    """Makes `tf.saved_model.save` write the variable without a value.

    TensorFlow has no public way to say so. It asks the variable itself for the checkpoint, and the
    copy in the exported graph for the restore function that the v1 loader runs.
    """
    export = variable._export_to_saved_model_graph

    def export_without_value(object_map: Any, **kwargs: Any) -> Any:
        exported = export(object_map=object_map, **kwargs)
        object_map[variable]._serialize_to_tensors = dict
        return exported

    variable._serialize_to_tensors = dict
    variable._export_to_saved_model_graph = export_without_value


def _compact(file: Path, prefix: str, *, keep_saver: bool) -> None:
    """Removes from a SavedModel's graph what no loader needs; about half of a small model's folder.

    Args:
        file: The `saved_model.pb`.
        prefix: What the names of the model's variables begin with.
        keep_saver: Whether the checkpoint holds values. Without any, the graph that saves and
            restores them goes too.
    """
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    (meta,) = model.meta_graphs
    graph = meta.graph_def
    # Only for a runtime older than this one; defaults that it could not know are stripped already.
    meta.meta_info_def.ClearField("stripped_op_list")
    if not keep_saver:
        meta.ClearField("saver_def")

    roots = {
        tensor.name.partition(":")[0]
        for signature in meta.signature_def.values()
        for tensor in (*signature.inputs.values(), *signature.outputs.values())
    }
    roots |= {asset.tensor_info.name.partition(":")[0] for asset in meta.asset_file_def}
    if keep_saver:
        saver = meta.saver_def
        names = (saver.filename_tensor_name, saver.save_tensor_name, saver.restore_op_name)
        roots |= {name.partition(":")[0] for name in names}
    nodes = {node.name: node for node in graph.node}
    kept = _closure(
        roots, lambda name: (i.lstrip("^").partition(":")[0] for i in nodes[name].input)
    )
    _retain(graph.node, lambda node: node.name in kept)

    functions = {function.signature.name: function for function in graph.library.function}
    called = {name for node in graph.node for name in _functions_of(node)}
    called |= set(meta.object_graph_def.concrete_functions)
    called = _closure(
        called & functions.keys(),
        lambda name: (
            inner
            for node in functions[name].node_def
            for inner in _functions_of(node)
            if inner in functions
        ),
    )
    _retain(graph.library.function, lambda function: function.signature.name in called)
    _retain(graph.library.gradient, lambda gradient: gradient.function_name in called)
    for node in itertools.chain(graph.node, *(f.node_def for f in graph.library.function)):
        # Every loader infers the shapes inside the graph again; debug names are for messages.
        node.attr.pop("_output_shapes", None)
        node.attr.pop("debug_name", None)
    for function in graph.library.function:
        if function.signature.name.startswith("__inference__initializer_"):
            _shorten_names(function)  # Ours; the serving function keeps the layers' names.
        for i, argument in enumerate(function.signature.input_arg):
            if argument.type == types_pb2.DT_RESOURCE:
                del function.arg_attr[i]  # All it says is that a handle is a scalar.
    # TensorFlow calls the variable that holds an asset's path "Variable" in every model.
    for node in graph.node:
        if node.op == "VarHandleOp" and node.attr["shared_name"].s == b"Variable":
            node.attr["shared_name"].s = f"{prefix}/path".encode()
    file.write_bytes(model.SerializeToString(deterministic=True))


def _shorten_names(function: Any) -> None:
    """Numbers the nodes inside a function: in a small model the names are a tenth of the graph."""
    short = {node.name: np.base_repr(i, 36) for i, node in enumerate(function.node_def)}

    def renamed(reference: str) -> str:
        # "^node" for a control input, "node:output:0" for a value, or the name of an argument.
        caret = "^" * reference.startswith("^")
        name, colon, output = reference[len(caret) :].partition(":")
        return f"{caret}{short.get(name, name)}{colon}{output}"

    for node in function.node_def:
        node.name = short[node.name]
        node.input[:] = [renamed(reference) for reference in node.input]
    for name, reference in function.ret.items():
        function.ret[name] = renamed(reference)
    controls = {name: short[node] for name, node in function.control_ret.items()}
    function.signature.control_output[:] = [
        controls[name] for name in function.signature.control_output
    ]
    function.control_ret.clear()
    function.control_ret.update({node: node for node in controls.values()})


def _closure(start: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(following(name))
    return found


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def _retain(messages: Any, keep: Callable[[Any], bool]) -> None:
    kept = [message for message in messages if keep(message)]
    del messages[:]
    messages.extend(kept)


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
