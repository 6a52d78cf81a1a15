"""Fits the kept weights of pruned layers to former outputs, by least squares on examples."""

from lottery_ticket_pruner.reconstruction.fitting import (
    Fit,
    FormerOutputs,
    Target,
    checked,
    fit_after,
    fit_apart,
)
from lottery_ticket_pruner.reconstruction.normalization import (
    has_statistics,
    reads_only,
    statistics,
)
from lottery_ticket_pruner.reconstruction.products import product_of

__all__ = [
    "Fit",
    "FormerOutputs",
    "Target",
    "checked",
    "fit_after",
    "fit_apart",
    "has_statistics",
    "product_of",
    "reads_only",
    "statistics",
]
