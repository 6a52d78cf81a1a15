"""Removes the parts of a SavedModel's graph that no loader needs."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def compact(file: Path, prefix: str, content: bytes, *, keep_saver: bool) -> None:
    """Removes the parts of a SavedModel's graph that no loader needs.

    In a small model these are about half of the folder.

    Args:
        file: Path of the `saved_model.pb`.
        prefix: Prefix of the names of the model's variables.
        content: The packed weights. The new prefix is a hash of the earlier one and of them, since
            variables with the same name are the same variable in a session, and the same model may
            be exported with other values.
        keep_saver: Whether the checkpoint contains values. If not, the graph that saves and
            restores them is removed too.
    """
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    (meta,) = model.meta_graphs
    graph = meta.graph_def
    # Only older runtimes use it; default values that these do not know are already stripped.
    meta.meta_info_def.ClearField("stripped_op_list")
    if not keep_saver:
        meta.ClearField("saver_def")

    roots = {
        tensor.name.partition(":")[0]
        for signature in meta.signature_def.values()
        for tensor in (*signature.inputs.values(), *signature.outputs.values())
    }
    roots |= {asset.tensor_info.name.partition(":")[0] for asset in meta.asset_file_def}
    if keep_saver:
        saver = meta.saver_def
        names = (saver.filename_tensor_name, saver.save_tensor_name, saver.restore_op_name)
        roots |= {name.partition(":")[0] for name in names}
    nodes = {node.name: node for node in graph.node}
    kept = _closure(
        roots, lambda name: (i.lstrip("^").partition(":")[0] for i in nodes[name].input)
    )
    _retain(graph.node, lambda node: node.name in kept)

    functions = {function.signature.name: function for function in graph.library.function}
    called = {name for node in graph.node for name in _functions_of(node)}
    called |= set(meta.object_graph_def.concrete_functions)
    called = _closure(
        called & functions.keys(),
        lambda name: (
            inner
            for node in functions[name].node_def
            for inner in _functions_of(node)
            if inner in functions
        ),
    )
    _retain(graph.library.function, lambda function: function.signature.name in called)
    _retain(graph.library.gradient, lambda gradient: gradient.function_name in called)
    for node in itertools.chain(graph.node, *(f.node_def for f in graph.library.function)):
        # Every loader infers the shapes inside the graph, and debug names are only for messages.
        node.attr.pop("_output_shapes", None)
        node.attr.pop("debug_name", None)
    for function in graph.library.function:
        if function.signature.name.startswith("__inference__initializer_"):
            _shorten_names(function)  # The serving function keeps the names of the layers.
        for i, argument in enumerate(function.signature.input_arg):
            if argument.type == types_pb2.DT_RESOURCE:
                del function.arg_attr[i]  # It states only that a handle is a scalar.
    _rename_variables(meta, prefix, hashlib.sha256(prefix.encode() + content).hexdigest()[:10])
    file.write_bytes(model.SerializeToString(deterministic=True))


def _rename_variables(meta: Any, old: str, new: str) -> None:
    for node in meta.graph_def.node:
        if node.op == "VarHandleOp":
            shared = node.attr["shared_name"].s.decode()
            # TensorFlow names the variable with an asset's path "Variable" in every model.
            kept = "path" if shared == "Variable" else shared.removeprefix(f"{old}/")
            node.attr["shared_name"].s = f"{new}/{kept}".encode()
    for item in meta.object_graph_def.nodes:
        if item.variable.name.startswith(f"{old}/"):
            item.variable.name = f"{new}/{item.variable.name.removeprefix(f'{old}/')}"


def _shorten_names(function: Any) -> None:
    """Numbers the nodes of a function, since names are a tenth of a small model's graph."""
    short = {node.name: np.base_repr(i, 36) for i, node in enumerate(function.node_def)}

    def renamed(reference: str) -> str:
        # "^node" for a control input, "node:output:0" for a value, or the name of an argument.
        caret = "^" * reference.startswith("^")
        name, colon, output = reference[len(caret) :].partition(":")
        return f"{caret}{short.get(name, name)}{colon}{output}"

    for node in function.node_def:
        node.name = short[node.name]
        node.input[:] = [renamed(reference) for reference in node.input]
    for name, reference in function.ret.items():
        function.ret[name] = renamed(reference)
    controls = {name: short[node] for name, node in function.control_ret.items()}
    function.signature.control_output[:] = [
        controls[name] for name in function.signature.control_output
    ]
    function.control_ret.clear()
    function.control_ret.update({node: node for node in controls.values()})


def _closure(start: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    found: set[str] = set()
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting.extend(following(name))
    return found


def _functions_of(node: Any) -> Iterator[str]:
    yield node.op
    for value in node.attr.values():
        yield value.func.name
        yield from (function.name for function in value.list.func)


def _retain(messages: Any, keep: Callable[[Any], bool]) -> None:
    kept = [message for message in messages if keep(message)]
    del messages[:]
    messages.extend(kept)
