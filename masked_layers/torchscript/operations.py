"""The functions of PyTorch that have a sparse form, described by what they do with their weight."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from masked_layers.torchscript.products import SparseContraction, SparseConvolution


@dataclass(frozen=True)
class Contraction:
    """A sum over axes that an input and a weight share.

    Attributes:
        name: Name of the function.
        order: Permutation of the axes of the weight: those of the output, then those of the sum.
        before: See `SparseContraction`.
        summed: See `SparseContraction`.
        widths: See `SparseContraction`.
        after: See `SparseContraction`.
    """

    name: str
    order: tuple[int, ...]
    before: tuple[int, ...]
    summed: int
    widths: tuple[int, ...]
    after: tuple[int, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns the weight as a matrix with a row for each output."""
        return weight.permute(self.order).reshape(math.prod(self.widths), -1)

    def module(self, matrix: Tensor, block: int, rows_first: bool) -> torch.nn.Module:
        """Returns the module for a CSR matrix."""
        return SparseContraction(
            matrix,
            list(self.before),
            self.summed,
            list(self.widths),
            list(self.after),
            block,
            rows_first,
        )


@dataclass(frozen=True)
class Convolution:
    """A convolution with one group; the attributes are those of `SparseConvolution`."""

    name: str
    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    def matrix(self, weight: Tensor) -> Tensor:
        """Returns the weight as a matrix with a row for each filter."""
        return weight.reshape(weight.shape[0], -1)

    def module(self, matrix: Tensor, block: int, rows_first: bool) -> torch.nn.Module:
        """Returns the module for a CSR matrix."""
        return SparseConvolution(
            matrix,
            list(self.kernel),
            list(self.strides),
            list(self.dilation),
            list(self.padding),
            block,
            rows_first,
        )


Operation = Contraction | Convolution


class Product(NamedTuple):
    """A call that has a sparse form: the operation, its input and its weight."""

    operation: Operation
    x: Tensor
    weight: Tensor


def product_of(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], is_weight: Callable[[Any], bool]
) -> Product | None:
    """Returns the product that a call computes, or None for other calls."""
    parse = _PARSERS.get(func)
    found = None
    if parse is not None:
        try:
            found = parse(*args, **kwargs)
        except TypeError:  # Arguments that the parser does not know.
            return None
    if found is None or is_weight(found.x) or not is_weight(found.weight):
        return None
    dtypes = found.x.dtype, found.weight.dtype
    return found if dtypes in ((torch.float32,) * 2, (torch.float64,) * 2) else None


def _matmul(input: Tensor, other: Tensor) -> Product | None:  # noqa: A002
    if input.dim() < 2 or other.dim() != 2:
        return None
    axes = tuple(range(input.dim()))
    return Product(
        Contraction("matmul", (1, 0), axes, 1, _ints(other.shape[1:]), axes), input, other
    )


def _linear(input: Tensor, weight: Tensor, bias: None = None) -> Product | None:  # noqa: A002
    if input.dim() < 2 or bias is not None:
        return None
    axes = tuple(range(input.dim()))
    return Product(
        Contraction("linear", (0, 1), axes, 1, _ints(weight.shape[:1]), axes), input, weight
    )


def _einsum(equation: str, *operands: Any) -> Product | None:
    if len(operands) == 1:
        operands = tuple(operands[0])
    terms, arrow, output = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    if not arrow or len(labels) != 2 or len(operands) != 2 or "..." in labels[1]:
        return None
    x, weight = operands
    # Letters in place of the dots.
    unused = [letter for letter in string.ascii_letters if letter not in equation]
    dots = "".join(unused[: x.dim() - len(labels[0]) + 3]) if "..." in labels[0] else ""
    given, output = (term.replace("...", dots) for term in (labels[0], output))
    inner = labels[1]
    if any(len(set(term)) < len(term) for term in (given, inner, output)):
        return None
    summed = [label for label in inner if label in given]
    widths = [label for label in inner if label not in given]
    free = [label for label in given if label not in summed]
    if sorted(output) != sorted(free + widths) or not summed:
        return None
    return Product(
        Contraction(
            "einsum",
            tuple(inner.index(label) for label in widths + summed),
            tuple(given.index(label) for label in free + summed),
            len(summed),
            _ints(weight.shape[inner.index(label)] for label in widths),
            tuple((free + widths).index(label) for label in output),
        ),
        x,
        weight,
    )


def _convolution(
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Product | None:
    rank = weight.dim() - 2
    if bias is not None or groups != 1 or isinstance(padding, str) or input.dim() != rank + 2:
        return None

    def each(value: Any) -> tuple[int, ...]:
        values = _ints((value,) if isinstance(value, int | Tensor) else value)
        return values * rank if len(values) == 1 else values

    numbers = (each(value) for value in (stride, dilation, padding))
    return Product(Convolution(f"conv{rank}d", _ints(weight.shape[2:]), *numbers), input, weight)


def _ints(values: Iterable[Any]) -> tuple[int, ...]:
    # In tracing, the length of an axis is a tensor.
    return tuple(int(value) for value in values)


_PARSERS: dict[Any, Callable[..., Product | None]] = {
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    functional.linear: _linear,
    torch.einsum: _einsum,
    functional.conv1d: _convolution,
    functional.conv2d: _convolution,
    functional.conv3d: _convolution,
}
