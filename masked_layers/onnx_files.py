"""ONNX files that store the non-zero values of kernels, which standard operators put in place."""

from __future__ import annotations

import dataclasses
import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np

from masked_layers import _keras
from masked_layers.conversion import without_masks
from masked_layers.files import check_target, replacing, temporary_folder
from masked_layers.serving import (
    StorageReport,
    StorageRow,
    outputs_of,
    relative_difference,
    samples_of,
    scaled,
)

_SKIP = 255


def export_sparse_onnx(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    values: str = "float32",
    tolerance: float | None = None,
    sample_inputs: Any = None,
) -> StorageReport:
    """Exports a model as an ONNX file of about the size of its non-zero weights.

    Sparse weights are stored as their non-zero values and one byte per value for its position.
    Standard operators (`CumSum`, `ScatterElements`) put the values in place. Runtimes with constant
    folding, such as ONNX Runtime, do so once, when they load the file. The arithmetic stays dense.

    The file of Keras' own exporter is the starting point, and both are run in ONNX Runtime. The
    outputs of Keras' file must be those of the model up to rounding, for several batch sizes if
    that is free, and those of the new file the same, bit for bit. Only then it replaces an existing
    one.

    Args:
        model: A built model, either masked, or plain with zeros in its kernels.
        path: Path of the file.
        values: `"float32"` keeps every value. `"int8"` rounds float32 weights with two or more axes
            to multiples of a scale per output channel, as `export_sparse_saved_model` does, where
            this makes the file smaller. The file computes with floats, as before. Weights that were
            trained with `convert_to_masked(quantize=...)` are stored without further loss, unless
            the exporter joins their axes, as that of TensorFlow does in attention.
        tolerance: Largest difference of an output of rounded weights on the sample inputs, relative
            to the largest output. If it is exceeded, nothing is written. Default: no limit.
        sample_inputs: Inputs for comparing outputs, as in `export_sparse_saved_model`. Axes without
            a fixed length should have one that will be served.

    Returns:
        The sizes of the stored weights. Weights have their names in the ONNX file.

    Raises:
        ImportError: If `onnx`, `onnxruntime` or what Keras needs to export is missing, such as
            `tf2onnx` on TensorFlow or `jax2onnx` on JAX.
        NotImplementedError: If a call of the model changes its variables, or Keras cannot export
            the model to a file that ONNX Runtime runs.
        OSError: If the file cannot be written, because its folder is missing, for example.
        RuntimeError: If outputs differ, by more than `tolerance` if values are rounded.
        TypeError: If `model` is not a Keras model.
        ValueError: If `values` or `tolerance` is invalid, or the model cannot be stripped of its
            masks (`strip_masks`) or called on the sample inputs, or is too large for one ONNX file
            (2 GB).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise _missing(error) from error
    if values not in ("float32", "int8"):
        raise ValueError(f"`values` must be 'float32' (exact) or 'int8'. Received: {values!r}")
    if tolerance is not None and not tolerance > 0:
        raise ValueError(f"`tolerance` must be a number above 0. Received: {tolerance!r}")
    check_target(path)
    plain = without_masks(model)
    samples = samples_of(model, _keras.export_specs(model), sample_inputs)
    batches = _batches(model, samples)
    expected = [
        _stateless_outputs(plain, batch, given=sample_inputs is not None) for batch in batches
    ]
    dense = _dense_file(plain)
    exported = onnx.load_from_string(dense)
    stored = {tensor.name: _stored(tensor, values) for tensor in exported.graph.initializer}
    _round(exported.graph, stored)
    rounded = exported.SerializeToString() if values != "float32" else dense
    _store_sparsely(exported.graph, stored)
    data = exported.SerializeToString()
    found = 0.0
    for batch, outputs in zip(batches, expected, strict=True):
        inputs = [np.asarray(x) for x in keras.tree.flatten(batch)]
        found = max(found, _compare(data, rounded, dense, inputs, outputs))
    if tolerance is not None and not found <= tolerance:
        raise RuntimeError(
            f"With values='{values}', the largest difference of an output is {found:.3g} of the "
            f"largest output on the sample inputs, but `tolerance` is {tolerance}. Nothing was "
            "written. Train with `convert_to_masked(model, quantize='int8')`, use "
            "values='float32', or allow a larger tolerance."
        )
    with replacing(path) as whole:
        whole.write(data)
    return StorageReport(
        rows=tuple(_row(name, weight) for name, weight in stored.items()),
        dense_nbytes=sum(weight.array.nbytes for weight in stored.values()),
        files={Path(path).name: len(data)},
        values=values,
        output_error=found if values != "float32" else None,
    )


def _missing(error: ImportError) -> ImportError:
    # Keras' errors do not have the name, but name it in the text.
    what = f"'{error.name}' is missing." if error.name else str(error)
    return ImportError(
        f"{what} Install what ONNX needs: `pip install onnx onnxruntime`, and `tf2onnx` to export "
        "from TensorFlow or `jax2onnx` from JAX."
    )


def _batches(model: keras.Model, samples: list[Any]) -> list[list[Any]]:
    """Returns the sample inputs, and if the batch size is free, also a row and a row more."""
    shapes = [x.shape for x in getattr(model, "inputs", None) or ()]
    if not all(shape and shape[0] is None for shape in shapes):
        return [samples]
    size = len(keras.tree.flatten(samples)[0])

    def resized(rows: int) -> list[Any]:
        return keras.tree.map_structure(lambda x: x[np.arange(rows) % len(x)], samples)

    return [samples, *(resized(rows) for rows in {1, size + 1} - {size})]


def _stateless_outputs(model: keras.Model, inputs: list[Any], given: bool) -> list[np.ndarray]:
    """Returns the outputs of a model, flat.

    Raises:
        NotImplementedError: If the call changes variables.
        ValueError: If the model cannot be called.
    """
    outputs, changed = outputs_of(model, inputs, given=given)
    if changed:
        raise NotImplementedError(
            f"A call of the model changes {changed} of its variables, as stateful layers do. An "
            "ONNX file cannot do this; `export_sparse_saved_model` can."
        )
    return outputs


def _dense_file(model: keras.Model) -> bytes:
    """Returns the file of Keras' own exporter."""
    with temporary_folder() as folder, warnings.catch_warnings():
        file = folder / "model.onnx"
        if keras.backend.backend() == "torch":
            # About the lengths of axes; whether the file accepts others is found by running it.
            warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        try:
            with _keras.inference_scope():
                model.export(file, format="onnx", verbose=False)
        except ImportError as error:
            raise _missing(error) from error
        except Exception as error:  # The exporters raise any error.
            raise _refused(f"export the model to ONNX: {type(error).__name__}", error) from error
        return file.read_bytes()


