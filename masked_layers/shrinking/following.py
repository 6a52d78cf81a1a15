"""Follows the channels of a model from its inputs to its outputs, through nested models too."""

from __future__ import annotations

from collections import Counter
from functools import reduce
from typing import Any

import keras

from masked_layers import _keras
from masked_layers.maskable import raw_variable
from masked_layers.paths import plain_class, walk
from masked_layers.shrinking import (  # noqa: F401 (they fill RULES)
    _keras_graph,
    attention_rules,
    keras_hub_rules,
    kernel_rules,
    normalization_rules,
    wrapper_rules,
)
from masked_layers.shrinking.channels import WHOLE, Call, CannotFollow, Channels, Flow
from masked_layers.shrinking.composites import inner_graph, is_composite, signature
from masked_layers.shrinking.rules import (
    CALLED_AGAIN,
    MASKED_POSITIONS,
    WITH_ARGUMENTS,
    foreign_name,
    rule_of,
)

OUTPUT = "an output of the model"


def graph_of(model: keras.Model) -> keras.Model:
    """Returns the graph of a model as a Functional model with the same layers.

    Raises:
        ValueError: If the model is neither Sequential nor Functional, overrides `call`, or is not
            built.
    """
    if not isinstance(model, (keras.Sequential, keras.Function)):
        raise ValueError(
            f"Expected a Sequential or Functional model, whose channels can be followed through "
            f"its graph. Received: '{model.name}' of class {type(model).__name__}. Pass the "
            "Sequential or Functional models inside it one at a time."
        )
    if not (model.built and model.inputs):
        raise ValueError(
            f"Following channels requires a built model, and '{model.name}' is not built. Start it "
            "with keras.Input, or call it on data first."
        )
    # A Sequential model that is called in another model has no `input`, but still has these lists.
    ends = (model.inputs, model.outputs)
    if isinstance(model, keras.Function):
        ends = (model.input, model.output)
    graph = keras.Model(*ends, name=model.name)
    if type(model).call not in (keras.Sequential.call, type(graph).call):
        raise ValueError(
            f"Channels can only be followed through a graph of layers, and {type(model).__name__} "
            f"('{model.name}') overrides `call`. Pass keras.Model(model.inputs, model.outputs) "
            "instead if it computes the same."
        )
    return graph


def follow(model: keras.Model) -> Flow:
    """Follows all channels from the inputs of a model to its outputs.

    Args:
        model: A built Sequential or Functional model, plain or masked.

    Returns:
        The channels of all tensors, before `Flow.settle` determines which of them are kept.

    Raises:
        ValueError: If the model is neither Sequential nor Functional, overrides `call`, or is not
            built.
    """
    flow = Flow()
    _add_graphs(flow, model, graph_of(model), "")
    obstacles = _obstacles(flow)
    whole = [WHOLE] * len(flow.graphs[id(model)].inputs)
    for channels in _through(flow, flow.graphs[id(model)], whole, obstacles):
        flow.pin(channels, OUTPUT)
    # A softmax at the end has pinned its input already, with another reason.
    ends = set(map(id, flow.graphs[id(model)].outputs))
    for operation, *_, outputs in _keras_graph.graph_calls(flow.graphs[id(model)]):
        if ends & set(map(id, outputs)) and id(operation) in flow.edits:
            made = flow.edits[id(operation)][1].made
            slots = [] if made is None else made.slots.tolist()
            flow.pinned.update({slot: OUTPUT for slot in slots if slot in flow.pinned})
    return flow


def variable_of(operation: Any, name: str) -> keras.Variable | None:
    """Returns the raw variable of a weight named as in `Edit.slices`, or None if it has none."""
    *owners, last = name.split(".")
    return raw_variable(reduce(getattr, owners, operation), last)


