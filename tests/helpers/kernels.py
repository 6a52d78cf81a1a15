"""Records of kernels, given explicitly or drawn by hypothesis."""

import math

import numpy as np

from lottery_ticket_pruner import criteria
from lottery_ticket_pruner.selection import Weights

BY_RECORDS = [n for n in criteria.names() if criteria.get(n).needs <= set(criteria.RECORDS)]
RANKING_RECORDS = [name for name in criteria.names() if not criteria.get(name).evidence]


def kernel(values, mask=None, **kwargs):
    """Returns a kernel whose three records have the same values."""
    values = np.asarray(values)
    mask = np.ones(values.shape, dtype=bool) if mask is None else np.asarray(mask, dtype=bool)
    records = {"initial": values, "final": values, "current": values} | kwargs
    return Weights(mask=mask, **records)


def distinct(rng, *shape):
    """Draws random weights with distinct magnitudes."""
    size = math.prod(shape)
    magnitudes = rng.permutation(size).astype(np.float32) + 1
    return (magnitudes * rng.choice([-1, 1], size)).reshape(shape) / size
