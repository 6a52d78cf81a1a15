"""Exports a model as a TorchScript file, from every backend."""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import keras

from masked_layers import files
from masked_layers.torchscript import process
from masked_layers.torchscript.preparation import prepare
from masked_layers.torchscript.report import TorchReport


def export_sparse_torch(
    model: keras.Model,
    path: str | os.PathLike[str],
    *,
    batch_size: int = 1,
    threads: int | None = None,
    timings: TorchReport | str | os.PathLike[str] | None = None,
    shrink: bool = False,
    sample_inputs: Any = None,
) -> TorchReport:
    """Exports a model as a TorchScript file that runs its pruned weights with sparse kernels.

    PyTorch alone loads the file with `torch.jit.load`, in Python or C++, and runs it on the CPU;
    neither Keras nor this library is needed. It is called like the model, with tensors, and accepts
    every batch size.

    Each product with a pruned weight (in Dense, EinsumDense, attention, convolutions, recurrent
    cells and custom layers) uses PyTorch's CSR product or stays dense, whichever is faster. Both
    are measured where the model calls them, and the whole program with sparse kernels is compared
    with the dense one, so that the file is not slower than a dense file. Weights that stay dense
    are stored without their zeros and decoded at loading.

    The new file is loaded and compared with the model before it replaces an existing one. If
    anything fails, the existing file is unchanged.

    Args:
        model: A built model, either masked, or plain with zeros in its kernels.
        path: File to write, such as `"model.pt"`. The report is written next to it, as
            `"model.pt.json"`.
        batch_size: Number of rows for which kernels are chosen.
        threads: Number of threads for which kernels are chosen. Default: PyTorch's default.
        timings: The report of an earlier export of the same model, or the path of its JSON file.
            Kernels are then chosen by its times, without measuring, so that exports can be
            repeated.
        shrink: Whether to remove channels without effect first, as `masked_layers.shrink` does.
        sample_inputs: Inputs for comparing outputs and for measuring, with at least one row, in the
            forms that `predict` accepts. Default: seeded random numbers, zeros and ones for
            integers. Axes without a fixed length should have the length that will be served.

    Returns:
        The report.

    Raises:
        ImportError: If PyTorch is missing.
        IsADirectoryError: If `path` is a folder.
        NotImplementedError: If a call of the model changes its variables, or PyTorch cannot trace
            it, such as one with outputs in lists inside a dict.
        RuntimeError: If the outputs of the written file differ from those of the model.
        TypeError: If `model` is not a Keras model, or an argument has another type than listed
            above.
        ValueError: If an argument is invalid, the model is not built, or `timings` belongs to
            another model.

    Warns:
        UserWarning: If the file accepts only the lengths of the sample inputs along axes for which
            the model has no fixed length.
    """
    path = Path(path).resolve()
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder. Expected the path of a file.")
    plain, job = prepare(
        model,
        batch_size=batch_size,
        threads=threads,
        timings=timings,
        shrink=shrink,
        sample_inputs=sample_inputs,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.temporary_folder() as folder:
        report = process.run(plain, job, folder)
        with (
            open(folder / process.FILE, "rb") as source,
            files.replacing(path) as target,
        ):
            shutil.copyfileobj(source, target)
    with files.replacing(path.with_name(f"{path.name}.json")) as target:
        target.write(report.to_json())
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return report
