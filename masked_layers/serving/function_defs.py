"""Smaller functions in the graph of a SavedModel, which compute the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from masked_layers._tensorflow import is_stateful

_INFERRED = (
    "_class",
    "_collective_manager_ids",
    "config_proto",
    "_has_manual_control_dependencies",
    "_output_shapes",
    "_read_only_resource_inputs",
    "debug_name",
)
"""Attributes of nodes that every loader infers or sets itself, or that only help other tools. By
`_class` a node asks for the device of another one, as TensorFlow does for resources anyway."""


def references(node: Any) -> Iterator[str]:
    """Yields the names of functions and ops that a node calls."""
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def closure(start: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    """Returns the names that can be reached from some, these included."""
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(following(name))
    return found


def retain(messages: Any, keep: Callable[[Any], bool]) -> None:
    """Removes all but some messages from a repeated field."""
    kept = [message for message in messages if keep(message)]
    del messages[:]
    messages.extend(kept)


def node_of(reference: str) -> str:
    """Returns the name of the node in `"node"`, `"node:0"`, `"node:output:0"` or `"^node"`."""
    return reference.lstrip("^").partition(":")[0]


def strip(node: Any) -> None:
    """Removes what every loader infers from a node."""
    for name in _INFERRED:
        node.attr.pop(name, None)
    node.ClearField("experimental_debug_info")
    node.ClearField("experimental_type")


def reading(functions: Mapping[str, Any]) -> set[str]:
    """Returns the names of functions without other side effects than reading variables."""
    found = set(functions)
    while True:  # Until a pass finds no further function that calls one with side effects.
        others = {
            name
            for name in found
            for node in functions[name].node_def
            if not _only_reads(node, functions, found)
        }
        if not others:
            return found
        found -= others


def _only_reads(node: Any, functions: Mapping[str, Any], found: set[str]) -> bool:
    called = functions.keys() & set(references(node))
    if not called <= found:
        return False
    calls = node.op in functions or node.op == "StatefulPartitionedCall"
    return calls or node.op in ("ReadVariableOp", "VarHandleOp") or not is_stateful(node.op)


def simplify(function: Any, captured: Iterable[str], *, only_reads: bool) -> None:
    """Removes repeated constants, and nodes without a use.

    Args:
        function: The function.
        captured: Names of nodes whose outputs other functions use; they stay as they are.
        only_reads: Whether it has no side effects. Then its nodes need no order, and identities are
            left out, too.
    """
    nodes = {node.name: node for node in function.node_def}
    captured = set(captured)
    renamed: dict[str, str] = {}  # References to nodes that are left out.
    constants: dict[bytes, str] = {}
    if only_reads:
        for node in function.node_def:
            retain(node.input, lambda reference: not reference.startswith("^"))
        _infer_batch(nodes, {*map(node_of, function.ret.values()), *captured})
    for node in function.node_def:
        if node.op == "Const" and not node.input:
            same = constants.setdefault(_content(node), node.name)
            renamed[f"{node.name}:output:0"] = f"{same}:output:0"
        elif only_reads and node.op == "Identity" and node_of(node.input[0]) in nodes:
            renamed[f"{node.name}:output:0"] = node.input[0]

    def resolved(reference: str) -> str:
        while renamed.get(reference, reference) != reference:
            reference = renamed[reference]
        return reference

    for node in function.node_def:
        node.input[:] = [resolved(reference) for reference in node.input]
    for name, reference in list(function.ret.items()):
        function.ret[name] = resolved(reference)
    if only_reads:
        function.control_ret.clear()
        del function.signature.control_output[:]
    needed = closure(
        map(node_of, (*function.ret.values(), *function.control_ret.values(), *captured)),
        lambda name: map(node_of, nodes[name].input) if name in nodes else (),
    )
    retain(function.node_def, lambda node: node.name in needed)


def _infer_batch(nodes: Mapping[str, Any], returned: set[str]) -> None:
    """Replaces the shape [batch, constants...] of `Reshape` by [-1, constants...].

    Keras computes it by several operations, for example in `Flatten`.

    Args:
        nodes: Nodes of a function, by name.
        returned: Names of the nodes whose outputs are used outside of it.
    """
    from tensorflow import as_dtype, make_ndarray, make_tensor_proto

    consumers: dict[str, list[Any]] = {}
    for node in nodes.values():
        for position, reference in enumerate(node.input):
            consumers.setdefault(node_of(reference), []).append((node.op, position))
    for node in nodes.values():
        inputs: list[Any] = [nodes.get(node_of(reference)) for reference in node.input]
        if node.op != "Pack" or {*consumers.get(node.name, ())} != {("Reshape", 1)}:
            continue
        if node.name in returned:
            continue
        if None in inputs or any(source.op != "Const" for source in inputs[1:]):
            continue
        sizes = [make_ndarray(source.attr["value"].tensor) for source in inputs[1:]]
        if inputs[0].op == "Const" or not all(size.ndim == 0 and size > 0 for size in sizes):
            continue
        dtype = as_dtype(node.attr["T"].type)
        node.op = "Const"
        del node.input[:]
        node.attr.clear()
        node.attr["dtype"].type = dtype.as_datatype_enum
        value = make_tensor_proto(np.array([-1, *sizes], dtype.as_numpy_dtype))
        node.attr["value"].tensor.CopyFrom(value)


def _content(node: Any) -> bytes:
    attributes = sorted((name, value.SerializeToString()) for name, value in node.attr.items())
    return repr((attributes, node.device)).encode()


def shorten(function: Any, called: Mapping[str, str]) -> dict[str, str]:
    """Numbers the nodes of a function and the resources among its arguments.

    Args:
        function: The function.
        called: New names of functions.

    Returns:
        New names of its nodes and arguments, by their earlier names.
    """
    from tensorflow.core.framework import types_pb2

    # Names of other arguments are those of the model's inputs.
    arguments = {
        argument.name: f"r{i}"
        for i, argument in enumerate(function.signature.input_arg)
        if argument.type == types_pb2.DT_RESOURCE
    }
    kept = {argument.name for argument in function.signature.input_arg} - arguments.keys()
    free = (name for name in numbered("") if name not in kept)
    short = arguments | {
        node.name: name for node, name in zip(function.node_def, free, strict=False)
    }
    for argument in function.signature.input_arg:
        argument.name = short.get(argument.name, argument.name)
    for node in function.node_def:
        node.name = short[node.name]
        node.input[:] = [renamed(reference, short) for reference in node.input]
        rename_calls(node, called)
    for name, reference in list(function.ret.items()):
        function.ret[name] = renamed(reference, short)
    controls = {name: short[node] for name, node in function.control_ret.items()}
    function.signature.control_output[:] = [
        controls[name] for name in function.signature.control_output
    ]
    function.control_ret.clear()
    function.control_ret.update({node: node for node in controls.values()})
    function.signature.name = called[function.signature.name]
    return short


def numbered(prefix: str) -> Iterator[str]:
    """Yields short names without end."""
    i = 0
    while True:
        yield f"{prefix}{np.base_repr(i, 36)}"
        i += 1


def rename_calls(node: Any, called: Mapping[str, str]) -> None:
    """Renames the functions that a node calls."""
    node.op = called.get(node.op, node.op)
    for value in node.attr.values():
        for function in (value.func, *value.list.func):
            if function.name in called:
                function.name = called[function.name]


def renamed(reference: str, names: Mapping[str, str]) -> str:
    """Returns a reference to a node, an output of one or an argument with another name."""
    caret = "^" * reference.startswith("^")
    name, colon, output = reference[len(caret) :].partition(":")
    return f"{caret}{names.get(name, name)}{colon}{output}"