def _refused(what: str, error: Exception) -> NotImplementedError:
    reason = " ".join(str(error).split())
    return NotImplementedError(
        f"Keras on {keras.backend.backend()} cannot {what}: {reason[:500]}. Another backend may: "
        "save the model as a `.keras` file and export that with another KERAS_BACKEND. Or write "
        "another format (`export_sparse_saved_model`, `export_sparse_torch`)."
    )


def _compare(
    data: bytes,
    rounded: bytes,
    dense: bytes,
    inputs: list[np.ndarray],
    expected: list[np.ndarray],
) -> float:
    """Compares the outputs of files with each other, and with those of the model.

    Args:
        data: The sparse file.
        rounded: A dense file with the same weights, which may be rounded.
        dense: Keras' file.
        inputs: Inputs of the model.
        expected: Outputs of the model.

    Returns:
        The largest difference of an output of `rounded`, relative to the largest output.

    Raises:
        NotImplementedError: If ONNX Runtime does not run Keras' file.
        RuntimeError: If outputs differ.
    """
    try:
        wanted = _run(dense, inputs)
    except Exception as error:  # It has an error of its own for each cause.
        raise _refused("export the model to a file that ONNX Runtime runs", error) from error
    dtypes = {x.dtype.name for x in expected if x.dtype.kind not in "OSUbiu"}
    precision = max((float(ml_dtypes.finfo(name).eps) for name in dtypes), default=0.0) ** 0.5
    same = len(wanted) == len(expected)
    found = max(map(relative_difference, wanted, expected), default=0.0) if same else math.inf
    if found > precision:
        raise RuntimeError(
            f"Outputs of the file that Keras on {keras.backend.backend()} exports differ from the "
            f"model's by {found:.2g} of the largest one, for inputs of the shapes "
            f"{[x.shape for x in inputs]}. Nothing was written. Keras may have rounded values, or "
            "fixed a length that the model leaves free: give its inputs fixed shapes, or export "
            "with another backend. A model with random outputs cannot be exported."
        )
    if rounded is not dense:
        wanted = _run(rounded, inputs)
    if [x.tobytes() for x in _run(data, inputs)] != [x.tobytes() for x in wanted]:
        raise RuntimeError(
            "Outputs of the sparse file differ from those of the dense one. Nothing was written; "
            "please report this."
        )
    return max(map(relative_difference, wanted, expected), default=0.0)


