"""Codes of one byte for weights: 8-bit integers with a scale, and numbers of values in a codebook.

Depends only on NumPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Coded", "clustered", "scaled"]

_BINS, _GROUPS = 1024, 512
_MOST_STEPS = 100


@dataclass(frozen=True, eq=False)
class Coded:
    """An array whose values are replaced by codes of one byte. Code 0 means exactly 0.

    Attributes:
        coding: `"scales"`: a value is its code (int8) times the scale of its output channel, the
            index on the last axis. `"codebook"`: its code (uint8) is its position in the table.
        codes: Codes, in the shape of the array.
        table: The scales, one for each index on the last axis, or the values of the codebook, of
            which the first is 0; float32.
    """

    coding: Literal["scales", "codebook"]
    codes: np.ndarray
    table: np.ndarray

    @property
    def label(self) -> str:
        """`"int8"`, or for example `"codebook-5"` for a codebook of up to 32 values."""
        if self.coding == "scales":
            return "int8"
        return f"codebook-{max(1, int(len(self.table) - 1).bit_length())}"

    def values(self) -> np.ndarray:
        """Returns the decoded array, float32.

        Raises:
            ValueError: If a code is not in the codebook.
        """
        if self.coding == "scales":
            return self.codes.astype(np.float32) * self.table
        if self.codes.max(initial=0) >= max(len(self.table), 1):
            raise ValueError(
                f"The packed file is malformed: a code of {self.codes.max()} for a codebook of "
                f"{len(self.table)} values."
            )
        table = self.table if len(self.table) else np.zeros(1, np.float32)
        return table[self.codes]


def scaled(array: np.ndarray) -> Coded:
    """Codes an array by integers from -127 to 127 with one scale per output channel (last axis).

    A scale is the largest magnitude of its channel divided by 127, rounded up to 8 significant
    bits, which halves the bytes of the scales. Values are rounded to the nearest multiple of the
    scale, so that values smaller than half of it become exact zeros. A channel whose values are
    multiples of a scale already, by codes up to 127 or 7 (`convert_to_masked(quantize=...)`), keeps
    them.

    Args:
        array: Finite floating-point numbers, with at least one axis.
    """
    array = array.astype(np.float64)
    largest = np.abs(array).max(axis=tuple(range(array.ndim - 1)), initial=0.0)
    bits = (largest / 127).astype(np.float32)
    bits = np.where(bits < largest / 127, np.nextafter(bits, np.float32(np.inf)), bits)
    bits = (bits.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)
    # TensorFlow computes with 0 instead of smaller numbers.
    smallest = np.finfo(np.float32).tiny
    scales = np.where(largest > 0, np.maximum(bits.view(np.float32), smallest), np.float32(0))
    known = _scales_of_multiples(array, largest)
    scales = np.where(known > 0, known, scales)
    steps = np.divide(array, scales, out=np.zeros_like(array), where=scales > 0)
    return Coded("scales", np.rint(steps).astype(np.int8), scales.astype(np.float32))


def _scales_of_multiples(array: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """Returns the scale of each channel whose values are its multiples in float32, 0 for others."""
    exact = array.astype(np.float32).reshape(-1, array.shape[-1])
    found = np.zeros(array.shape[-1:], np.float32)
    smallest = np.finfo(np.float32).tiny
    for code in (127, 7):
        near = (largest / code).astype(np.float32)
        # The product of the scale and the code was rounded.
        for scale in (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.inf)):
            for rows in (exact[:256], exact):  # Most arrays have no such channel.
                steps = np.divide(rows, scale, out=np.zeros_like(rows), where=scale > 0)
                with np.errstate(over="ignore"):  # Infinity is none of the values.
                    multiples = np.rint(steps) * scale
                same = (scale >= smallest) & (multiples == rows).all(axis=0)
                if not same.any():
                    break
            found = np.where(same & (found == 0), scale, found)
    return found


def clustered(array: np.ndarray, bits: int) -> Coded:
    """Codes an array by a codebook of `2**bits` values: 0, and the others by k-means.

    The values minimize the sum of squared errors (Han et al., 2016,
    https://arxiv.org/abs/1510.00149, section 3): exactly by dynamic programming over groups of
    neighboring weights, and then by Lloyd's algorithm over all weights. Zeros keep code 0, and no
    other weight gets it. If an array has no more than `2**bits - 1` different non-zero values, they
    become the codebook, so that nothing is lost beyond rounding to float32.

    Args:
        array: Finite floating-point numbers of any shape.
        bits: Bits of a code, 1 to 8.
    """
    array = array.astype(np.float32)
    kept = array != 0
    ordered = np.sort(array[kept].astype(np.float64))
    count = 2**bits - 1
    centers = ordered[np.diff(ordered, prepend=-np.inf) > 0]  # The different values.
    if len(centers) > count:
        centers = _lloyd(ordered, _optimum(*_grouped(ordered), count))
    # Of centers that are equal in float32, and of a center of 0, no weight would be left.
    table = np.unique(centers.astype(np.float32)) + np.float32(0)  # No negative zero.
    codes = np.zeros(array.shape, np.uint8)
    codes[kept] = 1 + np.searchsorted(_borders(table), array[kept].astype(np.float64))
    return Coded("codebook", codes, np.concatenate([np.zeros(1, np.float32), table]))


def _grouped(ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Joins neighbors among sorted values into groups, at most about `_GROUPS`.

    Pruning leaves a gap around 0, which no group spans. The density of groups is about the cube
    root of that of the values, as for the best clusters if they are many (Panter and Dite, 1951).
    Where a few values are so large that this leaves few groups, others of equal size are added.

    Returns:
        Size and mean of each group.
    """
    numbers, edges = np.histogram(ordered, bins=_BINS)
    share = np.concatenate([[0.0], np.cumsum(np.cbrt(numbers))])
    borders = np.interp(np.arange(1, _GROUPS) / _GROUPS * share[-1], share, edges)
    starts = np.unique([0, *np.searchsorted(ordered, [*borders, 0.0])])
    starts = starts[starts < len(ordered)]
    if len(starts) < _GROUPS // 2:
        equal = np.arange(_GROUPS // 2) * len(ordered) // (_GROUPS // 2)
        starts = np.union1d(starts, equal)
    sizes = np.diff(starts, append=len(ordered))
    return sizes, np.add.reduceat(ordered, starts) / sizes


def _optimum(sizes: np.ndarray, means: np.ndarray, count: int) -> np.ndarray:
    """Returns the best `count` centers for groups of sorted values, by dynamic programming."""
    w, s, q = (
        np.concatenate([[0.0], np.cumsum(x)]) for x in (sizes, sizes * means, sizes * means**2)
    )
    total = len(sizes) + 1
    with np.errstate(divide="ignore", invalid="ignore"):
        # cost[j, i]: the sum of squares around their mean of the groups from i to j - 1. The sum of
        # q is the same however they are divided, but without it, small costs would be rounded away.
        cost = q[:, None] - q - (s[:, None] - s) ** 2 / (w[:, None] - w)
    cost[np.triu_indices(total)] = np.inf
    best, firsts, costs = cost[:, 0], [], np.empty_like(cost)
    for _ in range(min(count, len(sizes)) - 1):
        np.add(cost, best, out=costs)
        firsts.append(costs.argmin(axis=1))
        best = costs[np.arange(total), firsts[-1]]
    edges = [total - 1]
    for first in reversed(firsts):
        edges.append(int(first[edges[-1]]))
    edges = [0, *reversed(edges)]
    return np.diff(s[edges]) / np.diff(w[edges])


def _lloyd(ordered: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """Moves centers to the means of their clusters of sorted values until they are these."""
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    for _ in range(_MOST_STEPS):
        edges = np.searchsorted(ordered, _borders(centers))
        edges = np.concatenate([[0], edges, [len(ordered)]])
        counts, totals = np.diff(edges), np.diff(sums[edges])
        moved = np.where(counts > 0, totals / np.maximum(counts, 1), centers)
        if np.array_equal(moved, centers):
            break
        centers = np.sort(moved)
    return centers


def _borders(centers: np.ndarray) -> np.ndarray:
    wide = centers.astype(np.float64)
    return (wide[1:] + wide[:-1]) / 2
