"""Every format of a model in one folder, with a table of bytes, errors of outputs and latencies."""

import dataclasses
import functools
import json
import shutil
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner._keras import export_specs
from masked_layers import files, serving
from masked_layers.checksums import SUMS_FILE, checksum, first_wrong, lines, read
from masked_layers.files import FileContentError
from masked_layers.inference import inferred
from masked_layers.text_tables import aligned
from masked_layers.turns import seconds_per_call

REPORT = "formats.json"
_SECONDS = 2.0  # Time for measuring the latencies, unless a round takes longer.


@dataclasses.dataclass(frozen=True)
class FormatRow:
    """One format of a model.

    Attributes:
        format: Name of the format.
        path: File or folder inside the folder of all formats.
        nbytes: Bytes of the file, or of all files of the folder; None if it was not written.
        output_error: Largest difference of an output on the sample inputs, relative to the largest
            output of the model; None if it was not measured.
        seconds: Median time of a call with the sample inputs; None if it was not measured.
        note: Why the file was not written, or something was not measured.
    """

    format: str
    path: str
    nbytes: int | None = None
    output_error: float | None = None
    seconds: float | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class FormatsTable:
    """All formats of a model; prints as a table.

    Attributes:
        rows: The formats.
        dense_nbytes: Bytes of all weights, uncompressed.
        batch_size: Number of rows of the sample inputs.
    """

    rows: tuple[FormatRow, ...]
    dense_nbytes: int
    batch_size: int

    def to_json(self) -> bytes:
        """Returns the table as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    def __str__(self) -> str:
        lines = [("format", "path", "bytes", "smaller", "output error", "ms per call")]
        for row in self.rows:
            if row.nbytes is None:
                lines.append((row.format, "not written", "", "", "", ""))
                continue
            cells = (
                f"{row.nbytes:,}",
                f"{self.dense_nbytes / row.nbytes:.1f}",
                "" if row.output_error is None else f"{row.output_error:.1e}",
                "" if row.seconds is None else f"{1000 * row.seconds:.3f}",
            )
            lines.append((row.format, row.path, *cells))
        text = aligned(lines, left=(0, 1))
        text.append(
            f"uncompressed weights: {self.dense_nbytes:,} bytes; rows of a call: {self.batch_size}"
        )
        return "\n".join([*text, *(f"{row.format}: {row.note}" for row in self.rows if row.note)])


@dataclasses.dataclass(frozen=True)
class Options:
    """Options that the exports of all formats share.

    Attributes:
        tolerance, level, include: As in `export_sparse_saved_model`.
        sample_inputs: Inputs for comparing outputs and measuring; None for random numbers.
        batch_size: Number of rows of a call, to which the sample inputs are repeated or cut.
        threads: Number of threads of ONNX Runtime, LiteRT and TorchScript; None for their default.
    """

    tolerance: float | None
    level: int
    include: tuple[str, ...] | None
    sample_inputs: np.ndarray | None
    batch_size: int
    threads: int | None


Inputs = list[Any]  # The arguments of a call: arrays, or lists or dicts of them.
Call = Callable[[], Any]


def export_all(model: keras.Model, out: Path, options: Options, *, overwrite: bool) -> FormatsTable:
    """Writes a model in every format for which the packages are installed.

    The folder has a report, `formats.json`, and the checksums of all files, `SHA256SUMS`, and is
    complete before it replaces an existing one.

    Args:
        model: A built model, masked or plain.
        out: Folder to write.
        options: Options of the exports.
        overwrite: Whether a folder that an earlier call wrote is replaced.

    Raises:
        FileExistsError: If there is such a folder and `overwrite` is False, or `out` has other
            content.
        RuntimeError: If no format can be written.
    """
    out = out.resolve()
    _check_out(out, overwrite)
    structured = serving.samples_of(model, export_specs(model), options.sample_inputs)
    structured = keras.tree.map_structure(
        lambda x: x[np.arange(options.batch_size) % len(x)], structured
    )
    given = options.sample_inputs is not None
    expected, _ = serving.outputs_of(model, structured, given=given)
    inputs = keras.tree.map_structure(np.asarray, structured)
    with files.scratch_folder(out, _CONTENTS) as scratch:
        rows: list[FormatRow] = []
        calls: dict[str, Call] = {}
        for name, (file, write, load) in _formats(model, options).items():
            path = scratch / file
            row = _written(FormatRow(name, file), path, write)
            if row.nbytes is not None:
                row, call = _compared(row, functools.partial(load, path, inputs), expected)
                row = _within(row, path, options.tolerance)
                # A ticket is not for serving.
                if call is not None and row.nbytes is not None and name != "ticket":
                    calls[name] = call
            rows.append(row)
        if all(row.nbytes is None for row in rows):
            raise RuntimeError(
                "No format could be written. " + " ".join(f"{r.format}: {r.note}" for r in rows)
            )
        measured = seconds_per_call(calls, rounds=(5, 50), seconds=_SECONDS, warm=2)
        medians = {name: statistics.median(seconds) for name, seconds in measured.items()}
        sizes = [v.dtype.itemsize * v.size for v in map(np.asarray, model.get_weights())]
        table = FormatsTable(
            rows=tuple(dataclasses.replace(r, seconds=medians.get(r.format)) for r in rows),
            dense_nbytes=sum(sizes),
            batch_size=options.batch_size,
        )
        (scratch / REPORT).write_bytes(table.to_json())
        sums = {name: checksum(scratch / name) for name in _files(scratch)}
        (scratch / SUMS_FILE).write_bytes(lines(sums))
        _check_out(out, overwrite)  # Again, since writing takes time.
        files.replace_folder(scratch, out)
    return table


def inspect_all(folder: Path) -> FormatsTable:
    """Returns the table in a folder of all formats, after checking every byte of the formats.

    Args:
        folder: A folder that `export_all` wrote.

    Raises:
        FileContentError: If a file is missing or was changed, or there are no checksums.
    """
    file = folder / SUMS_FILE
    if not file.is_file():
        raise FileContentError(
            f"'{file}' is missing, so the formats cannot be checked. Copy it together with them, "
            "or export the model again: earlier versions wrote none."
        )
    sums = read(file)
    wrong = first_wrong(folder, sums, sorted({REPORT, *sums, *_files(folder)}))
    if wrong is not None:
        raise FileContentError(
            f"'{wrong}' is missing or does not have the checksum in {SUMS_FILE}, so one of the two "
            "is damaged. Restore both from where the folder was copied, or export the model again."
        )
    try:
        content = json.loads((folder / REPORT).read_bytes())
        table = FormatsTable(tuple(FormatRow(**row) for row in content.pop("rows")), **content)
        str(table)  # Which needs values of the right types.
    except (*files.UNEXPECTED_FORM, ArithmeticError) as error:
        raise FileContentError(f"'{folder / REPORT}' is damaged: {_line(error)}") from error
    return table


def _files(folder: Path) -> list[str]:
    """Returns the names of the files that belong to a folder of all formats, but its checksums."""
    own = _CONTENTS - {SUMS_FILE}
    return [name for name in files.file_sizes(folder) if name.partition("/")[0] in own]


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise FileExistsError(f"'{out}' is a file. Choose a folder for all formats.")
    found = {inside.name for inside in out.iterdir()} if out.is_dir() else set()
    if more := sorted(found - _CONTENTS):
        raise FileExistsError(
            f"'{out}' contains files that are not formats of a model: {more[:3]}. Choose another "
            "folder."
        )
    if found and not overwrite:
        raise FileExistsError(
            f"'{out}' exists. Choose another folder, or pass --overwrite to replace it once the "
            "new one is complete."
        )


def _written(row: FormatRow, path: Path, write: Callable[[Path], object]) -> FormatRow:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # Of packages that others import.
            write(path)
    except Exception as error:  # Converters raise errors of any type.
        _remove(path)  # What it may have written before.
        return dataclasses.replace(row, note=f"{type(error).__name__}: {_line(error)}")
    return dataclasses.replace(row, nbytes=sum(files.file_sizes(path).values()))


def _compared(
    row: FormatRow, load: Callable[[], Call], expected: Sequence[np.ndarray]
) -> tuple[FormatRow, Call | None]:
    """Returns the row with the error of the outputs, and a function that calls the format."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Runtimes announce that they are deprecated.
            call = load()
            found = _arrays(call())
        if [x.shape for x in found] != [x.shape for x in expected]:
            raise ValueError(f"outputs of the shapes {[x.shape for x in found]}")
        largest = max(map(serving.relative_difference, expected, found), default=0.0)
    except Exception as error:  # Runtimes raise errors of any type.
        return dataclasses.replace(row, note=f"not measured. {_line(error)}"), None
    return dataclasses.replace(row, output_error=float(largest)), call