def _add_graphs(flow: Flow, model: keras.Layer, graph: keras.Model, prefix: str) -> None:
    """Records the graphs of a model and of all nested models and composite layers."""
    flow.graphs[id(model)] = graph
    calls = list(_keras_graph.graph_calls(graph))
    for operation, args, kwargs, _ in calls:
        flow.names.setdefault(id(operation), prefix + operation.name)
        known = flow.composites.get(id(operation))
        if known is not None and known != signature(args, kwargs):
            del flow.composites[id(operation)], flow.graphs[id(operation)]
            flow.opaque[id(operation)] = "called with different arguments"
        if id(operation) in flow.graphs or id(operation) in flow.opaque:
            continue
        if type(operation) in (keras.Sequential, type(graph)):
            inner = graph_of(operation)
        elif rule_of(operation) is None and is_composite(operation):
            try:
                inner = inner_graph(operation, args, kwargs)
            except CannotFollow as reason:
                flow.opaque[id(operation)] = str(reason)
                continue
            flow.composites[id(operation)] = signature(args, kwargs)
        else:
            continue
        _add_graphs(flow, operation, inner, f"{prefix}{operation.name}/")


def _through(
    flow: Flow, graph: keras.Model, sources: list[Channels], obstacles: dict[int, str]
) -> list[Channels]:
    """Follows channels through one graph, and returns the channels of its outputs."""
    flow.tensors.update(zip(map(id, graph.inputs), sources, strict=True))
    for operation, args, kwargs, outputs in _keras_graph.graph_calls(graph):
        inputs = _keras_graph.tensors_in((args, _besides_mask(operation, kwargs)))
        inner = flow.graphs.get(id(operation))
        name = flow.names[id(operation)]
        # What was left whole in one call is left whole in all of them.
        obstacle = obstacles.get(id(operation)) or flow.not_followed.get(name)
        try:
            if obstacle:
                raise CannotFollow(obstacle)
            if inner is not None:
                found = [flow.tensors[id(x)] for x in inputs]
                if id(operation) in flow.entered:
                    found = _enter_again(flow, inner, found)
                flow.entered.add(id(operation))
                results = _through(flow, inner, found, obstacles)
            else:
                call = Call(operation, inputs, outputs[0], args, kwargs)
                results = [_followed(flow, call)] * len(outputs)
                _pin_masks(flow, call)
        except CannotFollow as reason:
            flow.leave_whole(operation, inputs, str(reason))
            results = [WHOLE] * len(outputs)
        flow.tensors.update(zip(map(id, outputs), results, strict=True))
    return [flow.tensors[id(tensor)] for tensor in graph.outputs]


def _enter_again(flow: Flow, inner: keras.Model, sources: list[Channels]) -> list[Channels]:
    """Joins the inputs of another call of a nested model with those of the calls before.

    Returns:
        The channels of the inputs. Inputs that are left whole in one call are so in all of them.

    Raises:
        CannotFollow: If their channels lie along other axes. The model inside and the earlier
            inputs are then kept whole, too.
    """
    reason = f"'{inner.name}' is called again with other channels"
    before = [flow.tensors[id(tensor)] for tensor in inner.inputs]
    for first, source in zip(before, sources, strict=True):
        if None not in (first.axis, source.axis) and first.axis != source.axis:
            for tensor in inner.inputs:
                flow.pin(flow.tensors[id(tensor)], reason)
            _keep_inside(flow, inner, reason)
            raise CannotFollow("called with channels along different axes")
    entered = []
    for first, source in zip(before, sources, strict=True):
        if first.axis == source.axis:
            flow.join(first.slots, source.slots)
        else:
            flow.pin(first, reason)
            flow.pin(source, reason)
        entered.append(source if first.axis == source.axis else WHOLE)
    return entered


def _keep_inside(flow: Flow, graph: keras.Model, reason: str) -> None:
    """Keeps all channels that the layers of a graph make."""
    for operation, *_ in _keras_graph.graph_calls(graph):
        if id(operation) in flow.edits:
            flow.keep(flow.edits[id(operation)][1], reason)
        if id(operation) in flow.entered:
            _keep_inside(flow, flow.graphs[id(operation)], reason)


def _followed(flow: Flow, call: Call) -> Channels:
    """Follows a call by the rule of its operation, which may have been called before."""
    operation = call.operation
    follow_rule = rule_of(operation)
    assert follow_rule is not None  # Otherwise it has an obstacle.
    _, before = flow.edits.get(id(operation), (operation, None))
    called = id(operation) in flow.called
    flow.called.add(id(operation))
    result = follow_rule(flow, call)
    _, edit = flow.edits.get(id(operation), (operation, None))
    if not called or {plain_class(operation), foreign_name(operation)} & CALLED_AGAIN:
        return result
    if before is not None and edit is not None and edit is not before:
        flow.edit_again(operation, before, edit)
    elif edit is not None and (edit is before or before is None):
        # One of the calls has channels, and another one has none.
        flow.keep(edit, f"'{flow.names[id(operation)]}' is called again with other channels")
    return result