def _run(data: bytes, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """Returns all outputs of an ONNX model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [source.name for source in session.get_inputs()]
    if len(names) != len(inputs):
        raise ValueError(f"it has the inputs {names}, and the model has {len(inputs)} inputs.")
    return [np.asarray(x) for x in session.run(None, dict(zip(names, inputs, strict=True)))]


@dataclasses.dataclass(frozen=True, eq=False)
class _Stored:
    """A weight in the form in which it is stored.

    Attributes:
        array: Its exact values.
        content: These values, or int8 codes.
        scales: Scales by which codes are multiplied, to be broadcast; None for values.
        steps: Distances between stored entries, or None if all of them are stored.
        entries: The stored entries of `content`, or None with the same meaning.
    """

    array: np.ndarray
    content: np.ndarray
    scales: np.ndarray | None = None
    steps: np.ndarray | None = None
    entries: np.ndarray | None = None

    @property
    def is_plain(self) -> bool:
        """True if it stays an initializer."""
        return self.steps is None and self.scales is None

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays in the file."""
        arrays = {"values": self.content if self.entries is None else self.entries}
        arrays |= {} if self.steps is None else {"steps": self.steps}
        return arrays if self.scales is None else {**arrays, "scales": self.scales}

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        return sum(array.nbytes for array in self.arrays.values())

    @property
    def values(self) -> np.ndarray:
        """The values that the file computes with."""
        if self.scales is None:
            return self.content
        return self.content.astype(np.float32) * self.scales

    def sparse(self) -> _Stored:
        """Returns the weight without its zeros. Bit for bit: a negative zero stays where it is."""
        flat = self.content.ravel()
        steps, entries = _steps(flat, np.flatnonzero(flat.view(f"u{flat.itemsize}")))
        return dataclasses.replace(self, steps=steps, entries=entries)


def _stored(tensor: Any, values: str) -> _Stored:
    """Returns the smallest way to store an initializer."""
    from onnx import numpy_helper

    array = numpy_helper.to_array(tensor)
    ways = [_Stored(array, array)]
    if array.dtype.kind == "f":
        ways.append(ways[0].sparse())
    if values == "int8" and array.dtype == np.float32 and array.ndim > 1:
        if not np.isfinite(array).all():
            raise ValueError(
                f"'{tensor.name}' has values that are not finite, for which there are no codes. "
                "Use values='float32'."
            )
        coded = min((_coded(array, axis) for axis in range(array.ndim)), key=_squared_error)
        ways += [coded, coded.sparse()]

    def cost(way: _Stored) -> int:
        # The nodes that put values in place take some hundred bytes.
        return way.nbytes + 1024 * (way.steps is not None) + 256 * (way.scales is not None)

    return min(ways, key=cost)


def _coded(array: np.ndarray, axis: int) -> _Stored:
    """Returns codes with a scale for each index on an axis. Exporters transpose some kernels."""
    coded = scaled(np.moveaxis(array, axis, -1))
    shape = [1] * array.ndim
    shape[axis] = -1
    codes = np.ascontiguousarray(np.moveaxis(coded.codes, -1, axis))
    return _Stored(array, codes, coded.table.reshape(shape))


def _squared_error(way: _Stored) -> float:
    return float(np.sum((way.values.astype(np.float64) - way.array) ** 2))


def _row(name: str, weight: _Stored) -> StorageRow:
    return StorageRow(
        name,
        weight.array.shape,
        weight.content.dtype.name,
        "dense" if weight.steps is None else "sparse",
        int(np.count_nonzero(weight.content)),
        weight.nbytes,
    )


def _round(graph: Any, stored: Mapping[str, _Stored]) -> None:
    """Gives coded weights their values, as dense initializers."""
    from onnx import numpy_helper

    for tensor in graph.initializer:
        if stored[tensor.name].scales is not None:
            tensor.CopyFrom(numpy_helper.from_array(stored[tensor.name].values, tensor.name))


def _store_sparsely(graph: Any, stored: Mapping[str, _Stored]) -> None:
    """Replaces initializers by what is stored for them, and nodes that put it in place."""
    from onnx import helper, numpy_helper

    kept = [tensor for tensor in graph.initializer if stored[tensor.name].is_plain]
    nodes: list[Any] = []
    placed = {name: weight for name, weight in stored.items() if not weight.is_plain}
    for number, (target, weight) in enumerate(placed.items()):
        name = f"sparse{number}"
        constants, operations = dict(weight.arrays), []
        if weight.steps is not None:
            constants |= {
                "axis": np.array(0, np.int64),
                "one": np.array(1, np.int64),
                "size": np.array([weight.array.size], np.int64),
                "shape": np.array(weight.array.shape, np.int64),
            }
            zero = numpy_helper.from_array(np.zeros(1, weight.content.dtype))
            operations += [
                ("Cast", ["steps"], "wide", {"to": 7}),  # int64
                ("CumSum", ["wide", "axis"], "ends", {}),
                ("Sub", ["ends", "one"], "positions", {}),
                ("ConstantOfShape", ["size"], "zeros", {"value": zero}),
                ("ScatterElements", ["zeros", "positions", "values"], "flat", {"axis": 0}),
                ("Reshape", ["flat", "shape"], "placed", {}),
            ]
        if weight.scales is not None:
            # Not DequantizeLinear, which runtimes keep for integer kernels and may compute in every
            # call.
            source = "values" if weight.steps is None else "placed"
            operations += [
                ("Cast", [source], "codes", {"to": 1}),  # float32
                ("Mul", ["codes", "scales"], "weight", {}),
            ]
        kept += [numpy_helper.from_array(v, f"{name}/{k}") for k, v in constants.items()]
        for op, sources, output, more in operations:
            last = output == operations[-1][2]
            inputs = [f"{name}/{source}" for source in sources]
            nodes.append(
                helper.make_node(op, inputs, [target if last else f"{name}/{output}"], **more)
            )
    ordered = [*nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend(kept)
    graph.node.extend(ordered)


def _steps(flat: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the distances between stored entries, as bytes, and their values.

    After 255 entries without a value, a zero is stored.
    """
    distances = np.diff(positions, prepend=-1)
    counts = -(-distances // _SKIP)
    last = np.cumsum(counts) - 1
    steps = np.full(int(counts.sum()), _SKIP, np.uint8)
    steps[last] = distances - (counts - 1) * _SKIP
    values = np.zeros(len(steps), flat.dtype)
    values[last] = flat[positions]
    return steps, values
