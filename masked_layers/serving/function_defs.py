"""Smaller functions in the graph of a SavedModel, which compute the same."""

from __future__ import annotations

import itertools
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


_MOST_NUMBERS = 1024
"""Numbers in a constant up to which shorter forms of it are tried."""


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
    if node.op == "Const":
        _shorten_constant(node.attr["value"].tensor)


def _shorten_constant(tensor: Any) -> None:
    """Stores numbers with as many bytes as they need, and repeats of the last one not at all."""
    from tensorflow import as_dtype, make_ndarray

    fields = {"int32": "int_val", "int64": "int64_val", "float32": "float_val"}
    field = fields.get(as_dtype(tensor.dtype).name)
    if field is None:
        return
    values = make_ndarray(tensor).ravel()
    bits = values.view(f"i{values.itemsize}")  # A negative zero is not zero.
    different = np.flatnonzero(bits != bits[-1:])
    count = different[-1] + 2 if len(different) else int(bits.any())  # Nothing stands for zeros.
    if count > _MOST_NUMBERS:
        return
    shorter = type(tensor)(dtype=tensor.dtype, tensor_shape=tensor.tensor_shape)
    getattr(shorter, field).extend(values[:count].tolist())
    if shorter.ByteSize() < tensor.ByteSize():
        tensor.CopyFrom(shorter)


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
    elif function.control_ret:
        _end_together(function, nodes)
    _join_waits(function)
    needed = closure(
        map(node_of, (*function.ret.values(), *function.control_ret.values(), *captured)),
        lambda name: map(node_of, nodes[name].input) if name in nodes else (),
    )
    retain(function.node_def, lambda node: node.name in needed)


def _end_together(function: Any, nodes: Mapping[str, Any]) -> None:
    """Replaces the operations that a call waits for by an output, if it comes after all of them."""

    def before(name: str) -> Iterator[str]:
        return map(node_of, nodes[name].input) if name in nodes else iter(())

    for last in map(node_of, function.ret.values()):
        if last in nodes and set(function.control_ret.values()) <= closure([last], before):
            function.control_ret.clear()
            function.control_ret[last] = last
            function.signature.control_output[:] = [last]
            return


def _join_waits(function: Any) -> None:
    """Lets nodes wait for what other nodes wait for that do nothing else."""
    ends = {*function.ret.values(), *function.control_ret.values()}
    waits = {
        f"^{node.name}": list(node.input)
        for node in function.node_def
        if node.op == "NoOp" and node.name not in ends
    }
    for node in function.node_def:
        while any(reference in waits for reference in node.input):
            inputs = [waits.get(reference, [reference]) for reference in node.input]
            node.input[:] = dict.fromkeys(itertools.chain.from_iterable(inputs))


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


def named_arguments(function: Any) -> set[int]:
    """Returns the positions of the arguments that have a name by users."""
    return {i for i, found in function.arg_attr.items() if "_user_specified_name" in found.attr}


def shorten(function: Any, called: Mapping[str, str], *, outputs: bool) -> dict[str, str]:
    """Numbers the nodes of a function, and its outputs and arguments without names by users.

    Args:
        function: The function.
        called: New names of functions.
        outputs: Whether outputs are numbered.

    Returns:
        New names of its nodes and arguments, by their earlier names.
    """
    named = named_arguments(function)
    arguments = [argument.name for argument in function.signature.input_arg]
    kept = {arguments[i] for i in named}  # An input may be called "r0".
    free = {prefix: (name for name in numbered(prefix) if name not in kept) for prefix in ("r", "")}
    unnamed = (name for i, name in enumerate(arguments) if i not in named)
    short = dict(zip(unnamed, free["r"], strict=False))
    nodes = (node.name for node in function.node_def)
    short |= dict(zip(nodes, free[""], strict=False))
    for argument in function.signature.input_arg:
        argument.name = short.get(argument.name, argument.name)
    for node in function.node_def:
        node.name = short[node.name]
        node.input[:] = [renamed(reference, short) for reference in node.input]
        rename_calls(node, called)
    returned = {name: renamed(reference, short) for name, reference in function.ret.items()}
    function.ret.clear()
    for i, output in enumerate(function.signature.output_arg):
        reference = returned[output.name]
        output.name = f"o{i}" if outputs else output.name
        function.ret[output.name] = reference
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