def _within(row: FormatRow, path: Path, tolerance: float | None) -> FormatRow:
    """Removes a format whose outputs differ by more than the tolerance, which not all check."""
    if tolerance is None or row.output_error is None or row.output_error <= tolerance:
        return row
    _remove(path)
    note = f"outputs differ by {row.output_error:.2g} of the largest one, more than --tolerance"
    return FormatRow(row.format, row.path, note=note)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(keras.ops.convert_to_numpy(x)) for x in keras.tree.flatten(outputs)]


# --- Formats --------------------------------------------------------------------------------------

_SAVED_MODELS = ("float32", "float16", "int8", "codebook")
_FILES = ("model.onnx", "int8.onnx", "model.pt", "model.pt.json", "model.tflite", "int8.tflite")
_CONTENTS = frozenset((*_SAVED_MODELS, *_FILES, "ticket.safetensors", REPORT, SUMS_FILE))


def _formats(
    model: keras.Model, options: Options
) -> Mapping[str, tuple[str, Callable[[Path], object], Callable[[Path, Inputs], Call]]]:
    """Returns the path of each format, and functions that write and load it."""
    samples, threads = options.sample_inputs, options.threads

    def saved_model(values: str) -> Callable[[Path], object]:
        return lambda path: serving.export_sparse_saved_model(
            model,
            path,
            values=values,
            tolerance=options.tolerance,
            sample_inputs=samples,
            level=options.level,
            include=options.include,
        )

    torch = functools.partial(
        ml.export_sparse_torch,
        batch_size=options.batch_size,
        threads=threads,
        sample_inputs=samples,
    )
    return {
        **{
            f"SavedModel {values}": (values, saved_model(values), _load_saved_model)
            for values in _SAVED_MODELS
        },
        "ONNX": (
            "model.onnx",
            lambda path: ml.export_sparse_onnx(model, path, sample_inputs=samples),
            functools.partial(_load_onnx, threads=threads),
        ),
        "ONNX int8": (
            "int8.onnx",
            lambda path: ml.export_sparse_onnx(
                model, path, values="int8", tolerance=options.tolerance, sample_inputs=samples
            ),
            functools.partial(_load_onnx, threads=threads),
        ),
        "TorchScript": (
            "model.pt",
            lambda path: torch(model, path),
            functools.partial(_load_torch, threads=threads),
        ),
        "LiteRT sparse": (
            "model.tflite",
            lambda path: _write_litert(model, path, "EXPERIMENTAL_SPARSITY"),
            functools.partial(_load_litert, threads=threads),
        ),
        "LiteRT int8": (
            "int8.tflite",
            lambda path: _write_litert(model, path, "DEFAULT"),
            functools.partial(_load_litert, threads=threads),
        ),
        "ticket": ("ticket.safetensors", lambda path: ml.save_ticket(model, path), _load_ticket),
    }


