"""Measures what would be served of a model, without writing a file, from every backend."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras

from masked_layers.files import temporary_folder
from masked_layers.torchscript import process
from masked_layers.torchscript.costs import ProgramCosts
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.preparation import prepare
from masked_layers.torchscript.report import TorchReport

_SETTINGS: dict[str, Any] = {
    "threads": None,
    "timings": None,
    "shrink": False,
    "sample_inputs": None,
}


def program_costs(
    model: keras.Model, sparsities: Sequence[float], *, batch_size: int
) -> ProgramCosts:
    """Measures the dense TorchScript program of a model, and its products at several sparsities.

    Args:
        model: A built model, masked or plain.
        sparsities: Sparsities in ascending order; with none, only the program is measured.
        batch_size: Number of rows.

    Raises:
        ImportError, NotImplementedError, RuntimeError, TypeError, ValueError: As in
            `export_sparse_torch`.
    """
    with _prepared(model, batch_size) as (plain, job, folder):
        return process.costs(plain, job, sparsities, folder)


def program_report(model: keras.Model, *, batch_size: int) -> TorchReport:
    """Returns the report that `export_sparse_torch` would return, without keeping the file.

    Args:
        model: A built model, masked or plain.
        batch_size: Number of rows.

    Raises:
        ImportError, NotImplementedError, RuntimeError, TypeError, ValueError: As in
            `export_sparse_torch`.
    """
    with _prepared(model, batch_size) as (plain, job, folder):
        return process.run(plain, job, folder)


@contextlib.contextmanager
def _prepared(model: keras.Model, batch_size: int) -> Iterator[tuple[keras.Model, Job, Path]]:
    """Yields the plain model, the job and a temporary folder for its files."""
    plain, job = prepare(model, batch_size=batch_size, **_SETTINGS)
    with temporary_folder() as folder:
        yield plain, job, folder