def _pin_masks(flow: Flow, call: Call) -> None:
    """Keeps all channels of tensors that a layer is given besides what its rule follows."""
    followed = attention_rules.operands(call)
    for tensor in _keras_graph.tensors_in((call.args, call.kwargs)):
        if not any(tensor is x for x in followed):
            name = flow.names[id(call.operation)]
            flow.pin(flow.tensors[id(tensor)], f"'{name}' takes it as a mask")


def _obstacles(flow: Flow) -> dict[int, str]:
    """Returns why operations cannot be followed, apart from what their rules check, by id."""
    calls = [call for graph in flow.graphs.values() for call in _keras_graph.graph_calls(graph)]
    times = Counter(id(part) for operation, *_ in calls for part in _called(flow, operation))
    direct = Counter(id(operation) for operation, *_ in calls)
    shared = _sharing(flow, [operation for operation, *_ in calls])
    obstacles: dict[int, str] = {}
    for operation, args, kwargs, _ in calls:
        cls = plain_class(operation)
        known_as = {cls, foreign_name(operation)}
        obstacle = flow.opaque.get(id(operation))
        if obstacle:
            pass
        elif not (known_as & WITH_ARGUMENTS or id(operation) in flow.composites) and not (
            all(map(_keras_graph.is_tensor, keras.tree.flatten(args)))
            and all(
                value is None or value is False
                for value in keras.tree.flatten(_besides_mask(operation, kwargs))
            )
        ):
            obstacle = "called with arguments other than tensors"
        elif cls not in MASKED_POSITIONS and any(
            map(_keras.carries_mask, _keras_graph.tensors_in((args, kwargs)))
        ):
            obstacle = "its input carries a Keras mask"
        elif id(operation) in flow.graphs and _renamed(flow, operation, args):
            obstacle = "called with a dict for inputs that are no such dict"
        elif id(operation) in flow.graphs:
            pass
        elif rule_of(operation) is None:
            obstacle = f"unknown class {cls.__name__}"
        elif id(operation) in shared:
            obstacle = "it shares a weight with another layer, which a smaller copy would not"
        elif cls is keras.layers.Reshape and times[id(operation)] > direct[id(operation)]:
            obstacle = "called inside another layer, too"
        elif _any_inside(operation, "quantization_mode"):
            obstacle = "quantized"
        elif _any_inside(operation, "lora_enabled"):
            obstacle = "LoRA is enabled"
        if obstacle:
            obstacles[id(operation)] = obstacle
    return obstacles


def _renamed(flow: Flow, operation: Any, args: tuple[Any, ...]) -> bool:
    """Returns True if a nested model is given a dict whose names Keras has to match."""
    if id(operation) in flow.composites or not (args and isinstance(args[0], dict)):
        return False
    inputs = flow.graphs[id(operation)].input
    return not isinstance(inputs, dict) or set(inputs) != set(args[0])


def _called(flow: Flow, operation: Any) -> list[Any]:
    """Returns the layers inside an operation that a call of it calls, except those of a graph."""
    if id(operation) in flow.graphs or not isinstance(operation, keras.Layer):
        return [operation]
    return [part for _, part in walk(operation)]


def _sharing(flow: Flow, operations: list[Any]) -> set[int]:
    """Returns the ids of layers that share a variable with another layer."""
    owners: dict[int, set[int]] = {}
    for operation in operations:
        if id(operation) not in flow.graphs:
            for variable in getattr(operation, "variables", ()):
                owners.setdefault(id(variable), set()).add(id(operation))
    return {owner for found in owners.values() if len(found) > 1 for owner in found}


def _any_inside(operation: Any, attribute: str) -> bool:
    """Returns True if an attribute of a layer or of a layer inside it is true."""
    parts = [part for _, part in walk(operation)] if isinstance(operation, keras.Layer) else []
    return any(getattr(part, attribute, None) for part in parts)


def _besides_mask(operation: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the keyword arguments of a call, without the Keras mask if the layer accepts one."""
    known = plain_class(operation) in MASKED_POSITIONS
    return {name: value for name, value in kwargs.items() if not (known and name == "mask")}
