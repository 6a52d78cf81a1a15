"""Measures how much each kernel may lose alone, and derives sparsities of layers from it."""

import dataclasses
import itertools
import math
import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import training
from lottery_ticket_pruner.compression.allocation import count_of
from lottery_ticket_pruner.compression.parts import sample_of
from lottery_ticket_pruner.tolerances import Metric
from lottery_ticket_pruner.training import Arrays
from lottery_ticket_pruner.variables import read

# Shares of the kept entries of a weight that are kept. The last one is followed by one entry.
DENSITIES = (0.5, 0.25, 0.125, 0.0625, 0.03125)
EXAMPLES = 512


@dataclasses.dataclass(frozen=True)
class Scan:
    """The results of pruning each weight of a model alone.

    Attributes:
        rows: One dict for each attempt: `path`, `density` (share of the entries that were kept
            before), `kept` (number of entries), `value` (the metric), `drop` and `loss` (both less
            those of the unpruned model, where more is worse).
        examples: Number of examples that it was measured on.
        complete: Whether there was enough time for all weights.
    """

    rows: list[dict[str, Any]]
    examples: int
    complete: bool


def scan(model: keras.Model, pair: tuple[Arrays, Arrays], metric: Metric, seconds: float) -> Scan:
    """Prunes each masked weight alone, by magnitude and without training, and measures the model.

    Args:
        model: A compiled masked model. It is left as it was.
        pair: Inputs and targets, of which at most 512 examples are used.
        metric: The metric of `value` and `drop`.
        seconds: Time after which no further weight is begun.
    """
    started = time.perf_counter()
    x, y = sample_of(pair, EXAMPLES)
    examples = len(keras.tree.flatten(x)[0])
    dense = training.evaluate(model, x, y)
    rows: list[dict[str, Any]] = []
    refs = ml.masked_refs(model)
    for ref in refs:
        if time.perf_counter() - started > seconds:
            return Scan(rows, examples, complete=False)
        mask = ref.mask.to_numpy()
        order = _from_largest(read(ref.variable), mask)
        try:
            for kept in _counts(len(order)):
                alone = np.zeros(mask.size, bool)
                alone[order[:kept]] = True
                ml.set_masks(model, {ref.path: alone.reshape(mask.shape)})
                results = training.evaluate(model, x, y)
                rows.append(
                    {
                        "path": ref.path,
                        "density": kept / len(order),
                        "kept": kept,
                        "value": float(results[metric.name]),
                        "drop": metric.drop(float(dense[metric.name]), float(results[metric.name])),
                        "loss": float(results["loss"]) - float(dense["loss"]),
                    }
                )
        finally:
            ml.set_masks(model, {ref.path: mask})
    return Scan(rows, examples, complete=True)


def sparsities(
    rows: Sequence[Mapping[str, Any]], masks: Mapping[str, np.ndarray], density: float
) -> dict[str, float]:
    """Returns the sparsity of each weight by pattern, as an argument of `update_masks`.

    Args:
        rows: Rows of a complete scan of the same model.
        masks: Masks by path. Pruned entries stay pruned.
        density: Share of all entries to keep.
    """
    curves = {path: curve([row for row in rows if row["path"] == path]) for path in masks}
    alive = {path: int(mask.sum()) for path, mask in masks.items()}
    size = sum(mask.size for mask in masks.values())
    count = min(max(count_of(size, density), sum(map(bool, alive.values()))), sum(alive.values()))
    return {
        f"^{re.escape(path)}$": 1 - kept / masks[path].size
        for path, kept in kept_counts(curves, alive, count).items()
    }


def curve(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Returns pairs of kept entries and a rise of the loss, from the densest on.

    The rise is the lower convex hull over the number of pruned entries of what was measured, which
    may have fallen by chance. The densest pair has no rise.
    """
    if not rows:
        return []
    points = [(round(rows[0]["kept"] / rows[0]["density"]), 0.0)]
    for row in rows:
        rise = row["loss"] if math.isfinite(row["loss"]) else 1e9
        if row["kept"] < points[-1][0]:
            points.append((row["kept"], max(rise, points[-1][1])))
    hull: list[tuple[int, float]] = []
    for point in points:
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def kept_counts(
    curves: Mapping[str, Sequence[tuple[int, float]]], alive: Mapping[str, int], count: int
) -> dict[str, int]:
    """Returns how many entries of each weight to keep, so that the sum of all rises is least.

    Sections of the curves are pruned in the order of their slopes, which is optimal because the
    curves are convex. Each weight keeps an entry, if it has any.

    Args:
        curves: Pairs of kept entries and a rise by path, as `curve` returns them.
        alive: Number of entries that are still kept by path.
        count: Number of entries to keep.
    """
    kept = dict(alive)
    sections = [
        (_slope(start, end), path, end[0])
        for path, points in curves.items()
        for start, end in itertools.pairwise(points)
    ]
    left = sum(kept.values()) - count
    # Stable, so that of equal slopes the denser section of a weight comes first.
    for _, path, end in sorted(sections, key=lambda section: section[0]):
        pruned = min(left, max(kept[path] - end, 0))
        kept[path] -= pruned
        left -= pruned
    return kept


def _slope(start: tuple[int, float], end: tuple[int, float]) -> float:
    return (end[1] - start[1]) / (start[0] - end[0])


def _counts(alive: int) -> list[int]:
    """Returns the numbers of entries to keep of so many, from the largest to one."""
    counts = dict.fromkeys([*(math.ceil(share * alive) for share in DENSITIES), 1])
    return [count for count in counts if count < alive]


def _from_largest(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the indices of kept entries in order of their magnitude."""
    kept = np.flatnonzero(mask)
    sizes = np.abs(values.reshape(-1)[kept].astype("float64"))
    return kept[np.argsort(-sizes, kind="stable")]
