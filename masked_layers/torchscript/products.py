"""TorchScript modules that multiply by a sparse matrix with PyTorch's own CSR product.

Everything here is compiled by TorchScript and becomes part of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor

from masked_layers.torchscript.storage import csr, packed_csr


def product(weight: Tensor, columns: Tensor, block: int, rows_first: bool) -> Tensor:
    """Returns the transposed product of a CSR matrix and a dense one.

    Args:
        weight: CSR matrix of shape `(rows, inner)`.
        columns: Dense matrix of shape `(inner, n)`.
        block: Number of columns to multiply at a time, so that they fit into a cache; 0 for all.
        rows_first: Whether the result has contiguous rows. Otherwise it may have contiguous
            columns, which the next such product reads without a copy.

    Returns:
        A matrix of shape `(n, rows)`.
    """
    count = columns.shape[1]
    if count == 1:
        return torch.mv(weight, columns[:, 0]).unsqueeze(0)
    if block == 0 or count <= block:
        result = torch.mm(weight, columns.contiguous()).t()
        return result.contiguous() if rows_first else result
    parts = [torch.mm(weight, part.contiguous()) for part in columns.split(block, 1)]
    if rows_first:
        return torch.cat([part.t() for part in parts])
    return torch.cat(parts, 1).t()


class SparseContraction(torch.nn.Module):
    """A product over some axes of an input and a weight, as `matmul` and `einsum` compute it.

    Args:
        weight: CSR matrix with a row for each output.
        before: Permutation of the input after which the axes of the sum are the last ones.
        summed: Number of these axes.
        widths: Lengths of the axes that the weight adds to the output, after those of the input.
        after: Permutation of these axes that gives the output.
        block: As in `product`.
        rows_first: As in `product`.
    """

    def __init__(
        self,
        weight: Tensor,
        before: list[int],
        summed: int,
        widths: list[int],
        after: list[int],
        block: int = 0,
        rows_first: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.before = before
        self.summed = summed
        self.widths = widths
        self.after = after
        self.block = block
        self.rows_first = rows_first

    @torch.jit.export
    def __getstate__(
        self,
    ) -> tuple[tuple[bool, bool], list[list[int]], list[int], tuple[bool, Tensor, Tensor]]:
        numbers = [self.before, [self.summed], self.widths, self.after, [self.block]]
        flags = self.training, self.rows_first
        return flags, numbers, self.weight.shape, packed_csr(self.weight)

    @torch.jit.export
    def __setstate__(
        self,
        state: tuple[tuple[bool, bool], list[list[int]], list[int], tuple[bool, Tensor, Tensor]],
    ) -> None:
        flags, numbers, shape, packed = state
        self.training, self.rows_first = flags
        self.before = numbers[0]
        self.summed = numbers[1][0]
        self.widths = numbers[2]
        self.after = numbers[3]
        self.block = numbers[4][0]
        self.weight = csr(packed[0], packed[1], packed[2], shape)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the product for an input of any batch size."""
        x = x.permute(self.before)
        free = x.shape[: x.dim() - self.summed]
        columns = x.reshape(-1, self.weight.shape[1]).t()
        y = product(self.weight, columns, self.block, self.rows_first)
        return y.reshape(free + self.widths).permute(self.after)


class SparseConvolution(torch.nn.Module):
    """A convolution with one group as a product with the patches of its input.

    Args:
        weight: CSR matrix with a row for each filter, whose columns are channels and positions.
        kernel: Lengths of the kernel.
        strides: Strides.
        dilation: Distances between the positions of the kernel.
        padding: Numbers of zeros on both sides of each axis.
        block: As in `product`.
        rows_first: As in `product`; the channels of the output are then contiguous.
    """

    def __init__(
        self,
        weight: Tensor,
        kernel: list[int],
        strides: list[int],
        dilation: list[int],
        padding: list[int],
        block: int = 0,
        rows_first: bool = False,
    ) -> None:
        super().__init__()
        self.weight = weight
        self.kernel = kernel
        self.strides = strides
        self.dilation = dilation
        self.padding = padding
        self.block = block
        self.rows_first = rows_first

    @torch.jit.export
    def __getstate__(
        self,
    ) -> tuple[tuple[bool, bool], list[list[int]], list[int], tuple[bool, Tensor, Tensor]]:
        numbers = [self.kernel, self.strides, self.dilation, self.padding, [self.block]]
        flags = self.training, self.rows_first
        return flags, numbers, self.weight.shape, packed_csr(self.weight)

    @torch.jit.export
    def __setstate__(
        self,
        state: tuple[tuple[bool, bool], list[list[int]], list[int], tuple[bool, Tensor, Tensor]],
    ) -> None:
        flags, numbers, shape, packed = state
        self.training, self.rows_first = flags
        self.kernel = numbers[0]
        self.strides = numbers[1]
        self.dilation = numbers[2]
        self.padding = numbers[3]
        self.block = numbers[4][0]
        self.weight = csr(packed[0], packed[1], packed[2], shape)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the convolution of an input of any batch size, channels on the second axis."""
        rank = len(self.kernel)
        widths: list[int] = []
        for i in range(rank):  # From the last axis to the first.
            widths.extend([self.padding[rank - 1 - i], self.padding[rank - 1 - i]])
        if sum(widths) > 0:
            x = torch.nn.functional.pad(x, widths)
        for i in range(rank):
            x = x.unfold(2 + i, (self.kernel[i] - 1) * self.dilation[i] + 1, self.strides[i])
            x = x[..., :: self.dilation[i]]
        order = [1]
        order.extend([2 + rank + i for i in range(rank)])
        order.append(0)
        order.extend([2 + i for i in range(rank)])
        shape = [x.shape[0]]
        shape.extend(x.shape[2 : 2 + rank])
        shape.append(self.weight.shape[0])
        columns = x.permute(order).reshape(self.weight.shape[1], -1)
        y = product(self.weight, columns, self.block, self.rows_first)
        return y.reshape(shape).movedim(-1, 1)
