"""The graph of a sparse SavedModel: the serving function and the decoder of the weights."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from masked_layers._tensorflow import keep_out_of_checkpoint
from masked_layers.files import temporary_folder
from masked_layers.serving import encoding
from masked_layers.serving.tracing import Traced
from masked_layers.streams import SKIP

if TYPE_CHECKING:
    import tensorflow as tf

PACK = "weights.mlsp"


def write(folder: Path, traced: Traced, pack: bytes) -> None:
    """Writes the SavedModel: the serving function, the packed weights and their decoder."""
    import tensorflow as tf

    packed = {entry.name for block in encoding.blocks(pack) for entry in block.members}

    class Weights(tf.saved_model.experimental.TrackableResource):
        """Decodes the packed weights into the variables when the SavedModel is loaded."""

        def _create_resource(self) -> Any:
            # A resource must have a handle, which is not used here: the weights are variables.
            return tf.raw_ops.VarHandleOp(dtype=tf.bool, shape=[], shared_name=traced.prefix)

        def _initialize(self) -> None:
            decode(root.pack.asset_path, encoding.blocks(pack), traced.variables)

    for name in packed:
        keep_out_of_checkpoint(traced.variables[name])
    with temporary_folder() as assets:
        file = assets / PACK
        file.write_bytes(pack)
        # Everything that the functions use is an attribute of the root. A `TrackableResource`
        # tracks nothing itself, and an untracked asset would leave a local path in the graph.
        root = tf.__internal__.tracking.AutoTrackable()
        root.serve = traced.function
        root.variables = list(traced.variables.values())
        if traced.resources:
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

    Large blocks are decoded one after the other, so that only one of them is in memory in addition
    to the variables.

    Args:
        file: String tensor with the path of the packed file.
        blocks: Blocks of the file, from `encoding.blocks`.
        variables: Variables by array name. Values are cast to their dtypes.
    """
    import tensorflow as tf

    data = tf.io.read_file(file)
    done = 0
    for block in blocks:
        # Arrays of equal shape are adjacent, so many variables need few ops.
        coded, plain = _equal(block.entries), _equal(block.floats)
        joint = block.coding == "joint"
        levels = [sum(entry.levels for entry in members) for members in coded]
        levels = [sum(levels)] if joint else levels
        flat, numbers = _decode_block(data, block, [*levels, *map(_size, plain)])
        parts = _parts(flat, [_size(members) for members in coded])
        tables = [None] * len(coded) if joint or not numbers else numbers[: len(levels)]
        found = [
            (members, _arrays(part, table, members, block.coding))
            for members, part, table in zip(coded, parts, tables, strict=True)
        ]
        for members, part in zip(plain, numbers[len(levels) :], strict=True):
            found.append((members, _arrays(part, None, members, "exact")))
        assigned = []
        for members, arrays in found:
            for entry, array in zip(members, arrays, strict=True):
                variable = variables[entry.name]
                value = tf.cast(array, variable.dtype)
                assigned.append(tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value))
        done += block.size
        if block is not blocks[-1] and done > encoding.BLOCK_SIZE:
            # Only this op has control inputs. With edges from every assignment to every op of the
            # next block, TensorFlow's graph optimizer would take longer than the decoding.
            with tf.control_dependencies(assigned):
                data = tf.identity(data)
            done = 0


def _equal(entries: Sequence[encoding.Entry]) -> list[list[encoding.Entry]]:
    """Returns the entries in groups of equal shapes, and of tables of equal lengths."""
    key = operator.attrgetter("shape", "levels")
    return [list(members) for _, members in itertools.groupby(entries, key)]


def _size(entries: Sequence[encoding.Entry]) -> int:
    return sum(entry.size for entry in entries)


def _parts(flat: tf.Tensor, sizes: list[int]) -> list[tf.Tensor]:
    import tensorflow as tf

    return tf.split(flat, sizes) if len(sizes) > 1 else [flat]


