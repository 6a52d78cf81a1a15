"""Compares global mask updates, for every criterion on records, with `numpy.partition`.

`python -m benchmarks.ranking` prints seconds (median over alternating repeats in one process),
their ratio, and the peak memory that the update adds, as a multiple of the size of the weights.
It measures only the ranking of arrays; `python -m benchmarks ranking` measures `update_masks`.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np

from lottery_ticket_pruner import criteria, selection

LAYERS = 10
RATE = 0.2


def main() -> None:
    known = [name for name in criteria.names() if not criteria.get(name).evidence]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("criteria", nargs="*", default=known, help="default: all on records")
    parser.add_argument("--size", type=int, default=25_000_000, help="number of weights")
    parser.add_argument("--repeats", type=int, default=5, help="number of timings per criterion")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    shape = (args.size // LAYERS,)
    kernels = {}
    for i in range(LAYERS):
        initial = rng.standard_normal(shape, dtype=np.float32)
        final = initial + rng.standard_normal(shape, dtype=np.float32) / 4
        kernels[f"dense_{i}/kernel"] = selection.Weights(
            initial=initial, final=final, current=final, mask=np.ones(shape, dtype=bool)
        )
    size = LAYERS * shape[0]
    magnitudes = np.abs(np.concatenate([kernel.final for kernel in kernels.values()]))
    drop = selection.drop_count(size, size, rate=RATE)
    print(f"global, rate {RATE}, {size:,} float32 weights in {LAYERS} kernels")
    for criterion in args.criteria:
        seconds: dict[str, list[float]] = {"partition": [], "update": []}
        for _ in range(args.repeats):
            start = time.perf_counter()
            np.partition(magnitudes, drop - 1)
            seconds["partition"].append(time.perf_counter() - start)
            start = time.perf_counter()
            selection.update(criterion, kernels, rate=RATE, scope="global")
            seconds["update"].append(time.perf_counter() - start)
        tracemalloc.start()
        selection.update(criterion, kernels, rate=RATE, scope="global")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
        print(
            f"{criterion:28} {statistics.median(seconds['update']):7.3f} s, partition "
            f"{statistics.median(seconds['partition']):.3f} s, ratio "
            f"{statistics.median(ratios):5.2f} ({min(ratios):.2f}..{max(ratios):.2f}), peak "
            f"{peak / (4 * size):.2f} x weights",
            flush=True,
        )


if __name__ == "__main__":
    main()
