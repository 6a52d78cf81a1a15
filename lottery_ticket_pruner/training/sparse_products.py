"""Products with sparse matrices on the torch backend, by operations of PyTorch's own.

Sums of rows (`embedding_bag`) are faster than PyTorch's CSR product here, and need no MKL.
"""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
import torch

from lottery_ticket_pruner.training.kept_weights import KeptKernel


class SparseProduct:
    """The product of inputs and kept weights, with derivatives for kept weights alone.

    Args:
        kept: The kept weights.
    """

    def __init__(self, kept: KeptKernel) -> None:
        units, inputs = len(kept.units), len(kept.inputs)
        order = np.lexsort((kept.columns, kept.rows))
        self.rows, self.columns = _indices(kept.rows), _indices(kept.columns[order])
        self.unit_starts = _starts(kept.columns, units)
        self.input_starts = _starts(kept.rows, inputs)
        self.by_input = _indices(order)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse (CSR|invariant)")
            self.pattern = torch.sparse_csr_tensor(
                *(self.unit_starts, self.rows, torch.zeros(len(order), dtype=torch.float32)),
                size=(units, inputs),
            )

    def __call__(self, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """Returns the outputs, `(batch, units)`."""
        return _Function.apply(x, weights, self)


class _Function(torch.autograd.Function):
    """The product, and its derivatives with respect to inputs and kept weights."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weights: torch.Tensor, product: SparseProduct
    ) -> torch.Tensor:
        transposed = x.t().contiguous()
        ctx.save_for_backward(transposed, weights)
        ctx.product = product
        return _sums(transposed, product.rows, product.unit_starts, weights).t()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        product = ctx.product
        upstream = upstream.t().contiguous()
        of_x = of_weights = None
        if ctx.needs_input_grad[0]:
            sorted_weights = weights.index_select(0, product.by_input)
            of_x = _sums(upstream, product.columns, product.input_starts, sorted_weights).t()
        if ctx.needs_input_grad[1]:
            of_weights = torch.sparse.sampled_addmm(
                product.pattern, upstream, x.t(), beta=0.0
            ).values()
        return of_x, of_weights, None


def _sums(
    values: torch.Tensor, places: torch.Tensor, starts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Returns weighted sums of the rows of `values` at these places, one for each start."""
    return torch.nn.functional.embedding_bag(
        *(places, values, starts),
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def _starts(owners: np.ndarray, number: int) -> torch.Tensor:
    return _indices(np.append(0, np.cumsum(np.bincount(owners, minlength=number))))


def _indices(array: np.ndarray) -> torch.Tensor:
    return keras.ops.convert_to_tensor(array.astype("int32"))
