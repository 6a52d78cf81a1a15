"""Export jobs, which can be handed to another process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from masked_layers.torchscript.report import TorchReport


@dataclass(frozen=True)
class Job:
    """Inputs, expected outputs and settings of one export.

    Attributes:
        arguments: Arguments of a call of the model.
        expected: The outputs for them, flat.
        batch_size: Number of rows for which kernels are chosen.
        threads: Number of threads for which they are chosen; None for the default.
        timings: An earlier report, from whose times they are chosen without measuring.
        free_batch: Whether the file must accept any number of rows.
        free_axes: Whether other axes of an input have no fixed length.
        sparsities: Sparsities for which kernels are measured, in place of writing a file; or None.
    """

    arguments: list[Any]
    expected: list[np.ndarray]
    batch_size: int
    threads: int | None
    timings: TorchReport | None
    free_batch: bool
    free_axes: bool
    sparsities: tuple[float, ...] | None = None
