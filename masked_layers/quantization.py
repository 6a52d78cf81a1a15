"""Fake quantization: weights rounded in the forward pass as they will be in an export."""

from __future__ import annotations

import numpy as np
from keras import ops

from masked_layers.types import Tensor

LEVELS = {"int8": 127, "int4": 7}
"""The largest code of each kind. The smallest one is its negative, so that 0 has a code."""


def check(quantization: object) -> None:
    """Raises an error if a value is not a kind of quantization.

    Raises:
        ValueError: If it is neither None nor a key of `LEVELS`.
    """
    if quantization is not None and quantization not in LEVELS:
        raise ValueError(
            f"Quantization must be one of {list(LEVELS)}, or None for none. "
            f"Received: {quantization!r}"
        )


def fake_quantized(weight: Tensor, quantization: str) -> Tensor:
    """Rounds a weight to multiples of one scale for each index on its last axis.

    That is the output channel of most kernels. The scale is its largest magnitude divided by the
    largest code, so that nothing is clipped. Zeros stay +0. The gradient passes straight through
    (Bengio et al., 2013, https://arxiv.org/abs/1308.3432).

    Args:
        weight: Float tensor with at least one axis, pruned entries 0.
        quantization: `"int8"` or `"int4"`.
    """
    exact = ops.stop_gradient(weight)
    largest = ops.max(ops.abs(exact), axis=list(range(len(weight.shape) - 1)), keepdims=True)
    # A product, because XLA computes a quotient by a constant as a product and rounds it otherwise.
    scale = largest * ops.cast(np.float32(1 / LEVELS[quantization]), weight.dtype)
    steps = ops.round(exact / ops.where(scale > 0, scale, ops.ones_like(scale)))
    # The difference is exactly 0 and has the gradient of the weight.
    return steps * scale + (weight - exact)
