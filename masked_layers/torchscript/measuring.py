"""Measures the products of a Keras model on the torch backend for several sparsities."""

from __future__ import annotations

import functools

import keras

from masked_layers.torchscript import timing
from masked_layers.torchscript.costs import ProductCosts, ProgramCosts
from masked_layers.torchscript.job import Job
from masked_layers.torchscript.program import dense_program, recorded


def measure(model: keras.Model, job: Job) -> ProgramCosts:
    """Measures the program of a model, and all products with a weight, for the job's sparsities.

    Args:
        model: A plain model on the torch backend and on the CPU.
        job: How it is measured.

    Raises:
        NotImplementedError: If the model cannot be written as TorchScript.
    """
    sparsities = job.sparsities or ()
    with recorded(model, job, sparse_from=0.0) as (calls, run, batch, threads):
        found = timing.seconds_at(calls, run, sparsities) if sparsities else {}
        program = dense_program(model, calls, batch)
        seconds = timing.program_seconds({timing.DENSE: functools.partial(program, *batch)})
    products = tuple(
        ProductCosts(site.constant.paths, dense, tuple(sparse))
        for site, (dense, sparse) in found.items()
    )
    return ProgramCosts(sparsities, products, seconds[timing.DENSE], threads)
