"""The graph of a sparse SavedModel: the serving function and the decoder of the weights."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from masked_layers._tensorflow import keep_out_of_checkpoint
from masked_layers.serving import encoding
from masked_layers.serving.tracing import Traced
from masked_layers.streams import SKIP

if TYPE_CHECKING:
    import tensorflow as tf

PACK = "weights.mlsp"


def write(folder: Path, traced: Traced, pack: bytes) -> None:
    """Writes the SavedModel: the serving function, the packed weights and their decoder."""
    import tensorflow as tf

    packed = {entry.name for block in encoding.blocks(pack) for entry in block.entries}

    class Weights(tf.saved_model.experimental.TrackableResource):
        """Decodes the packed weights into the variables when the SavedModel is loaded."""

        def _create_resource(self) -> Any:
            # A resource must have a handle, which is not used here: the weights are variables.
            name = f"{traced.prefix}/decoder"
            return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=[], shared_name=name)

        def _initialize(self) -> None:
            decode(root.pack.asset_path, encoding.blocks(pack), traced.variables)

    for name in packed:
        keep_out_of_checkpoint(traced.variables[name])
    with tempfile.TemporaryDirectory() as assets:
        file = Path(assets, PACK)
        file.write_bytes(pack)
        # Everything that the functions use is an attribute of the root. A `TrackableResource`
        # tracks nothing itself, and an untracked asset would leave a local path in the graph.
        root = tf.__internal__.tracking.AutoTrackable()
        root.serve = traced.function
        root.variables = list(traced.variables.values())
        root.resources = list(traced.resources)
        if packed:
            root.pack = tf.saved_model.Asset(str(file))
            root.weights = Weights()
        # Keras exports the endpoint both under its name and as TensorFlow Serving's default.
        signatures = {"serve": traced.function, "serving_default": traced.function}
        tf.saved_model.save(root, str(folder), signatures=signatures)


def decode(
    file: Any, blocks: Sequence[encoding.Block], variables: Mapping[str, tf.Variable]
) -> None:
    """Adds ops to a graph that decode a packed file into variables.

    Blocks are decoded one after the other, so that only one decoded block is in memory in addition
    to the variables.

    Args:
        file: String tensor with the path of the packed file.
        blocks: Blocks of the file, from `encoding.blocks`.
        variables: Variables by array name. Values are cast to their dtypes.
    """
    import tensorflow as tf

    data = tf.io.read_file(file)
    for block in blocks:
        flat, table = _decode_block(data, block)
        # Arrays of equal shape are adjacent, so many variables need few ops.
        shapes = [
            (*kind, list(members))
            for kind, members in itertools.groupby(
                block.entries, lambda entry: (entry.shape, entry.levels)
            )
        ]
        parts = _parts(flat, [sum(entry.size for entry in members) for *_, members in shapes])
        tables = _parts(table, [levels * len(members) for _, levels, members in shapes])
        assigned = []
        for (shape, levels, members), part, values in zip(shapes, parts, tables, strict=True):
            if block.coding != "exact":
                part = _decoded(part, values, len(members), levels, block.coding)
            if len(members) == 1:
                arrays = [part if len(shape) == 1 else tf.reshape(part, shape)]
            else:
                arrays = tf.unstack(tf.reshape(part, [len(members), *shape]))
            for entry, array in zip(members, arrays, strict=True):
                variable = variables[entry.name]
                value = tf.cast(array, variable.dtype)
                assigned.append(tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value))
        if block is not blocks[-1]:
            # Only this op has control inputs. With edges from every assignment to every op of the
            # next block, TensorFlow's graph optimizer would take longer than the decoding.
            with tf.control_dependencies(assigned):
                data = tf.identity(data)


def _parts(flat: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    import tensorflow as tf

    return tf.split(flat, sizes) if len(sizes) > 1 else [flat]


def _decoded(codes: tf.Tensor, table: tf.Tensor, count: int, levels: int, coding: str) -> tf.Tensor:
    """Returns the values of `count` arrays with the same number of levels, as a flat tensor."""
    import tensorflow as tf

    if coding == "scales":
        scales = tf.reshape(table, [count, 1, levels])
        codes = tf.reshape(codes, [count, -1, levels])
        return tf.reshape(tf.cast(codes, tf.float32) * scales, [-1])
    codes = tf.cast(codes, tf.int32)
    if count == 1:
        return tf.gather(table, codes)
    tables = tf.reshape(table, [count, levels])
    codes = tf.reshape(codes, [count, -1])
    return tf.reshape(tf.raw_ops.GatherV2(params=tables, indices=codes, axis=1, batch_dims=1), [-1])


def _decode_block(data: tf.Tensor, block: encoding.Block) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the values or codes of a block, zeros included, and its tables, as flat tensors."""
    import tensorflow as tf

    def stream(place: Any) -> tf.Tensor:
        offset, length = np.asarray(place).T
        index = np.int32 if (offset + length).max() < 2**31 else np.int64
        packed = tf.strings.substr(data, offset.astype(index), length.astype(index))
        return tf.io.decode_raw(tf.io.decode_compressed(packed, "ZLIB"), tf.uint8)

    sparse, coded = block.encoding == "sparse", block.coding != "exact"
    dtype = tf.as_dtype(block.dtype)
    table = tf.zeros([0])
    if coded:
        planes = tf.reshape(stream(block.streams[-1]), [4, -1])
        table = tf.bitcast(tf.transpose(planes), tf.float32)
    planes = stream(block.streams[sparse : len(block.streams) - coded])
    if dtype.size == 1:
        values = tf.bitcast(tf.reshape(planes, [-1]), dtype)
    else:
        values = tf.bitcast(tf.transpose(planes), dtype)
    if not sparse:
        return values, table
    gaps = stream(block.streams[0])
    index = tf.int32 if block.size < 2**31 else tf.int64
    steps = tf.cast(gaps, index) + 1
    if block.gaps == block.values:
        positions = tf.cumsum(steps) - 1
    else:
        # A gap of g < 255 means g zeros and one value, and 255 means 255 zeros.
        ends = tf.cumsum(tf.minimum(steps, SKIP)) - 1
        taken = tf.where(tf.not_equal(gaps, SKIP))
        positions = tf.reshape(tf.gather(ends, taken), [-1])
    # Five times faster than `scatter_nd`, which treats every value as a slice.
    flat = tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=tf.constant([block.size], index),
        sparse_values=values,
        default_value=tf.zeros([], dtype),
        validate_indices=False,
    )
    return flat, table
