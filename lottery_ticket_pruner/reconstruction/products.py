"""Layers as products of two matrices, one of their inputs and one of their weights.

Grouped convolutions, depthwise convolutions and `EinsumDense` layers with an axis of separate
kernels are several products, so all matrices have a first axis of groups.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Iterator

import numpy as np
from keras import layers
from numpy.lib.stride_tricks import sliding_window_view

from masked_layers.paths import plain_class

# Numbers in the matrix of inputs that is made at a time.
_CHUNK = 2**22

_CONVOLUTIONS = (layers.Conv1D, layers.Conv2D, layers.Conv3D)
_DEPTHWISE = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)


class Product:
    """A layer that computes `rows @ matrix(kernel) + bias_matrix(bias)` before its activation."""

    @property
    def biased(self) -> bool:
        """True if each column of the product has a bias of its own."""
        raise NotImplementedError

    @property
    def channel_axis(self) -> int | None:
        """The axis of the outputs that indexes the columns, or None if there is not exactly one."""
        raise NotImplementedError

    def rows(self, inputs: np.ndarray) -> Iterator[np.ndarray]:
        """Yields the matrix of the inputs in parts, of shape (groups, rows, inputs)."""
        raise NotImplementedError

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        """Returns a kernel, or its mask, as an array of shape (groups, inputs, outputs)."""
        raise NotImplementedError

    def kernel(self, matrix: np.ndarray) -> np.ndarray:
        """Returns the kernel with this matrix."""
        raise NotImplementedError

    def bias_matrix(self, bias: np.ndarray) -> np.ndarray:
        """Returns a bias, or its mask, as an array of shape (groups, 1, outputs)."""
        raise NotImplementedError

    def bias(self, matrix: np.ndarray) -> np.ndarray:
        """Returns the bias with this matrix."""
        raise NotImplementedError


def product_of(layer: layers.Layer) -> Product | None:
    """Returns a built layer as a product, or None if it is not known to be one."""
    call = plain_class(layer).call
    if call in {cls.call for cls in (*_CONVOLUTIONS, *_DEPTHWISE)}:
        return _Convolution.of(layer)
    if call is layers.EinsumDense.call:
        return _Einsum.of(layer.equation, tuple(layer.kernel.shape), layer.bias_axes)
    if call is layers.Dense.call:
        return _Einsum.of("...x,xy->...y", tuple(layer.kernel.shape), "y" * layer.use_bias)
    return None


@dataclasses.dataclass(frozen=True)
class _Einsum(Product):
    """The product in an einsum equation, by the kinds of its indices.

    Attributes:
        before: Indices of the inputs; an ellipsis is a dot.
        weights: Indices of the kernel.
        after: Indices of the outputs.
        shape: Shape of the kernel.
        bias_axes: Indices of the bias.
    """

    before: str
    weights: str
    after: str
    shape: tuple[int, ...]
    bias_axes: str

    @classmethod
    def of(cls, equation: str, shape: tuple[int, ...], bias_axes: str | None) -> _Einsum | None:
        operands, after = equation.replace(" ", "").replace("...", ".").split("->")
        before, weights = operands.split(",")
        if any(len({*part}) < len(part) for part in (before, weights, after)):
            return None
        return cls(before, weights, after, shape, bias_axes or "")

    @property
    def biased(self) -> bool:
        return {*self.bias_axes} == {*self._groups, *self._outputs}

    @property
    def channel_axis(self) -> int | None:
        return -1 if self._groups + self._outputs == self.after[-1] else None

    @property
    def _groups(self) -> str:
        return "".join(i for i in self.weights if i in self.before and i in self.after)

    @property
    def _summed(self) -> str:
        return "".join(i for i in self.weights if i in self.before and i not in self.after)

    @property
    def _outputs(self) -> str:
        return "".join(i for i in self.weights if i not in self.before)

    def _sizes(self, *parts: str) -> list[int]:
        size = dict(zip(self.weights, self.shape, strict=True))
        return [math.prod(size[i] for i in part) for part in parts]

    def rows(self, inputs: np.ndarray) -> Iterator[np.ndarray]:
        spare = [i for i in string.ascii_letters if i not in self.before + self.weights]
        dots = "".join(spare[: inputs.ndim - len(self.before) + 1])
        before = self.before.replace(".", dots)
        examples = [i for i in before if i in self.after.replace(".", dots)]
        examples = [i for i in examples if i not in self.weights]
        groups, summed = self._sizes(self._groups, self._summed)
        order = self._groups + "".join(examples) + self._summed
        step = max(1, _CHUNK * len(inputs) // max(1, inputs.size))
        for start in range(0, len(inputs), step):
            part = inputs[start : start + step].astype("float64")
            yield np.einsum(f"{before}->{order}", part).reshape(groups, -1, summed)

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        order = self._groups + self._summed + self._outputs
        axes = [self.weights.index(i) for i in order]
        return kernel.transpose(axes).reshape(
            self._sizes(self._groups, self._summed, self._outputs)
        )

    def kernel(self, matrix: np.ndarray) -> np.ndarray:
        order = self._groups + self._summed + self._outputs
        array = matrix.reshape(self._sizes(*order))
        return array.transpose([order.index(i) for i in self.weights])

    def bias_matrix(self, bias: np.ndarray) -> np.ndarray:
        order = [i for i in self.after if i in self.bias_axes]
        array = bias.reshape(self._sizes(*order))
        axes = [order.index(i) for i in self._groups + self._outputs]
        groups, outputs = self._sizes(self._groups, self._outputs)
        return array.transpose(axes).reshape(groups, 1, outputs)

    def bias(self, matrix: np.ndarray) -> np.ndarray:
        order = self._groups + self._outputs
        array = matrix.reshape(self._sizes(*order))
        wanted = [i for i in self.after if i in self.bias_axes]
        return array.transpose([order.index(i) for i in wanted])


@dataclasses.dataclass(frozen=True)
class _Convolution(Product):
    """A convolution as a product of patches of its inputs with its filters."""

    window: tuple[int, ...]
    strides: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: str
    channels_first: bool
    groups: int
    channels: int  # in each group
    shape: tuple[int, ...]  # of the kernel
    use_bias: bool

    @classmethod
    def of(cls, layer: layers.Layer) -> _Convolution:
        shape, rank = tuple(layer.kernel.shape), layer.rank

        def each(value: int | tuple[int, ...]) -> tuple[int, ...]:
            return (value,) * rank if isinstance(value, int) else tuple(value)

        depthwise = plain_class(layer).call in {cls.call for cls in _DEPTHWISE}
        return cls(
            window=shape[:rank],
            strides=each(layer.strides),
            dilation=each(layer.dilation_rate),
            padding=layer.padding,
            channels_first=layer.data_format == "channels_first",
            groups=shape[-2] if depthwise else layer.groups,
            channels=1 if depthwise else shape[-2],
            shape=shape,
            use_bias=layer.use_bias,
        )

    @property
    def biased(self) -> bool:
        return self.use_bias

    @property
    def channel_axis(self) -> int | None:
        return 1 if self.channels_first else -1

    def rows(self, inputs: np.ndarray) -> Iterator[np.ndarray]:
        if self.channels_first:
            inputs = np.moveaxis(inputs, 1, -1)
        sizes = inputs.shape[1:-1]
        rank = len(sizes)
        padded = np.pad(inputs, [(0, 0), *map(self._padding, range(rank), sizes), (0, 0)])
        padded = padded.reshape(*padded.shape[:-1], self.groups, self.channels)
        spans = [(k - 1) * d + 1 for k, d in zip(self.window, self.dilation, strict=True)]
        patches = sliding_window_view(padded, spans, axis=tuple(range(1, rank + 1)))
        steps = [slice(None, None, step) for step in self.strides]
        gaps = [slice(None, None, gap) for gap in self.dilation]
        patches = patches[(slice(None), *steps, slice(None), slice(None), *gaps)]
        window = range(rank + 3, 2 * rank + 3)
        patches = patches.transpose(rank + 1, *range(rank + 1), *window, rank + 2)
        count = self.channels * math.prod(self.window)
        step = max(1, _CHUNK * patches.shape[1] // max(1, patches.size))
        for start in range(0, patches.shape[1], step):
            part = patches[:, start : start + step].astype("float64")
            yield part.reshape(self.groups, -1, count)

    def _padding(self, axis: int, size: int) -> tuple[int, int]:
        span, stride = (self.window[axis] - 1) * self.dilation[axis], self.strides[axis]
        if self.padding == "causal":
            return span, 0
        if self.padding == "valid":
            return 0, 0
        total = max((math.ceil(size / stride) - 1) * stride + span + 1 - size, 0)
        return total // 2, total - total // 2

    def matrix(self, kernel: np.ndarray) -> np.ndarray:
        count, outputs = math.prod(self.window), kernel.size // self._inputs // self.groups
        array = kernel.reshape(count, self.channels, self.groups, outputs)
        return array.transpose(2, 0, 1, 3).reshape(self.groups, self._inputs, outputs)

    def kernel(self, matrix: np.ndarray) -> np.ndarray:
        array = matrix.reshape(self.groups, math.prod(self.window), self.channels, -1)
        return array.transpose(1, 2, 0, 3).reshape(self.shape)

    def bias_matrix(self, bias: np.ndarray) -> np.ndarray:
        return bias.reshape(self.groups, 1, -1)

    def bias(self, matrix: np.ndarray) -> np.ndarray:
        return matrix.reshape(-1)

    @property
    def _inputs(self) -> int:
        return self.channels * math.prod(self.window)
