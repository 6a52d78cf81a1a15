"""Rules for layers that make new channels, most of them by mixing channels with a kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from masked_layers.paths import plain_class
from masked_layers.shrinking.channels import (
    VARIES,
    WHOLE,
    Call,
    CannotFollow,
    Channels,
    Edit,
    Flow,
    Reader,
    constant_shift,
    positions,
)
from masked_layers.shrinking.rules import (
    CUSTOM_ACTIVATION,
    ELEMENTWISE,
    MIXING,
    apply,
    array,
    border,
    depthwise,
    pads,
    rule,
)

_TRANSPOSED = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)


def _mix(
    flow: Flow,
    call: Call,
    source: Channels,
    reads: np.ndarray,
    gain: np.ndarray,
    slices: Callable[[Channels], dict[str, dict[int, Channels]]],
    width: str,
    padded: bool = False,
) -> Channels:
    """Follows a layer that computes `activation(input * kernel + bias)`.

    Args:
        flow: The analysis.
        call: The call of the layer.
        source: Channels of the layer's input.
        reads: Bool array of shape (inputs, outputs), True where a kernel entry between the two is
            not zero.
        gain: Array of shape (inputs, outputs): the response to a constant input of one, away from
            the border.
        slices: Function from the output channels to `Edit.slices` of all weights except the bias.
        width: Key of the number of outputs in the layer's config.
        padded: Whether zeros are added at the border, so that only constants of zero can be moved
            into the bias exactly.
    """
    layer = call.operation
    constant = ~np.isnan(source.constants)
    fixed = constant & (source.constants == 0) if padded else constant
    flow.lose(source.slots[constant & ~fixed & reads.any(axis=1)], border(layer))
    demand = reads & ~fixed[:, None]
    values = constant_shift(source.constants, gain, fixed)
    if layer.bias is not None:
        values += array(layer.bias)
    values[demand.any(axis=0)] = VARIES

    slots = flow.new_slots(reads.shape[1])
    followed = layer.activation is None or layer.activation in ELEMENTWISE
    if followed:
        activation = layer.activation or keras.activations.linear
        values = apply(activation, values, call.output.dtype)
    target = Channels(source.axis, slots, values)
    reader = Reader(source, target, demand, gain, fixed)
    weights = slices(target) | {"bias": {0: target}}
    # A transposed convolution applies its kernel once per position of its input.
    tensor = call.inputs[0] if isinstance(layer, _TRANSPOSED) else call.output
    places = positions(tensor, source.axis)
    flow.edit(call, Edit(weights, target, {(width,): target}, (reader,), places))
    if followed:
        return target
    flow.pin(target, f"the activation of '{layer.name}' reads all channels")
    if layer.activation not in MIXING:
        flow.not_followed[layer.name] = CUSTOM_ACTIVATION
    return WHOLE


@rule(layers.Dense)
def _dense(flow: Flow, call: Call) -> Channels:
    source, kernel = flow.channels(call, -1), array(call.operation.kernel)
    return _mix(
        flow,
        call,
        source,
        kernel != 0,
        kernel,
        lambda out: {"kernel": {0: source, 1: out}},
        "units",
    )


@rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def _convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    source, kernel = flow.channels(call, call.axis), array(layer.kernel)
    if layer.groups == len(source.slots) > 1:
        return depthwise(flow, call, source, kernel, grouped=True)
    if layer.groups != 1:
        raise CannotFollow("grouped convolution")
    taps = tuple(range(kernel.ndim - 2))
    return _mix(
        flow,
        call,
        source,
        (kernel != 0).any(taps),
        kernel.sum(taps, dtype="float64"),
        lambda out: {"kernel": {-2: source, -1: out}},
        "filters",
        padded=pads(layer),
    )


@rule(*_TRANSPOSED)
def _transposed_convolution(flow: Flow, call: Call) -> Channels:
    source, kernel = flow.channels(call, call.axis), array(call.operation.kernel)
    taps = tuple(range(kernel.ndim - 2))
    return _mix(
        flow,
        call,
        source,
        (kernel != 0).any(taps).T,
        kernel.sum(taps, dtype="float64").T,
        lambda out: {"kernel": {-1: source, -2: out}},
        "filters",
        padded=True,  # The number of taps in the sum of an output depends on its position.
    )


@rule(layers.SeparableConv1D, layers.SeparableConv2D)
def _separable_convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    source = flow.channels(call, call.axis)
    depthwise, pointwise = array(layer.depthwise_kernel), array(layer.pointwise_kernel)
    taps = tuple(range(depthwise.ndim - 2))
    inputs, multiplier = depthwise.shape[-2:]
    pointwise = pointwise.reshape(inputs, multiplier, -1)
    between = Channels(source.axis, source.slots.repeat(multiplier), np.zeros(0))
    return _mix(
        flow,
        call,
        source,
        ((depthwise != 0).any(taps)[..., None] & (pointwise != 0)).any(axis=1),
        np.einsum("im,imo->io", depthwise.sum(taps, dtype="float64"), pointwise.astype("float64")),
        lambda out: {
            "depthwise_kernel": {-2: source},
            "pointwise_kernel": {-2: between, -1: out},
        },
        "filters",
        padded=pads(layer),
    )


# -- recurrent layers


_GATES = {layers.SimpleRNN: 1, layers.GRU: 3, layers.LSTM: 4}


@rule(*_GATES)
def _recurrent(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    target = _units(flow, call, {"": layer}, ("units",))
    return target.with_constants(target.constants, 2 if layer.return_sequences else 1)


@rule(layers.Bidirectional)
def _bidirectional(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    if layer.merge_mode not in ("concat", "sum", "ave", "mul"):
        raise CannotFollow("its two directions are separate outputs")
    parts = {"forward_layer.": layer.forward_layer, "backward_layer.": layer.backward_layer}
    # Both directions keep the same units, because one number in the config applies to both.
    places = [(key, "config", "units") for key in ("layer", "backward_layer")]
    config = layer.get_config()
    target = _units(flow, call, parts, *(place for place in places if place[0] in config))
    axis = 2 if layer.forward_layer.return_sequences else 1
    repeats = 2 if layer.merge_mode == "concat" else 1
    return Channels(axis, np.tile(target.slots, repeats), np.tile(target.constants, repeats))


def _units(
    flow: Flow, call: Call, parts: dict[str, Any], *widths: tuple[str | int, ...]
) -> Channels:
    """Returns new channels for the units of recurrent layers.

    A unit consists of one column in each gate, and one entry of the state.

    Args:
        flow: The analysis.
        call: The call of the layer.
        parts: Attribute prefix -> recurrent layer with these units.
        *widths: Key paths of the number of units in the config.
    """
    layers_inside = list(parts.values())
    for layer in layers_inside:
        if (gates := _GATES.get(plain_class(layer))) is None:
            raise CannotFollow(f"unknown class {plain_class(layer).__name__} inside it")
        functions = (layer.cell.activation, getattr(layer.cell, "recurrent_activation", None))
        if any(f is not None and f not in ELEMENTWISE for f in functions):
            raise CannotFollow(CUSTOM_ACTIVATION)
        if layer.stateful:
            raise CannotFollow("it is stateful")
        if layer.return_state:
            raise CannotFollow("it returns its states")
    if len(call.inputs) > 1:
        raise CannotFollow("it is called with initial states")
    units = layers_inside[0].units
    if any(layer.units != units for layer in layers_inside):
        raise CannotFollow("its directions have different numbers of units")

    source = flow.channels(call, -1)
    target = Channels(2, flow.new_slots(units), np.full(units, VARIES))
    # Inputs that are always zero can be removed. Other constants enter every gate and are kept.
    fixed = source.constants == 0
    weights: dict[str, dict[int, Channels]] = {}
    readers = []
    for prefix, layer in parts.items():
        cell, gates = layer.cell, _GATES[plain_class(layer)]
        columns = Channels(1, np.tile(target.slots, gates), np.full(gates * units, VARIES))
        weights |= {
            f"{prefix}cell.kernel": {0: source, 1: columns},
            f"{prefix}cell.recurrent_kernel": {0: target, 1: columns},
            f"{prefix}cell.bias": {0 if cell.bias is None else len(cell.bias.shape) - 1: columns},
        }
        inputs, between = (
            (array(kernel) != 0).reshape(-1, gates, units).any(axis=1)
            for kernel in (cell.kernel, cell.recurrent_kernel)
        )
        inputs &= ~fixed[:, None]
        readers += [
            Reader(source, target, inputs, np.zeros(inputs.shape), fixed),
            Reader(target, target, between, np.zeros(between.shape), np.zeros(units, bool)),
        ]
    steps = call.inputs[0].shape[1]
    flow.edit(call, Edit(weights, target, dict.fromkeys(widths, target), tuple(readers), steps))
    return target


# -- tables


@rule(layers.Embedding)
def _embedding(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    if flow.tensors[id(call.inputs[0])].axis is not None:
        raise CannotFollow("it looks up values that another layer computes")
    axis, size = len(call.output.shape) - 1, layer.output_dim
    target = Channels(axis, flow.new_slots(size), np.full(size, VARIES))
    flow.edit(call, Edit({"embeddings": {1: target}}, target, {("output_dim",): target}))
    return target
