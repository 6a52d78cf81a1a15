"""ONNX files that store the non-zero values of kernels, which standard operators put in place."""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path
from typing import Any

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.conversion import without_masks
from masked_layers.files import replacing
from masked_layers.serving import StorageReport, StorageRow, samples_of

_SKIP = 255


def export_sparse_onnx(
    model: keras.Model, path: str | os.PathLike[str], *, sample_inputs: Any = None
) -> StorageReport:
    """Exports a model as an ONNX file of about the size of its non-zero weights.

    Sparse weights are stored as their non-zero values and one byte per value for its position.
    Standard operators (`CumSum`, `ScatterElements`) put the values in place. Runtimes with constant
    folding, such as ONNX Runtime, do so once, when they load the file. The arithmetic stays dense.

    The file of Keras' own exporter is the starting point. The new file must have the same outputs
    in ONNX Runtime, bit for bit, and replaces an existing one only then.

    Args:
        model: A built model, either masked, or plain with zeros in its kernels.
        path: Path of the file.
        sample_inputs: Inputs for comparing outputs, as in `export_sparse_saved_model`.

    Returns:
        The sizes of the stored weights. Weights have their names in the ONNX file.

    Raises:
        ImportError: If `onnx`, `onnxruntime` or what Keras needs to export is missing, such as
            `tf2onnx` on TensorFlow or `jax2onnx` on JAX.
        RuntimeError: If outputs differ from those of Keras' file.
        TypeError: If `model` is not a Keras model.
        ValueError: If the model cannot be stripped of its masks (`strip_masks`), or is too large
            for one ONNX file (2 GB).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"'{error.name}' is missing. Install what ONNX needs: `pip install onnx onnxruntime`, "
            "and `tf2onnx` to export from TensorFlow or `jax2onnx` from JAX."
        ) from error
    plain = without_masks(model)
    samples = samples_of(model, _keras.export_signature(model), sample_inputs)
    with keras.StatelessScope():
        plain(*samples)  # Keras exports only models that were called.
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        plain.export(file, format="onnx", verbose=False)
        dense = file.read_bytes()
    exported = onnx.load_from_string(dense)
    rows = _store_sparsely(exported.graph)
    data = exported.SerializeToString()
    inputs = [np.asarray(sample) for sample in keras.tree.flatten(samples)]
    if _outputs(data, inputs) != _outputs(dense, inputs):
        raise RuntimeError(
            f"Outputs of the sparse file differ from those of the dense one. '{path}' was not "
            "changed; please report this."
        )
    with replacing(path) as whole:
        whole.write(data)
    return StorageReport(
        rows=tuple(rows),
        dense_nbytes=sum(row.size * np.dtype(row.dtype).itemsize for row in rows),
        files={Path(path).name: len(data)},
    )


def _outputs(data: bytes, inputs: list[np.ndarray]) -> list[bytes]:
    """Returns the bytes of all outputs of an ONNX model in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    names = [source.name for source in session.get_inputs()]
    return [
        np.asarray(x).tobytes() for x in session.run(None, dict(zip(names, inputs, strict=True)))
    ]


def _store_sparsely(graph: Any) -> list[StorageRow]:
    """Replaces initializers by their non-zero values where this takes fewer bytes."""
    from onnx import helper, numpy_helper

    rows: list[StorageRow] = []
    nodes: list[Any] = []
    dense: list[Any] = []
    added: list[Any] = []
    for tensor in graph.initializer:
        array = numpy_helper.to_array(tensor)
        alive = int(np.count_nonzero(array))
        floats = array.dtype.kind == "f"
        flat = array.ravel()
        # Bit for bit: a negative zero stays where it is.
        stored = np.flatnonzero(flat.view(f"u{array.itemsize}") if floats else flat)
        steps, values = _steps(flat, stored)
        nbytes = steps.nbytes + values.nbytes
        # The nodes that put values in place take some hundred bytes.
        sparse = floats and nbytes + 1024 < array.nbytes
        rows.append(
            StorageRow(
                tensor.name,
                array.shape,
                array.dtype.name,
                "sparse" if sparse else "dense",
                alive,
                nbytes if sparse else array.nbytes,
            )
        )
        if not sparse:
            dense.append(tensor)
            continue
        name = f"sparse{len(nodes)}"
        constants = {
            "steps": steps,
            "values": values,
            "axis": np.array(0, np.int64),
            "one": np.array(1, np.int64),
            "size": np.array([math.prod(array.shape)], np.int64),
            "shape": np.array(array.shape, np.int64),
        }
        added += [numpy_helper.from_array(v, f"{name}/{k}") for k, v in constants.items()]
        zero = numpy_helper.from_array(np.zeros(1, array.dtype))
        for op, sources, target, more in (
            ("Cast", ["steps"], "wide", {"to": 7}),  # int64
            ("CumSum", ["wide", "axis"], "ends", {}),
            ("Sub", ["ends", "one"], "positions", {}),
            ("ConstantOfShape", ["size"], "zeros", {"value": zero}),
            ("ScatterElements", ["zeros", "positions", "values"], "flat", {"axis": 0}),
            ("Reshape", ["flat", "shape"], "", {}),
        ):
            output = f"{name}/{target}" if target else tensor.name
            nodes.append(
                helper.make_node(op, [f"{name}/{source}" for source in sources], [output], **more)
            )
    ordered = [*nodes, *graph.node]
    del graph.initializer[:], graph.node[:]
    graph.initializer.extend([*dense, *added])
    graph.node.extend(ordered)
    return rows


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