def _write_litert(model: keras.Model, path: Path, optimization: str) -> None:
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError("LiteRT's converter needs TensorFlow.") from error
    masked = any(ref.mask is not None for ref in ml.weight_refs(model))
    plain = ml.strip_masks(model) if masked else model
    optimizations = [getattr(tf.lite.Optimize, optimization)]
    plain.export(path, format="litert", optimizations=optimizations, verbose=False)


def _load_saved_model(path: Path, inputs: Inputs) -> Call:
    import tensorflow as tf

    served = tf.saved_model.load(str(path))
    tensors = keras.tree.map_structure(tf.constant, inputs)
    return lambda: served.serve(*tensors)


def _load_onnx(path: Path, inputs: Inputs, threads: int | None) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or 0
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [source.name for source in session.get_inputs()]
    return lambda: session.run(None, dict(zip(names, keras.tree.flatten(inputs), strict=True)))


def _load_torch(path: Path, inputs: Inputs, threads: int | None) -> Call:
    import torch

    program = torch.jit.load(str(path))
    tensors = [torch.from_numpy(x) for x in keras.tree.flatten(inputs)]

    def call() -> Any:
        before = torch.get_num_threads()
        torch.set_num_threads(threads or before)
        try:
            with torch.inference_mode():
                return keras.tree.map_structure(lambda x: x.numpy(), program(*tensors))
        finally:
            torch.set_num_threads(before)

    return call


def _load_litert(path: Path, inputs: Inputs, threads: int | None) -> Call:
    import tensorflow as tf

    inputs = keras.tree.flatten(inputs)
    if len(inputs) != 1:
        raise NotImplementedError("LiteRT files are measured for models with one input.")
    interpreter = tf.lite.Interpreter(str(path), num_threads=threads)
    (source,) = interpreter.get_input_details()
    interpreter.resize_tensor_input(source["index"], inputs[0].shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(source["index"], inputs[0])
    targets = [target["index"] for target in interpreter.get_output_details()]

    def call() -> list[np.ndarray]:
        interpreter.invoke()
        return [interpreter.get_tensor(target) for target in targets]

    return call


def _load_ticket(path: Path, inputs: Inputs) -> Call:
    model = ml.load_ticket(path)
    return lambda: inferred(model, *inputs)
