"""Checks the arguments of an export and makes its job."""

from __future__ import annotations

import importlib.util
import numbers
import os
from pathlib import Path
from typing import Any

import keras

from masked_layers import _keras
from masked_layers.conversion import without_masks
from masked_layers.serving import outputs_of, samples_of
from masked_layers.shrinking import shrink as smaller
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.report import TorchReport


def prepare(
    model: keras.Model,
    *,
    batch_size: int,
    threads: int | None,
    timings: TorchReport | str | os.PathLike[str] | None,
    shrink: bool,
    sample_inputs: Any,
) -> tuple[keras.Model, Job]:
    """Returns the plain model whose program is made, and the job.

    The arguments are those of `export_sparse_torch`, and so are the errors about them.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    counts: dict[str, object] = {
        "batch_size": batch_size,
        "threads": 1 if threads is None else threads,
    }
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, numbers.Integral) or count < 1:
            raise ValueError(f"`{name}` must be a positive integer. Received: {count!r}")
    if importlib.util.find_spec("torch") is None:
        raise ImportError(
            "A TorchScript program requires PyTorch, which is not installed: "
            "`pip install torch`, or `pip install lottery-ticket-pruner[torch]`."
        )
    earlier = _earlier(timings)
    specs = _keras.export_specs(model)
    arguments = samples_of(model, specs, sample_inputs)
    if any(array.dtype == object for array in keras.tree.flatten(arguments)):
        raise NotImplementedError("The model has text as input, which TorchScript cannot hold.")
    expected, _ = outputs_of(model, arguments, given=sample_inputs is not None)
    plain = smaller(model) if shrink else without_masks(model)
    lengths = [spec.shape for spec in keras.tree.flatten(specs)]
    fixed = [x.shape[0] for x in getattr(model, "inputs", None) or () if x.shape]
    job = Job(
        arguments=arguments,
        expected=expected,
        batch_size=int(batch_size),
        threads=None if threads is None else int(threads),
        timings=earlier,
        free_batch=all(size is None for size in fixed),
        free_axes=any(None in shape[1:] for shape in lengths),
    )
    return plain, job


def _earlier(timings: Any) -> TorchReport | None:
    if timings is None or isinstance(timings, TorchReport):
        return timings
    if not isinstance(timings, str | os.PathLike):
        raise TypeError(
            "`timings` must be a report of `export_sparse_torch` or the path of its JSON file. "
            f"Received: {timings!r}"
        )
    try:
        return TorchReport.from_json(Path(timings).read_bytes())
    except ValueError as error:
        raise ValueError(f"'{timings}': {error}") from error
