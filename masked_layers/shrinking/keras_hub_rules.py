"""Rules for layers of KerasHub. They are registered by name, so it need not be installed."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import VARIES, Call, CannotFollow, Channels, Edit, Flow
from masked_layers.shrinking.composites import STAND_INS
from masked_layers.shrinking.rules import WITH_ARGUMENTS, foreign_rule
from masked_layers.types import Tensor

WITH_ARGUMENTS |= {"keras_hub.CachedMultiHeadAttention", "keras_hub.PositionEmbedding"}


@foreign_rule("keras_hub.PositionEmbedding")
def _position_embedding(flow: Flow, call: Call) -> Channels:
    first, *rest = (*call.args[1:], *call.kwargs.values()) or (0,)
    if _keras_graph.is_tensor(first) or first != 0 or any(value is not None for value in rest):
        raise CannotFollow("called with positions")
    # It reads only the shape of its input, and makes as many channels as the input has.
    source = flow.channels(call, -1)
    flow.edit(call, Edit({"position_embeddings": {1: source}}))
    return source.with_constants(np.full(len(source.slots), VARIES))


def _mask_of_decoder(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor | None:
    """Returns the attention mask of a decoder block, without reading the number of steps.

    Args:
        method: The method that computes the mask from this number.
        *args: Its arguments: the sequence, a padding mask, an attention mask, a cache.
        **kwargs: Its keyword arguments.

    Raises:
        CannotFollow: If the method computes another mask, or it is called with a cache.
    """
    signature = inspect.signature(method)
    bound = signature.bind(*args, **kwargs)
    if any(bound.arguments.get(name) is not None for name in ("self_attention_cache", "cache")):
        raise CannotFollow("called with a cache")
    bound.apply_defaults()

    def example(value: Any) -> Any:
        if not _keras_graph.is_tensor(value):
            return value
        shape = (2, *(5 for _ in value.shape[1:]))
        return ops.convert_to_tensor(np.arange(np.prod(shape)).reshape(shape) % 3 > 0, value.dtype)

    examples = keras.tree.map_structure(example, dict(bound.arguments))
    expected, found = method(**examples), _mask_of_steps(examples)
    if not _same(expected, found):
        raise CannotFollow("its attention mask is not known")
    return _mask_of_steps(bound.arguments)


def _same(mask: Tensor | None, other: Tensor | None) -> bool:
    if mask is None or other is None:
        return mask is other
    first, second = (ops.convert_to_numpy(x).astype(bool) for x in (mask, other))
    return bool((first == second).all())  # One may have a single row for the whole batch.


def _mask_of_steps(arguments: Mapping[str, Any]) -> Tensor | None:
    """Returns where positions attend to others: to earlier ones, and to those in other masks."""
    masks = [
        ops.cast(mask if len(mask.shape) == 3 else ops.expand_dims(mask, 1), "bool")
        for name, mask in arguments.items()
        if name.endswith(("padding_mask", "attention_mask")) and mask is not None
    ]
    if arguments.get("use_causal_mask", True):
        sequence = next(iter(arguments.values()))
        # Steps are counted by a sum, because the graph does not know their number.
        steps = ops.cumsum(ops.ones_like(sequence, dtype="int32")[:, :, 0], axis=1)
        masks.append(ops.expand_dims(steps, 2) >= ops.expand_dims(steps, 1))
    return functools.reduce(ops.logical_and, masks) if masks else None


def _without_cache(
    attention: keras.Layer,
    *args: Any,
    cache: object = None,
    cache_update_index: object = None,
    **kwargs: Any,
) -> Tensor:
    """Calls an attention layer without the arguments for a cache, which symbolic calls refuse."""
    if cache is not None or cache_update_index is not None:
        raise CannotFollow("called with a cache")
    return attention(*args, **kwargs)


STAND_INS["keras_hub.TransformerDecoder"] = {
    "_compute_self_attention_mask": _mask_of_decoder,
    "_self_attention_layer": _without_cache,
    "_cross_attention_layer": _without_cache,
}
