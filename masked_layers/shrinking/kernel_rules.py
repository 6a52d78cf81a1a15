"""Rules for layers that make new channels, most of them by mixing channels with a kernel."""

from __future__ import annotations

import dataclasses
import math
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
    MIXING,
    apply,
    array,
    border,
    depthwise,
    foreign_rule,
    is_elementwise,
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
    width: tuple[str | int, ...],
    lost: str | None = None,
    *,
    entry: Channels | None = None,
    places: int | None = -1,
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
        width: Key path of the number of outputs in the layer's config.
        lost: Why only constants of zero can be moved into the bias exactly. None if all can.
        entry: As in `Reader`.
        places: Number of multiply-adds of each kernel entry. -1 for the positions of the output.
    """
    layer = call.operation
    followed = layer.activation is None or is_elementwise(layer.activation)
    if not followed and isinstance(layer.activation, keras.Layer):
        raise CannotFollow(CUSTOM_ACTIVATION)  # It may have weights.
    constant = ~np.isnan(source.constants)
    fixed = constant & (source.constants == 0) if lost else constant
    flow.lose(source.slots[constant & ~fixed & reads.any(axis=1)], lost or "")
    demand = reads & ~fixed[:, None]
    values = constant_shift(source.constants, gain, fixed)
    if layer.bias is not None:
        values += array(layer.bias)
    values[demand.any(axis=0)] = VARIES

    slots = flow.new_slots(reads.shape[1])
    if followed:
        activation = layer.activation or keras.activations.linear
        values = apply(activation, values, call.output.dtype)
    target = Channels(source.axis, slots, values)
    reader = Reader(source, target, demand, gain, fixed, entry)
    weights = slices(target) | {"bias": {0: target}}
    if places == -1:
        # A transposed convolution applies its kernel once per position of its input.
        tensor = call.inputs[0] if isinstance(layer, _TRANSPOSED) else call.output
        places = positions(tensor, source.axis)
    widths = {width: target}
    flow.edit(call, Edit(weights, target, widths=widths, readers=(reader,), positions=places))
    if followed:
        return target
    flow.pin(target, f"the activation of '{flow.names[id(layer)]}' reads all channels")
    if layer.activation not in MIXING:
        flow.not_followed[flow.names[id(layer)]] = CUSTOM_ACTIVATION
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
        ("units",),
    )


@rule(layers.EinsumDense)
def _einsum_dense(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    operands, outputs = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    made = [label for label in outputs.replace(".", "") if label not in inputs]
    if len(made) != 1 or made[0] not in kernel:
        raise CannotFollow("it does not make exactly one axis of outputs")
    axis = _labelled_axis(outputs, made[0], call.output)
    read = [label for label in kernel if label in inputs and label not in outputs]
    where = {_labelled_axis(inputs, label, call.inputs[0]): label for label in read}
    known = flow.tensors[id(call.inputs[0])].axis
    if not where or known not in (None, *where):
        raise CannotFollow("it sums over axes other than the channels")
    along = max(where) if known is None else known
    source = flow.channels(call, along)
    if layer.bias is not None and layer.bias_axes != made[0]:
        raise CannotFollow("its bias has other axes than that of its outputs")
    rows, columns = kernel.index(where[along]), kernel.index(made[0])
    weights = np.moveaxis(array(layer.kernel), (rows, columns), (-2, -1))
    others = tuple(range(weights.ndim - 2))
    between = {_labelled_axis(inputs, label, call.inputs[0]) for label in kernel if label in inputs}
    places = [size for i, size in enumerate(call.inputs[0].shape) if i not in {0, *between}]
    # The config leaves out the batch axis and those of an ellipsis.
    place = outputs.replace("...", "").index(made[0]) - (not outputs.startswith("..."))
    target = _mix(
        flow,
        call,
        source,
        (weights != 0).any(others),
        weights.sum(others, dtype="float64"),
        lambda out: {"kernel": {rows: source, columns: out}},
        ("output_shape", place),
        f"'{flow.names[id(layer)]}' cannot be given a bias for a constant",
        places=None if None in places else math.prod(places),
    )
    return target if target is WHOLE else target.with_constants(target.constants, axis)


def _labelled_axis(labels: str, label: str, tensor: keras.KerasTensor) -> int:
    """Returns the axis of a tensor that a letter of an einsum equation names."""
    before, dots, after = labels.partition("...")
    if label in before or not dots:
        return before.index(label)
    return len(tensor.shape) - len(after) + after.index(label)


@rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def _convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    source, kernel = flow.channels(call, call.axis), array(layer.kernel)
    if layer.groups == len(source.slots) > 1:
        return depthwise(flow, call, source, kernel, grouped=True)
    taps = tuple(range(kernel.ndim - 2))
    reads, gain = (kernel != 0).any(taps), kernel.sum(taps, dtype="float64")
    if layer.groups > 1:
        return _grouped(flow, call, source, reads, gain)
    return _mix(
        flow,
        call,
        source,
        reads,
        gain,
        lambda out: {"kernel": {-2: source, -1: out}},
        ("filters",),
        border(flow, layer) if pads(layer) else None,
    )


def _grouped(
    flow: Flow, call: Call, source: Channels, reads: np.ndarray, gain: np.ndarray
) -> Channels:
    """Follows a grouped convolution, in which all groups keep the same positions of their channels.

    Args:
        flow: The analysis.
        call: The call of the layer.
        source: The layer's input channels, those of each group side by side.
        reads: Bool (inputs of a group, outputs of all groups), as for `_mix`.
        gain: As for `_mix`, of the same shape.
    """
    layer = call.operation
    groups, (inputs, outputs) = layer.groups, reads.shape
    of_group = np.repeat(np.arange(groups), outputs // groups)
    between = np.repeat(np.arange(groups), inputs)[:, None] == of_group
    reads, gain = (np.where(between, np.tile(part, (groups, 1)), 0) for part in (reads, gain))
    entry = Channels(source.axis, source.slots[:inputs], source.constants[:inputs])
    for group in range(1, groups):
        flow.join(entry.slots, source.slots[group * inputs : (group + 1) * inputs])

    def slices(out: Channels) -> dict[str, dict[int, Channels]]:
        for group in range(1, groups):
            part = slice(group * outputs // groups, (group + 1) * outputs // groups)
            flow.join(out.slots[: outputs // groups], out.slots[part])
        return {"kernel": {-2: entry, -1: out}}

    reads = reads.astype(bool)
    reason = border(flow, layer) if pads(layer) else None
    return _mix(flow, call, source, reads, gain, slices, ("filters",), reason, entry=entry)


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
        ("filters",),
        # The number of taps in the sum of an output depends on its position.
        border(flow, call.operation),
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
        ("filters",),
        border(flow, layer) if pads(layer) else None,
    )


# --- Recurrent layers -----------------------------------------------------------------------------


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
        if any(f is not None and not is_elementwise(f) for f in functions):
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
    flow.edit(call, Edit(weights, target, {}, dict.fromkeys(widths, target), tuple(readers), steps))
    return target


# --- Tables ---------------------------------------------------------------------------------------


@foreign_rule("keras_hub.ReversibleEmbedding")
@rule(layers.Embedding, layers.ReversibleEmbedding)
def _embedding(flow: Flow, call: Call) -> Channels:
    """Follows one of the calls of a table of words, which all have the same channels."""
    layer, source = call.operation, flow.tensors[id(call.inputs[0])]
    reverse = call.kwargs.get("reverse", call.args[1] if len(call.args) > 1 else False)
    if reverse:
        source = flow.channels(call, -1)
    elif source.axis is not None:
        raise CannotFollow("it looks up values that another layer computes")
    _, known = flow.edits.get(id(layer), (layer, None))
    edit = known or _table(flow, layer)
    made = edit.made
    assert made is not None
    if reverse:
        flow.join(source.slots, made.slots)
        edit = _with_reader(edit, call, source)
    flow.edit(call, edit)
    if reverse:
        return WHOLE
    return made.with_constants(made.constants, len(call.output.shape) - 1)


def _table(flow: Flow, layer: Any) -> Edit:
    """Returns the changes to a table of words, with new channels."""
    made = array(layer.embeddings).any(axis=0)
    target = Channels(None, flow.new_slots(layer.output_dim), np.where(made, VARIES, 0.0))
    weights = {"embeddings": {1: target}}
    if getattr(layer, "reverse_embeddings", None) is not None:
        weights["reverse_embeddings"] = {0: target}
    return Edit(weights, target, widths={("output_dim",): target})


def _with_reader(edit: Edit, call: Call, source: Channels) -> Edit:
    """Adds a call that scores all words by their products with the input."""
    name = "embeddings"
    table = array(call.operation.embeddings).T
    slices = edit.slices
    if "reverse_embeddings" in slices:
        name, table = "reverse_embeddings", array(call.operation.reverse_embeddings)
        slices = slices | {name: {0: source}}
    fixed = source.constants == 0
    words = Channels(None, np.zeros(1, int), np.full(1, VARIES))  # All words stay.
    demand = (table.any(axis=1) & ~fixed)[:, None]
    reader = Reader(source, words, demand, np.zeros(demand.shape), fixed)
    before = edit.positions[name] if isinstance(edit.positions, dict) else 0
    places = positions(call.inputs[0], source.axis)
    total = None if places is None or before is None else before + places
    readers = (*edit.readers, reader)
    return dataclasses.replace(edit, slices=slices, readers=readers, positions={name: total})
