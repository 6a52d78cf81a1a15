"""Chooses kernels by measured times."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from masked_layers.torchscript.calls import Calls, Site
from masked_layers.torchscript.costs import GAIN
from masked_layers.torchscript.storage import csr_of_dense
from masked_layers.turns import alternate, seconds_per_call

KERNELS = {"csr": 0, "csr/32": 32}
"""Sparse kernels and the number of columns that each multiplies at a time; 0 for all."""

DENSE = "dense"

_LIMITS: dict[str, Any] = {"seconds": 20.0, "rounds": (5, 25), "warm": 2}
"""Time for measuring, bounds for the number of rounds, and rounds that are not counted: TorchScript
optimizes a module in its first two calls."""


def kernel(
    site: Site, name: str, rows_first: bool = False, weight: torch.Tensor | None = None
) -> torch.nn.Module:
    """Returns the compiled module of a sparse kernel, for the weight of a site or another one."""
    weight = site.constant.tensor if weight is None else weight
    matrix = csr_of_dense(site.operation.matrix(weight))
    return torch.jit.script(site.operation.module(matrix, KERNELS[name], rows_first))


def fastest(seconds: Mapping[str, float], gain: float = GAIN) -> str:
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
    return _in_passes(calls, run, modules)


def seconds_at(
    calls: Calls, run: Callable[[], Any], sparsities: Sequence[float]
) -> dict[Site, tuple[float, list[float]]]:
    """Measures, at every site, the dense kernel and the fastest sparse one for several sparsities.

    Each sparse kernel has the entries of the weight with the largest magnitudes. Sites with equal
    operations on weights and inputs of equal shapes get the same times, the averages of theirs.

    Returns:
        Median seconds of all calls of a site in one pass: dense, and for each sparsity.
    """
    shapes: dict[Site, list[tuple[int, ...]]] = defaultdict(list)

    def note(site: Site, x: torch.Tensor, dense: Callable[[], Any]) -> Any:
        shapes[site].append(tuple(x.shape))
        return dense()

    calls.compute = note
    run()
    modules: dict[tuple[str, float], dict[Site, torch.nn.Module]] = {
        (name, sparsity): {
            site: kernel(site, name, weight=_largest(site.constant.tensor, sparsity))
            for site in shapes
        }
        for name in KERNELS
        for sparsity in sparsities
    }
    measured = _in_passes(calls, run, modules)
    alike: dict[Any, list[Site]] = defaultdict(list)
    for site, inputs in shapes.items():
        key = site.operation, tuple(site.constant.tensor.shape), tuple(inputs)
        alike[key].append(site)
    found: dict[Site, tuple[float, list[float]]] = {}
    for sites in alike.values():

        def fastest_of(names: list[Any], sites: list[Site] = sites) -> float:
            return statistics.mean(min(measured[site][name] for name in names) for site in sites)

        sparse = [fastest_of([(name, sparsity) for name in KERNELS]) for sparsity in sparsities]
        found |= dict.fromkeys(sites, (fastest_of([DENSE]), sparse))
    return found


def _largest(weight: torch.Tensor, sparsity: float) -> torch.Tensor:
    """Returns a weight with zeros in place of a share of its smallest entries, and only of these.

    Other zeros, which a sparse matrix would leave out, become ones.
    """
    keep = max(1, round((1 - sparsity) * weight.numel()))
    places = weight.abs().flatten().topk(keep, sorted=False).indices
    sparse = torch.zeros(weight.numel(), dtype=weight.dtype)
    largest = weight.flatten()[places]
    sparse[places] = torch.where(largest == 0, torch.ones_like(largest), largest)
    return sparse.reshape(weight.shape)


def _in_passes(
    calls: Calls, run: Callable[[], Any], modules: Mapping[Any, Mapping[Site, torch.nn.Module]]
) -> dict[Site, dict[Any, float]]:
    """Measures modules at all sites in alternating passes, as `site_seconds` returns them."""

    def passed(name: Any) -> dict[Site, float]:
        spent: dict[Site, float] = defaultdict(float)

        def compute(site: Site, x: torch.Tensor, dense: Callable[[], Any]) -> Any:
            start = _clock()
            result = dense() if name == DENSE else modules[name][site](x)
            spent[site] += _clock() - start
            return result

        calls.compute = compute
        run()
        return spent

    passes = {str(name): functools.partial(passed, name) for name in (DENSE, *modules)}
    rounds = alternate(passes, **_LIMITS)
    return {
        site: {
            name: statistics.median(spent[site] for spent in rounds[str(name)])
            for name in (DENSE, *modules)
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
