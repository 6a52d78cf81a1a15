"""Normalization that leaves channels out: its statistics are those of the kept channels only."""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import keras
from keras import layers, ops

from masked_layers import _keras
from masked_layers.maskable import channel_weights, mask_of, raw_variable
from masked_layers.types import Tensor

Layer: TypeAlias = keras.layers.Layer

# For the documentation of the masked classes.
ABOUT = """a mask that leaves channels out.

    The mask is over the scale and has an entry for each channel. Mean and variance are taken over
    the kept channels only, and outputs of the others are 0. While all channels are kept, the layer
    computes what the plain one does. The mask is always binary. A layer without a scale, or that
    normalizes several axes or groups, has no mask."""


_without_masks: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "without_masks", default=False
)


@contextlib.contextmanager
def without_masks() -> Iterator[None]:
    """Makes masked normalization layers compute what plain ones do inside the scope.

    For graphs without masks, of models whose normalization keeps all channels.
    """
    token = _without_masks.set(True)
    try:
        yield
    finally:
        _without_masks.reset(token)


def masked_call(base: type[Layer]) -> Callable[..., Tensor]:
    """Returns the `call` of the masked form of one of Keras' normalization layers.

    While its mask keeps all channels, the layer computes what `base` computes, bit for bit. The
    mask decides on the device, so that it may change in functions that are already compiled.
    """

    @functools.wraps(base.call)
    def call(self: Any, inputs: Tensor) -> Tensor:
        masks = [mask for name in channel_weights(self) if (mask := mask_of(self, name))]
        if not masks or _without_masks.get():
            return base.call(self, inputs)
        keep = masks[0].keep()
        return _keras.cond(
            ops.all(keep),
            lambda: base.call(self, inputs),
            lambda: _kept_only(self, inputs, keep),
        )

    return call


def _kept_only(layer: Any, inputs: Tensor, keep: Tensor) -> Tensor:
    """Returns the normalization of the kept channels, and +0.0 in place of the others.

    What is left out is selected away, not multiplied by zero: it may be NaN or infinite. Sums are
    computed in float32 at least, as in Keras.

    Args:
        layer: A normalization layer.
        inputs: Its input.
        keep: Bool tensor of one entry per channel.
    """
    given = keras.backend.standardize_dtype(inputs.dtype)
    dtype = keras.backend.result_type(given, "float32")
    rank = len(inputs.shape)
    axis = (layer.axis if isinstance(layer.axis, int) else layer.axis[0]) % rank
    # GroupNormalization with one group takes all positions of an example together.
    others = [i for i in range(1, rank) if i != axis] if hasattr(layer, "groups") else []
    along = [-1 if i == axis else 1 for i in range(rank)]
    count = ops.maximum(ops.sum(ops.cast(keep, dtype)), 1)

    def mean(values: Tensor) -> Tensor:
        summed = ops.sum(values, axis=axis, keepdims=True) / count
        return ops.mean(summed, axis=others, keepdims=True) if others else summed

    def weight(name: str) -> Tensor:
        values = ops.cast(raw_variable(layer, name), dtype)
        return ops.reshape(ops.where(keep, values, 0), along)

    kept = ops.reshape(keep, along)
    values = ops.where(kept, ops.cast(inputs, dtype), 0)
    centers = not isinstance(layer, layers.RMSNormalization)
    if centers:
        values = ops.where(kept, values - mean(values), 0)
    scale = weight(channel_weights(layer)[0])
    outputs = values * (ops.rsqrt(mean(ops.square(values)) + layer.epsilon) * scale)
    if raw_variable(layer, "beta") is not None:
        outputs = outputs + weight("beta")
    outputs = ops.cast(ops.where(kept, outputs, 0), given)
    # The input of the others is not cast to the dtype of the layer before the call.
    return ops.cast(outputs, layer.compute_dtype) if centers else outputs
