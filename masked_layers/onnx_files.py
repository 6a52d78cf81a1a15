"""ONNX files that store the non-zero values of kernels, which standard operators put in place."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import keras
import ml_dtypes
import numpy as np

from masked_layers import _keras
from masked_layers.conversion import without_masks
from masked_layers.files import check_target, replacing
from masked_layers.serving import StorageReport, StorageRow, relative_difference, samples_of

_SKIP = 255


def export_sparse_onnx(
    model: keras.Model, path: str | os.PathLike[str], *, sample_inputs: Any = None
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
        RuntimeError: If outputs differ.
        TypeError: If `model` is not a Keras model.
        ValueError: If the model cannot be stripped of its masks (`strip_masks`) or called on the
            sample inputs, or is too large for one ONNX file (2 GB).
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise _missing(error) from error
    check_target(path)
    plain = without_masks(model)
    samples = samples_of(model, _keras.export_specs(model), sample_inputs)
    batches = _batches(model, samples)
    expected = [_outputs_of(plain, batch, given=sample_inputs is not None) for batch in batches]
    dense = _dense_file(plain)
    exported = onnx.load_from_string(dense)
    rows = _store_sparsely(exported.graph)
    data = exported.SerializeToString()
    for batch, outputs in zip(batches, expected, strict=True):
        _compare(data, dense, [np.asarray(x) for x in keras.tree.flatten(batch)], outputs)
    with replacing(path) as whole:
        whole.write(data)
    return StorageReport(
        rows=tuple(rows),
        dense_nbytes=sum(row.size * np.dtype(row.dtype).itemsize for row in rows),
        files={Path(path).name: len(data)},
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


def _outputs_of(model: keras.Model, inputs: list[Any], given: bool) -> list[np.ndarray]:
    """Returns the outputs of a model, flat.

    Raises:
        NotImplementedError: If the call changes variables.
        ValueError: If the model cannot be called.
    """
    try:
        with keras.StatelessScope() as scope:
            outputs = keras.tree.flatten(model(*inputs))
    except Exception as error:  # Layers may raise any error.
        kind = "the given" if given else "random"
        raise ValueError(
            f"The model cannot be called on {kind} `sample_inputs`. Pass those that it accepts. "
            f"{error}"
        ) from error
    if scope.state_mapping:
        raise NotImplementedError(
            f"A call of the model changes {len(scope.state_mapping)} of its variables, as stateful "
            "layers do. An ONNX file cannot do this; `export_sparse_saved_model` can."
        )
    return [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]


def _dense_file(model: keras.Model) -> bytes:
    """Returns the file of Keras' own exporter."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        file = Path(folder) / "model.onnx"
        if keras.backend.backend() == "torch":
            # About the lengths of axes; whether the file accepts others is found by running it.
            warnings.filterwarnings("ignore", "Converting a tensor to a Python")
        try:
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
    data: bytes, dense: bytes, inputs: list[np.ndarray], expected: list[np.ndarray]
) -> None:
    """Compares the outputs of both files with each other, and with those of the model.

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
    if [x.tobytes() for x in _run(data, inputs)] != [x.tobytes() for x in wanted]:
        raise RuntimeError(
            "Outputs of the sparse file differ from those of the dense one. Nothing was written; "
            "please report this."
        )


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
