"""Rules for layers that normalize over channels, or scale each of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from masked_layers.maskable import NORMALIZATIONS, channel_weights, mask_of, raw_variable
from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import (
    VARIES,
    Call,
    CannotFollow,
    Channels,
    Edit,
    Flow,
    Reader,
)
from masked_layers.shrinking.rules import MASKED_POSITIONS, array, rule

MASKED_POSITIONS.update(NORMALIZATIONS)


@rule(*NORMALIZATIONS)
def _normalization(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    axes = layer.axis if isinstance(layer.axis, (list, tuple)) else [layer.axis]
    if len(axes) > 1:
        raise CannotFollow("it normalizes several axes together")
    source = flow.channels(call, axes[0])
    if getattr(layer, "groups", 1) > 1:
        return _in_groups(flow, call, source)
    target, slices, reader = normalized(layer, source)
    flow.edit(call, Edit(slices, readers=(reader,)))
    return target


def normalized(
    layer: Any, source: Channels, prefix: str = ""
) -> tuple[Channels, dict[str, dict[int, Channels]], Reader]:
    """Follows channels through a normalization whose mask can leave some of them out.

    Channels that are left out are 0. All others are needed, for mean and variance, wherever any
    output is.

    Args:
        layer: A normalization layer over a single axis, or one inside another layer.
        source: Channels of its input along this axis.
        prefix: Prefix of the names of its weights, as `"norm."`.

    Returns:
        The channels of the output, the slices of the weights, and how the layer reads its input.

    Raises:
        CannotFollow: If the layer has no mask.
    """
    names = channel_weights(layer)
    if not names:
        raise CannotFollow("it normalizes all channels together, and has no scale to be masked")
    mask, beta = mask_of(layer, names[0]), raw_variable(layer, "beta")
    if mask is None:
        raise CannotFollow(
            "it normalizes all channels together, and leaves none of them out, as it may when "
            "pruned after convert_to_masked(model, mask_normalization=True)"
        )
    keep, scale = mask.to_numpy(), array(raw_variable(layer, names[0]))
    shift = np.zeros(len(keep)) if beta is None else array(beta).astype("float64")
    varies = keep & (scale != 0)
    target = source.with_constants(np.where(varies, VARIES, np.where(keep, shift, 0.0)))
    slices = {f"{prefix}{names[0]}": {0: source}}
    if beta is not None:
        slices[f"{prefix}beta"] = {0: target}
    demand = np.outer(keep, varies)
    gain = np.broadcast_to(np.zeros(()), demand.shape)  # No constant moves past a normalization.
    return target, slices, Reader(source, target, demand, gain, np.zeros(len(keep), bool))


def _in_groups(flow: Flow, call: Call, source: Channels) -> Channels:
    """Follows a normalization of several groups, which is removed or kept by whole groups.

    Groups do not depend on each other, so statistics of the others stay as they are. Without some
    channels of a group, its mean and variance would be others.
    """
    layer = call.operation
    size = len(source.slots) // layer.groups
    for place in range(1, size):
        flow.join(source.slots[::size], source.slots[place::size])
    values = source.constants.reshape(-1, size)  # NaN for a group with a channel that varies.
    values = values - values.mean(axis=1, keepdims=True)
    variance = np.square(values).mean(axis=1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):  # Without variance or epsilon: NaN.
        constants = (values / np.sqrt(variance + layer.epsilon)).reshape(-1)
    if layer.gamma is not None:
        gamma = array(layer.gamma)
        constants = np.where(gamma == 0, 0.0, constants * gamma)
    if layer.beta is not None:
        constants = constants + array(layer.beta)
    weights = {name: {0: source} for name in ("gamma", "beta")}
    groups = Channels(source.axis, source.slots[::size], source.constants[::size])
    flow.edit(call, Edit(weights, widths={("groups",): groups}))
    return source.with_constants(constants)


@rule(_keras_graph.LayerScale)
def _layer_scale(flow: Flow, call: Call) -> Channels:
    source, scale = flow.channels(call, -1), array(call.operation.gamma)
    flow.edit(call, Edit({"gamma": {0: source}}, widths={("projection_dim",): source}))
    return source.with_constants(np.where(scale == 0, 0.0, source.constants * scale))


@rule(_keras_graph.StochasticDepth)
def _stochastic_depth(flow: Flow, call: Call) -> Channels:
    return flow.tensors[id(call.inputs[0])]
