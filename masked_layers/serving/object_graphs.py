"""A smaller object graph of a SavedModel, from which the same objects are restored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from masked_layers.serving.function_defs import closure, node_of, retain

_CALLS = ("_create_resource", "_initialize", "_destroy_resource")
"""The functions of a resource, which are called without arguments."""


def share_signatures(meta: Any) -> None:
    """Lets equal signatures share one function: `serve` takes that of `serving_default`.

    The function that is no longer used is left in the graph.
    """
    meta.signature_def["serve"].CopyFrom(meta.signature_def["serving_default"])
    for node in meta.object_graph_def.nodes:
        if node.user_object.identifier == "signature_map":
            ids = {child.local_name: child.node_id for child in node.children}
            for child in node.children:
                child.node_id = ids["serving_default"]


def simplify(graph: Any, without_effect: set[str], gradients: set[str]) -> None:
    """Removes objects that are not needed for loading.

    Args:
        graph: The `SavedObjectGraph`.
        without_effect: Names of functions without effect.
        gradients: Names of the functions that compute custom gradients. No object refers to them.
    """
    gradients = gradients & set(graph.concrete_functions)
    for node in graph.nodes:
        if node.HasField("function"):
            # The traces of a function are listed in it, too.
            for edges in (node.children, node.dependencies):
                retain(edges, lambda edge: not edge.local_name.startswith("trace_"))
        if node.HasField("bare_concrete_function"):
            # The function itself states its arguments, too.
            node.bare_concrete_function.ClearField("function_spec")
    for node in graph.nodes:
        if node.HasField("resource"):
            _call_directly(graph, node, without_effect)
    following = {str(i): [str(j) for j in _following(graph, i)] for i in range(len(graph.nodes))}
    ends = [str(i) for name in gradients for i in graph.concrete_functions[name].bound_inputs]
    kept = sorted(map(int, closure(["0", *ends], following.__getitem__)))
    new = {old: i for i, old in enumerate(kept)}
    nodes = [graph.nodes[old] for old in kept]
    for node in nodes:
        for edge in (*node.children, *node.dependencies):
            edge.node_id = new[edge.node_id]
        for slot in node.slot_variables:
            slot.original_variable_node_id = new[slot.original_variable_node_id]
            slot.slot_variable_node_id = new[slot.slot_variable_node_id]
        for saveable in node.saveable_objects.values():
            saveable.save_function = new[saveable.save_function]
            saveable.restore_function = new[saveable.restore_function]
    del graph.nodes[:]
    graph.nodes.extend(nodes)
    used = {*concrete_functions(graph), *gradients}
    for name in set(graph.concrete_functions) - used:
        del graph.concrete_functions[name]
    for function in graph.concrete_functions.values():
        function.bound_inputs[:] = [new[i] for i in function.bound_inputs]
        output = function.output_signature.tensor_spec_value
        if output.name == "unknown":  # TensorFlow's name for an output without one.
            output.ClearField("name")


def concrete_functions(graph: Any) -> Iterator[str]:
    """Yields the names of the functions that objects of a graph refer to."""
    for node in graph.nodes:
        yield from node.function.concrete_functions
        for name in (
            node.bare_concrete_function.concrete_function_name,
            node.captured_tensor.concrete_function,
        ):
            if name:
                yield name


def captured_nodes(graph: Any) -> dict[str, set[str]]:
    """Returns the names of the nodes inside functions whose outputs custom gradients use."""
    found: dict[str, set[str]] = {}
    for node in graph.nodes:
        if node.HasField("captured_tensor"):
            tensor = node.captured_tensor
            found.setdefault(tensor.concrete_function, set()).add(node_of(tensor.name))
    return found


def _call_directly(graph: Any, resource: Any, without_effect: set[str]) -> None:
    """Replaces functions with a signature by what they call, if this is a single function."""
    for child in list(resource.children):
        function = graph.nodes[child.node_id]
        names = list(function.function.concrete_functions)
        if child.local_name not in _CALLS or len(names) != 1:
            continue
        if child.local_name == "_destroy_resource" and names[0] in without_effect:
            resource.children.remove(child)
            continue
        function.ClearField("function")
        function.bare_concrete_function.concrete_function_name = names[0]


def _following(graph: Any, i: int) -> Iterator[int]:
    node = graph.nodes[i]
    for edge in (*node.children, *node.dependencies):
        yield edge.node_id
    for slot in node.slot_variables:
        yield slot.original_variable_node_id
        yield slot.slot_variable_node_id
    for saveable in node.saveable_objects.values():
        yield saveable.save_function
        yield saveable.restore_function
    names = [*node.function.concrete_functions, node.bare_concrete_function.concrete_function_name]
    for name in filter(None, names):
        yield from graph.concrete_functions[name].bound_inputs
