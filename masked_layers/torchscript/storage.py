"""Weights of a TorchScript file without their zeros, and modules that decode them at loading.

Everything here is compiled by TorchScript and becomes part of the file.
"""

from __future__ import annotations

import torch
from torch import Tensor


def positions_of_gaps(code: Tensor) -> Tensor:
    """Returns the positions of the values, from the numbers of zeros before each of them.

    A byte of 255 stands for so many zeros without a value after them.
    """
    ends = code < 255
    steps = code.long() + ends.long()
    return torch.cumsum(steps, 0)[ends] - 1


def positions_of_bits(code: Tensor, size: int) -> Tensor:
    """Returns the positions of the bits that are set, the lowest bit of a byte first."""
    bits = (code.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8)) & 1
    return torch.nonzero(bits.flatten()[:size]).flatten()


def pack(flat: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Encodes a vector.

    Returns:
        A tuple `(gaps, code, values)`: whether `code` contains gaps or bits, whichever are shorter;
        the bytes; and the values that are not zero.
    """
    positions = torch.nonzero(flat).flatten()
    values = flat[positions]
    before = torch.cat([torch.full([1], -1, dtype=torch.long), positions])
    zeros = before.diff() - 1
    skips = zeros // 255
    length = int(skips.sum()) + positions.numel()
    if length < flat.numel() // 8:
        code = torch.full([length], 255, dtype=torch.uint8)
        code[torch.cumsum(skips + 1, 0) - 1] = (zeros % 255).to(torch.uint8)
        return True, code, values
    kept = torch.zeros([(flat.numel() + 7) // 8 * 8], dtype=torch.uint8)
    kept[positions] = 1
    bits = kept.reshape(-1, 8) << torch.arange(8, dtype=torch.uint8)
    return False, bits.sum(1).to(torch.uint8), values


def positions(gaps: bool, code: Tensor, size: int) -> Tensor:
    """Returns the positions of the values in a vector of `size` entries."""
    if gaps:
        return positions_of_gaps(code)
    return positions_of_bits(code, size)


def packed_nbytes(tensor: Tensor) -> int:
    """Returns the number of bytes that `pack` needs for a tensor."""
    _, code, values = pack(tensor.flatten())
    return code.nbytes + values.nbytes


class StoredDense(torch.nn.Module):
    """A weight that is stored without its zeros and is dense in memory."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        # The axes from the largest stride to the smallest: the layout that a kernel expects.
        self.order = sorted(range(weight.dim()), key=lambda axis: -weight.stride(axis))
        self.weight = weight

    @torch.jit.export
    def __getstate__(self) -> tuple[bool, list[int], list[int], bool, Tensor, Tensor]:
        gaps, code, values = pack(self.weight.permute(self.order).flatten())
        return self.training, self.order, self.weight.shape, gaps, code, values

    @torch.jit.export
    def __setstate__(self, state: tuple[bool, list[int], list[int], bool, Tensor, Tensor]) -> None:
        self.training, self.order, shape, gaps, code, values = state
        ordered = [shape[axis] for axis in self.order]
        size = 1
        for length in ordered:
            size *= length
        flat = torch.zeros([size], dtype=values.dtype)
        flat[positions(gaps, code, size)] = values
        inverse = [self.order.index(axis) for axis in range(len(shape))]
        self.weight = flat.reshape(ordered).permute(inverse)

    def forward(self) -> Tensor:
        """Returns the dense weight."""
        return self.weight


def csr_of_dense(matrix: Tensor) -> Tensor:
    """Returns the CSR form of a dense matrix."""
    gaps, code, values = pack(matrix.flatten())
    return csr(gaps, code, values, matrix.shape)


def csr(gaps: bool, code: Tensor, values: Tensor, shape: list[int]) -> Tensor:
    """Returns a CSR matrix from its encoding, with the 32-bit indices that MKL reads."""
    rows, columns = shape
    flat = positions(gaps, code, rows * columns)
    counts = torch.bincount(flat // columns, minlength=rows)
    starts = torch.zeros([rows + 1], dtype=torch.int32)
    starts[1:] = torch.cumsum(counts, 0)
    return torch.sparse_csr_tensor(starts, (flat % columns).int(), values, shape)


def packed_csr(matrix: Tensor) -> tuple[bool, Tensor, Tensor]:
    """Returns what `pack` does for the dense form of a CSR matrix.

    Values of 0 among the entries are left out.
    """
    return pack(matrix.to_dense().flatten())
