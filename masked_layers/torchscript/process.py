"""Runs an export on the torch backend: in this process if possible, otherwise in a new one."""

from __future__ import annotations

import builtins
import dataclasses
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import keras
import ml_dtypes  # Makes NumPy know the names of more dtypes.  # noqa: F401
import numpy as np

from masked_layers import _keras
from masked_layers.devices import computes_on_cpu
from masked_layers.keras_files import reason_of
from masked_layers.torchscript.costs import ProgramCosts
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.report import TorchReport

FILE = "model.pt"
"""Name of the TorchScript file in the folder of a job."""

_MODEL, _ARRAYS, _JOB = "model.keras", "arrays.npz", "job.json"
_REPORT, _ERROR = "report.json", "error.json"
_FIELDS = ("batch_size", "threads", "free_batch", "free_axes", "sparsities")

_CHILD = "import sys; sys.path[:] = {path!r}; from masked_layers.torchscript import process; "
_CHILD += "process.main({folder!r})"


def run(model: keras.Model, job: Job, folder: Path) -> TorchReport:
    """Writes the TorchScript file of a plain model into a folder.

    Raises:
        NotImplementedError: If the model cannot be written as TorchScript.
        RuntimeError: If the outputs of the file differ, or the new process fails.
        ValueError: If the job has the times of another model.
    """
    if _here():
        return _build(model, job, folder)
    return TorchReport.from_json(_in_child(model, job, folder))


def costs(model: keras.Model, job: Job, sparsities: Sequence[float], folder: Path) -> ProgramCosts:
    """Measures the products of a plain model for several sparsities, with an empty folder.

    Raises:
        NotImplementedError: If the model cannot be written as TorchScript.
        RuntimeError: If the new process fails.
    """
    job = dataclasses.replace(job, sparsities=tuple(sparsities))
    if _here():
        return _measure(model, job)
    return ProgramCosts.from_json(_in_child(model, job, folder))


def _in_child(model: keras.Model, job: Job, folder: Path) -> bytes:
    """Runs a job in a new process, and returns what it reports, as JSON."""
    model.save(folder / _MODEL)
    arrays = {f"argument{i}": x for i, x in enumerate(keras.tree.flatten(job.arguments))}
    arrays |= {f"output{i}": x for i, x in enumerate(job.expected)}
    dtypes = {name: array.dtype.name for name, array in arrays.items()}
    # NumPy writes bfloat16 as bytes of no type.
    bits = {name: x.view(f"u{x.itemsize}") for name, x in arrays.items() if x.dtype.kind == "V"}
    np.savez(folder / _ARRAYS, **(arrays | bits))
    timings = None if job.timings is None else job.timings.to_json().decode()
    fields = {name: getattr(job, name) for name in _FIELDS}
    text = json.dumps({**fields, "timings": timings, "dtypes": dtypes})
    (folder / _JOB).write_text(text, "utf-8")
    environment = {
        "KERAS_BACKEND": "torch",
        "KERAS_TORCH_DEVICE": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", _CHILD.format(path=sys.path, folder=str(folder))],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if (folder / _ERROR).is_file():
        name, message = json.loads((folder / _ERROR).read_text("utf-8"))
        raise getattr(builtins, name, RuntimeError)(message)
    if result.returncode:
        raise RuntimeError(
            f"The process that writes the TorchScript file ended with {result.returncode}. The end "
            f"of its messages:\n{result.stderr[-2000:]}"
        )
    return (folder / _REPORT).read_bytes()


def main(folder: str) -> None:
    """Runs the job in a folder, in the process that `run` starts."""
    place = Path(folder)
    try:
        model = _loaded(place / _MODEL)
        fields = json.loads((place / _JOB).read_text("utf-8"))
        text = fields.pop("timings")
        timings = None if text is None else TorchReport.from_json(text.encode())
        dtypes = fields.pop("dtypes")
        with np.load(place / _ARRAYS) as arrays:
            leaves, expected = (
                [arrays[name].view(dtypes[name]) for name in arrays if name.startswith(kind)]
                for kind in ("argument", "output")
            )
        arguments = keras.tree.pack_sequence_as(list(_keras.export_specs(model)), leaves)
        job = Job(arguments, expected, timings=timings, **fields)
        report: TorchReport | ProgramCosts
        report = _build(model, job, place) if job.sparsities is None else _measure(model, job)
    except Exception as error:
        name = type(error).__name__ if hasattr(builtins, type(error).__name__) else "RuntimeError"
        (place / _ERROR).write_text(json.dumps([name, str(error)]), "utf-8")
        traceback.print_exc()
        sys.exit(1)
    (place / _REPORT).write_bytes(report.to_json())


def _loaded(path: Path) -> keras.Model:
    try:
        # The file was written by this library a moment ago, so the code in it is the user's.
        return keras.saving.load_model(path, compile=False, safe_mode=False)
    except Exception as error:  # Keras and the layers of users raise any error.
        raise ValueError(
            "A new process, with Keras on PyTorch, cannot load the model. Its custom layers and "
            "functions must be in modules that can be imported (not in `__main__`) and use "
            f"`keras.ops`. {reason_of(error)}"
        ) from error


def _build(model: keras.Model, job: Job, folder: Path) -> TorchReport:
    from masked_layers.torchscript import program

    content, report = program.build(model, job)
    (folder / FILE).write_bytes(content)
    return report


def _measure(model: keras.Model, job: Job) -> ProgramCosts:
    from masked_layers.torchscript import measuring

    return measuring.measure(model, job)


def _here() -> bool:
    """Returns whether this process can run the job itself."""
    return keras.backend.backend() == "torch" and computes_on_cpu()
