"""Compares a global mask update with `numpy.partition` on the same numbers.

`python -m benchmarks.ranking` prints seconds (median over alternating repeats in one process),
their ratio, and the peak of memory that the update adds, in multiples of the weights' own bytes.
"""

import argparse
import statistics
import time
import tracemalloc

import numpy as np

from lottery_ticket_pruner import selection

LAYERS = 10
RATE = 0.2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=25_000_000, help="number of weights")
    parser.add_argument("--repeats", type=int, default=7, help="how often each one is timed")
    parser.add_argument("--criterion", default="large_final", help="what ranks the weights")
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

    def partition():
        np.partition(magnitudes, drop - 1)

    def first_update():
        return selection.update(args.criterion, kernels, rate=RATE, scope="global")

    pruned = {
        path: selection.Weights(
            initial=kernel.initial, final=kernel.final, current=kernel.current, mask=mask
        )
        for (path, mask), kernel in zip(first_update().items(), kernels.values(), strict=True)
    }

    def second_update():
        return selection.update(args.criterion, pruned, rate=RATE, scope="global")

    rows = {"numpy.partition": partition, "update": first_update, "second update": second_update}
    seconds = {name: [] for name in rows}
    for _ in range(args.repeats):
        for name, function in rows.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)

    print(f"{args.criterion}, global, rate {RATE}, {size:,} float32 weights in {LAYERS} kernels")
    baseline = statistics.median(seconds["numpy.partition"])
    for name, function in rows.items():
        tracemalloc.start()
        function()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        median = statistics.median(seconds[name])
        print(
            f"{name:16} {median:7.3f} s ({min(seconds[name]):.3f}..{max(seconds[name]):.3f})"
            f"  ratio {median / baseline:5.2f}"
            f"  peak {peak / 2**20:6.0f} MiB = {peak / (4 * size):.2f} x weights"
        )


if __name__ == "__main__":
    main()
