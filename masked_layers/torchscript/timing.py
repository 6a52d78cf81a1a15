"""Chooses kernels by measured times."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from masked_layers.torchscript.calls import Calls, Site
from masked_layers.torchscript.storage import csr_of_dense
from masked_layers.turns import alternate, seconds_per_call

KERNELS = {"csr": 0, "csr/32": 32}
"""Sparse kernels and the number of columns that each multiplies at a time; 0 for all."""

DENSE = "dense"

_GAIN = 0.95
"""A sparse kernel must take less than this share of the dense time."""

_LIMITS: dict[str, Any] = {"seconds": 20.0, "rounds": (5, 25), "warm": 2}
"""Time for measuring, bounds for the number of rounds, and rounds that are not counted: TorchScript
optimizes a module in its first two calls."""


def kernel(site: Site, name: str, rows_first: bool = False) -> torch.nn.Module:
    """Returns the compiled module of a sparse kernel."""
    matrix = csr_of_dense(site.operation.matrix(site.constant.tensor))
    return torch.jit.script(site.operation.module(matrix, KERNELS[name], rows_first))


def fastest(seconds: Mapping[str, float], gain: float = _GAIN) -> str:
    """Returns the fastest sparse alternative, or `"dense"` if none gains enough."""
    sparse = min((name for name in seconds if name != DENSE), key=seconds.__getitem__)
    return sparse if seconds[sparse] < gain * seconds[DENSE] else DENSE


def site_seconds(calls: Calls, run: Callable[[], Any]) -> dict[Site, dict[str, float]]:
    """Measures every kernel at every site, where the model calls it.

    In alternating passes through the model, all sites use the same kernel, so that inputs are as
    far away in the caches, and have the same layout, as in the exported program.

    Returns:
        The median time of all calls of a site in one pass, by kernel.
    """
    modules = {
        name: {site: kernel(site, name) for site in calls.sites.values()} for name in KERNELS
    }

    def passed(name: str) -> dict[Site, float]:
        spent: dict[Site, float] = defaultdict(float)

        def compute(site: Site, x: torch.Tensor, dense: Callable[[], Any]) -> Any:
            start = _clock()
            result = dense() if name == DENSE else modules[name][site](x)
            spent[site] += _clock() - start
            return result

        calls.compute = compute
        run()
        return spent

    passes = {name: functools.partial(passed, name) for name in (DENSE, *KERNELS)}
    rounds = alternate(passes, **_LIMITS)
    return {
        site: {
            name: statistics.median(spent[site] for spent in passes)
            for name, passes in rounds.items()
        }
        for site in calls.sites.values()
    }


def program_seconds(programs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Returns the median time of each program, called in turns."""
    rounds = seconds_per_call(programs, clock=_clock, **_LIMITS)
    return {name: statistics.median(seconds) for name, seconds in rounds.items()}


def _clock() -> float:
    # The time of one thread does not contain that of other processes on a busy machine.
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()
