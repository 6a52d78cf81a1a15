"""Rules for wrappers: layers that apply another layer, which has its own rule."""

from __future__ import annotations

import dataclasses

import keras
from keras import layers

from masked_layers.paths import plain_class
from masked_layers.shrinking.channels import Call, CannotFollow, Channels, Flow
from masked_layers.shrinking.rules import rule, rule_of

# Layers that are given more than one tensor, or call another layer themselves.
_OTHER_ARGUMENTS = (layers.MultiHeadAttention, layers.GroupQueryAttention, layers.TimeDistributed)


@rule(layers.TimeDistributed)
def _time_distributed(flow: Flow, call: Call) -> Channels:
    layer, tensor = call.operation, call.inputs[0]
    inner, source = layer.layer, flow.tensors[id(call.inputs[0])]
    inner_rule = rule_of(inner)
    if inner_rule is None or isinstance(inner, _OTHER_ARGUMENTS):
        raise CannotFollow(f"unknown class {plain_class(inner).__name__} inside it")
    if source.axis == 1:
        raise CannotFollow("works along its steps, as the channels do")
    step, output = (
        keras.KerasTensor((x.shape[0], *x.shape[2:]), dtype=x.dtype) for x in (tensor, call.output)
    )
    flow.tensors[id(step)] = _moved(source, -1)
    flow.names[id(inner)] = flow.names[id(layer)]
    try:
        target = inner_rule(flow, Call(inner, [step], output, (step,)))
    finally:
        del flow.tensors[id(step)]
    if id(inner) in flow.edits:
        _, edit = flow.edits.pop(id(inner))
        assert not isinstance(edit.positions, dict)
        steps = tensor.shape[1]
        edit = dataclasses.replace(
            edit,
            slices={f"layer.{name}": axes for name, axes in edit.slices.items()},
            widths={("layer", "config", *place): x for place, x in edit.widths.items()},
            positions=None if steps is None or edit.positions is None else edit.positions * steps,
            inside=("layer",),
        )
        flow.edit(call, edit)
    return _moved(target, 1)


def _moved(channels: Channels, by: int) -> Channels:
    if channels.axis is None:
        return channels
    return channels.with_constants(channels.constants, channels.axis + by)
