"""Rules for attention layers, whose channels include heads and the widths of each head."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from masked_layers.shrinking.channels import (
    VARIES,
    Call,
    CannotFollow,
    Channels,
    Edit,
    Flow,
    Reader,
    positions,
)
from masked_layers.shrinking.rules import array, foreign_rule, rule, rule_of


@dataclasses.dataclass(frozen=True)
class _Attention:
    """The channels of an attention layer.

    Attributes:
        inputs: Channels of "query", "key" and "value".
        heads: Heads of keys and values.
        query_heads: For each head of the queries, the head of keys that it uses.
        key_dim: Entries of queries and keys within a head. All heads share them, because the config
            has one width for all heads.
        value_dim: Entries of values within a head, shared in the same way.
        outputs: Channels of the layer's output.
    """

    inputs: Mapping[str, Channels]
    heads: Channels
    query_heads: Channels
    key_dim: Channels
    value_dim: Channels
    outputs: Channels


@foreign_rule("keras_hub.CachedMultiHeadAttention")
@rule(layers.MultiHeadAttention)
def _multi_head_attention(flow: Flow, call: Call) -> Channels:
    layer, inputs = call.operation, _inputs(flow, call)
    if len(layer.output_dense.kernel.shape) != 3:
        raise CannotFollow("its outputs have several axes")
    heads = _opened(flow, layer.num_heads)
    parts = _Attention(
        inputs=inputs,
        heads=heads,
        query_heads=heads,
        key_dim=_opened(flow, layer.key_dim),
        value_dim=_opened(flow, layer.value_dim),
        outputs=_outputs(flow, call, layer.output_dense),
    )
    inner = {"heads": heads, "key_dim": parts.key_dim, "value_dim": parts.value_dim}
    widths = {"num_heads": heads, "key_dim": parts.key_dim, "value_dim": parts.value_dim}
    return _follow(flow, call, "", parts, inner, widths | {"output_shape": parts.outputs})


@rule(layers.GroupQueryAttention)
def _grouped_query_attention(flow: Flow, call: Call) -> Channels:
    layer, inputs = call.operation, _inputs(flow, call)
    heads, width = _opened(flow, layer.num_key_value_heads), _opened(flow, layer.head_dim)
    repeats = layer.num_query_heads // layer.num_key_value_heads
    parts = _Attention(
        inputs=inputs,
        heads=heads,
        query_heads=Channels(None, heads.slots.repeat(repeats), heads.constants.repeat(repeats)),
        key_dim=width,
        value_dim=width,
        outputs=_outputs(flow, call, layer._output_dense),
    )
    # Its config has no number of outputs, because there are as many as inputs.
    flow.join(inputs["query"].slots, parts.outputs.slots)
    widths = {"num_key_value_heads": heads, "num_query_heads": parts.query_heads, "head_dim": width}
    return _follow(flow, call, "_", parts, {"heads": heads, "head_dim": width}, widths)


def _inputs(flow: Flow, call: Call) -> dict[str, Channels]:
    """Returns the channels of query, key and value.

    Raises:
        CannotFollow: If the layer is called or configured in a way that is not supported.
    """
    given = _arguments(call)
    mask = given.get("attention_mask")
    if given.get("return_attention_scores"):
        raise CannotFollow("it returns the scores of its heads")
    if given.get("training"):
        raise CannotFollow("called in training mode")
    if given.get("cache") is not None:
        raise CannotFollow("called with a cache")
    if mask is not None and len(mask.shape) > 3 and mask.shape[1] != 1:
        raise CannotFollow("its attention mask has an axis of heads")
    gated = call.operation.get_config().get("use_gate", False)
    if gated != hasattr(call.operation, "_gate_dense"):
        raise CannotFollow("it has a gate of another kind")
    found = {
        id(tensor): flow.channels(dataclasses.replace(call, inputs=[tensor]), -1)
        for tensor in _operands(call).values()
    }
    return {name: found[id(tensor)] for name, tensor in _operands(call).items()}


def operands(call: Call) -> list[keras.KerasTensor]:
    """Returns the tensors among the arguments of a call whose channels its rule follows.

    The others are masks.
    """
    if rule_of(call.operation) in (_multi_head_attention, _grouped_query_attention):
        return list(_operands(call).values())
    return call.inputs


def _operands(call: Call) -> dict[str, keras.KerasTensor]:
    given = _arguments(call)
    if given.get("key") is None:
        given["key"] = given["value"]
    return {name: given[name] for name in ("query", "key", "value")}


def _arguments(call: Call) -> dict[str, Any]:
    return inspect.signature(call.operation.call).bind(*call.args, **call.kwargs).arguments


def _equal_widths(parts: _Attention) -> bool:
    """Returns True if keys and values have equal widths that must stay equal."""
    same = len(parts.key_dim.slots) == len(parts.value_dim.slots)
    return same and keras.backend.backend() == "jax"


def _opened(flow: Flow, count: int) -> Channels:
    return Channels(None, flow.new_slots(count), np.full(count, VARIES))


def _outputs(flow: Flow, call: Call, dense: layers.EinsumDense) -> Channels:
    """Returns new channels for the outputs. An output that reads no head is constant: its bias."""
    read = (array(dense.kernel) != 0).any(axis=(0, 1))
    values = np.where(read, VARIES, 0.0 if dense.bias is None else array(dense.bias))
    return Channels(len(call.output.shape) - 1, flow.new_slots(len(read)), values)


def _follow(
    flow: Flow,
    call: Call,
    prefix: str,
    parts: _Attention,
    inner: dict[str, Channels],
    widths: dict[str, Channels],
) -> Channels:
    """Records the changes to an attention layer, and returns the channels of its output.

    Args:
        flow: The analysis.
        call: The call of the layer.
        prefix: Prefix of the attributes that contain the inner layers. For `GroupQueryAttention` it
            is "_": its inner layers are private in Keras, and there is no public way to them.
        parts: The channels of the layer.
        inner: Kind -> channels that the layer uses only inside.
        widths: Key in the config -> the channels whose number is stored there.
    """
    names = {name: f"{prefix}{name}_dense" for name in ("query", "key", "value", "output")}
    # The layer makes these channels and reads them. `Edit.reads` distinguishes the two by identity.
    heads, width = (dataclasses.replace(x) for x in (parts.query_heads, parts.value_dim))
    made = {
        "query": (parts.query_heads, parts.key_dim),
        "key": (parts.heads, parts.key_dim),
        "value": (parts.heads, parts.value_dim),
    }
    given = _operands(call)
    if hasattr(call.operation, "_gate_dense"):
        # It multiplies what the output reads. Keras has no public name for it either.
        names["gate"], given["gate"] = "_gate_dense", given["query"]
        made["gate"] = (parts.query_heads, parts.value_dim)
    denses = {name: getattr(call.operation, attribute) for name, attribute in names.items()}
    slices = {
        f"{names['output']}.kernel": {0: heads, 1: width, 2: parts.outputs},
        f"{names['output']}.bias": {0: parts.outputs},
    }
    for name, (of_heads, of_width) in made.items():
        source = parts.inputs["query" if name == "gate" else name]
        slices[f"{names[name]}.kernel"] = {0: source, 1: of_heads, 2: of_width}
        slices[f"{names[name]}.bias"] = {0: of_heads, 1: of_width}
    counts = {name: positions(given[name], len(given[name].shape) - 1) for name in made}
    counts["output"] = counts["query"]
    places = {f"{names[name]}.kernel": count for name, count in counts.items()}
    pairs = _pairs(call, given["query"], given["key"])
    edit = Edit(
        slices,
        parts.outputs,
        inner,
        {(name,): channels for name, channels in widths.items()},
        _readers(parts, heads, width, denses),
        places | {"scores": pairs, "mixture": pairs},
        products={
            "scores": {0: parts.query_heads, 1: parts.key_dim},
            "mixture": {0: parts.query_heads, 1: parts.value_dim},
        },
        # On JAX, attention requires values of the same width as keys.
        equal=(parts.key_dim, parts.value_dim) if _equal_widths(parts) else (),
        # The layer divides products of queries and keys by the square root of their width.
        scaled={f"{names['query']}.{name}": parts.key_dim for name in ("kernel", "bias")},
    )
    flow.edit(call, edit)
    return parts.outputs


def _pairs(call: Call, query: keras.KerasTensor, key: keras.KerasTensor) -> int | None:
    """Returns the number of pairs of a query and a key for one example, or None if unknown."""
    queries, rank = positions(query, len(query.shape) - 1), len(key.shape)
    axes = call.operation.get_config().get("attention_axes") or range(1, rank - 1)
    sizes = [key.shape[axis] for axis in {axis % rank for axis in axes}]
    return None if queries is None or None in sizes else queries * math.prod(sizes)


def _readers(
    parts: _Attention, heads: Channels, width: Channels, denses: Mapping[str, Any]
) -> tuple[Reader, ...]:
    """Returns the readers of the layer: outputs need heads, and heads need inputs and widths.

    Args:
        parts: The channels of the layer.
        heads: Heads, as the kernel of the output reads them.
        width: Entries of values, as the kernel of the output reads them.
        denses: The inner layers by name.
    """
    count = len(parts.heads.slots)
    kernels = {name: array(dense.kernel) != 0 for name, dense in denses.items()}
    grouped = kernels["query"].shape[0], count, -1  # (inputs, heads of keys, all in the group)
    demands = [
        (parts.inputs["query"], parts.heads, kernels["query"].reshape(grouped).any(axis=2)),
        (parts.inputs["key"], parts.heads, kernels["key"].any(axis=2)),
        (parts.inputs["value"], parts.heads, kernels["value"].any(axis=2)),
        (dataclasses.replace(parts.key_dim), parts.heads, _scores(denses, count)),
        (heads, parts.outputs, kernels["output"].any(axis=1)),
        (width, parts.outputs, kernels["output"].any(axis=0)),
    ]
    if "gate" in kernels:
        demands.append(
            (parts.inputs["query"], parts.heads, kernels["gate"].reshape(grouped).any(axis=2))
        )
    readers = []
    for source, target, demand in demands:
        fixed = source.constants == 0
        demand = demand & ~fixed[:, None]
        readers.append(Reader(source, target, demand, np.zeros(demand.shape), fixed))
    return tuple(readers)


def _scores(denses: Mapping[str, Any], heads: int) -> np.ndarray:
    """Returns which entries of queries and keys affect the scores of which heads, as bools.

    A key that does not depend on the input adds the same number to all scores of a query, which
    does not change their softmax.
    """
    varies = {name: (array(denses[name].kernel) != 0).any(axis=0) for name in ("query", "key")}
    query = varies["query"]
    if denses["query"].bias is not None:
        query = query | (array(denses["query"].bias) != 0)
    matters = query.reshape(heads, -1, query.shape[1]).any(axis=1) & varies["key"]
    return matters.T
