"""Least squares for the kept entries of a matrix of weights."""

from __future__ import annotations

import numpy as np

# Number of operations up to which every column is solved exactly.
_EXACT = 3e10
_ITERATIONS = 50
_TOLERANCE = 1e-4
# Columns solved at once by conjugate gradients: as many as use the processor well. For all at once,
# the arrays of the method would take as much memory as `gram`.
_COLUMNS = 128


def solve(gram: np.ndarray, moments: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Returns the matrix D with this mask for which D' gram D - 2 D' moments is smallest.

    With `gram` = X'X and `moments` = X'R, this D minimizes the norm of X D - R. Each column is an
    independent problem, over its kept entries. Small problems are solved exactly, and columns with
    equal masks together. Large ones are solved for 128 columns at once, by conjugate gradients on
    the kept entries with the diagonal as preconditioner (as in ALPS), up to a residual of 1e-4 or
    for 50 steps. Every step reduces the sum above, so the result is better than zero in any case.

    Args:
        gram: Positive definite float64 array of shape (inputs, inputs).
        moments: Float64 array of shape (inputs, outputs).
        mask: Bool array of shape (inputs, outputs), True where an entry is kept.

    Returns:
        A float64 array of shape (inputs, outputs).

    Reference:
        - [Meng et al., arXiv 2406.07831](https://arxiv.org/abs/2406.07831), section 3.3
    """
    masks, member = np.unique(mask, axis=1, return_inverse=True)
    operations = (masks.sum(axis=0, dtype="float64") ** 3).sum()
    solution = np.zeros_like(moments)
    if operations > _EXACT:
        for start in range(0, mask.shape[1], _COLUMNS):
            block = slice(start, start + _COLUMNS)
            solution[:, block] = _conjugate_gradients(gram, moments[:, block], mask[:, block])
        return solution
    for number, kept in enumerate(masks.T):
        columns = np.flatnonzero(member.reshape(-1) == number)
        rows = np.flatnonzero(kept)
        if len(rows):
            part = np.linalg.solve(gram[np.ix_(rows, rows)], moments[np.ix_(rows, columns)])
            solution[np.ix_(rows, columns)] = part
    return solution


def _conjugate_gradients(gram: np.ndarray, moments: np.ndarray, mask: np.ndarray) -> np.ndarray:
    diagonal = np.diagonal(gram)[:, None]
    solution = np.zeros_like(moments)
    residual = np.where(mask, moments, 0.0)
    target = _TOLERANCE * np.linalg.norm(residual, axis=0)
    direction = residual / diagonal
    energy = (residual * direction).sum(axis=0)
    for _ in range(_ITERATIONS):
        change = np.where(mask, gram @ direction, 0.0)
        step = _ratio(energy, (direction * change).sum(axis=0))
        solution += step * direction
        residual -= step * change
        if (np.linalg.norm(residual, axis=0) <= target).all():
            break
        scaled = residual / diagonal
        before, energy = energy, (residual * scaled).sum(axis=0)
        direction = scaled + _ratio(energy, before) * direction
    return solution


def _ratio(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns the quotient, 0 for columns without anything left to solve."""
    return np.divide(one, other, out=np.zeros_like(one), where=other > 0)