def _arrays(
    part: tf.Tensor, table: tf.Tensor | None, members: Sequence[encoding.Entry], coding: str
) -> list[tf.Tensor]:
    """Returns arrays of equal shapes, whose values or codes are in a flat tensor."""
    import tensorflow as tf

    count, shape = len(members), members[0].shape
    if count > 1:
        shape = (count, *shape)
    values = part if len(shape) == 1 else tf.reshape(part, shape)
    if coding == "scales":
        ones = [1] * (len(shape) - 2)
        values *= table if count == 1 else tf.reshape(table, [count, *ones, -1])
    elif coding == "codebook" and count == 1:
        values = _gathered(table, values)
    elif coding == "codebook":
        tables = tf.reshape(table, [count, -1])
        values = tf.raw_ops.GatherV2(params=tables, indices=values, axis=1, batch_dims=1)
    return [values] if count == 1 else tf.unstack(values)


def _decode_block(
    data: tf.Tensor, block: encoding.Block, sizes: list[int]
) -> tuple[tf.Tensor, list[tf.Tensor]]:
    """Returns the values or codes of a block as a flat tensor, zeros included, and its numbers.

    The numbers, of a block of codes, are split into parts of the given sizes. If codes are joint,
    the first part is their table, and values are returned.
    """
    import tensorflow as tf

    def stream(place: Any) -> tf.Tensor:
        offset, length = np.asarray(place).T
        index = np.int32 if (offset + length).max() < 2**31 else np.int64
        packed = tf.strings.substr(data, offset.astype(index), length.astype(index))
        return tf.io.decode_raw(tf.io.decode_compressed(packed, "ZLIB"), tf.uint8)

    sparse = block.encoding == "sparse"
    dtype = tf.as_dtype(block.dtype)
    if block.coding == "exact":
        planes = stream(block.streams[sparse:])
        if dtype.size == 1:
            values = tf.bitcast(tf.reshape(planes, [-1]), dtype)
        else:
            values = tf.bitcast(tf.transpose(planes), dtype)
        if sparse:
            values = _scattered(stream(block.streams[0]), values, block)
        return values, []
    gaps, values, planes = tf.split(stream(block.streams[0]), block.parts)
    planes = tf.transpose(tf.reshape(planes, [4, -1]))
    numbers = _parts(tf.bitcast(planes, tf.float32), sizes)
    if block.coding == "scales":
        values = tf.bitcast(values, dtype)
    elif block.coding == "joint":
        values = _gathered(numbers[0], tf.cast(values, tf.int32))
    values = _scattered(gaps, values, block) if sparse else values
    if block.coding != "joint":
        values = tf.cast(values, tf.float32 if block.coding == "scales" else tf.int32)
    return values, numbers


def _gathered(table: tf.Tensor, codes: tf.Tensor) -> tf.Tensor:
    """Returns the values of codes."""
    import tensorflow as tf

    # `tf.gather` has an axis, which takes further bytes in the graph.
    return tf.raw_ops.Gather(params=table, indices=codes)


def _scattered(gaps: tf.Tensor, values: tf.Tensor, block: encoding.Block) -> tf.Tensor:
    """Returns a flat tensor with the values of a sparse block in their places."""
    import tensorflow as tf

    index = tf.int32 if block.size < 2**31 else tf.int64
    gaps = tf.cast(gaps, index)
    if block.gaps == block.values:
        positions = tf.cumsum(gaps + 1) - 1
    else:
        # A gap of g < 255 means g zeros and one value, and 255 means 255 zeros.
        ends = tf.cumsum(tf.minimum(gaps + 1, SKIP)) - 1
        positions = tf.gather_nd(ends, tf.where(tf.not_equal(gaps, SKIP)))
    # Five times faster than `scatter_nd`, which treats every value as a slice.
    return tf.raw_ops.SparseToDense(
        sparse_indices=positions,
        output_shape=tf.constant([block.size], index),
        sparse_values=values,
        default_value=tf.zeros([], values.dtype),
    )
