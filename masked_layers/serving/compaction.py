"""Removes the parts of a SavedModel that no loader needs: of its graph and its checkpoint."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masked_layers.serving import function_defs, object_graphs
from masked_layers.serving.function_defs import closure, node_of, references, retain

_OBJECTS = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""Name of the entry of a checkpoint that lists the objects."""


def compact(folder: Path, prefix: str, content: bytes, *, keep_saver: bool) -> None:
    """Removes the parts of a SavedModel that no loader needs, apart from its assets.

    In a small model these are most of the folder. Nodes and functions are numbered. The names of
    inputs and outputs stay, and so do those of signatures and objects.

    Args:
        folder: Path of the SavedModel.
        prefix: Prefix of the names of the model's variables.
        content: The packed weights. The new prefix of variables and functions is a hash of the
            earlier one, of them and of the graph: in a session, those with the same name are the
            same, and a model may be exported with other values, or other models have its weights.
        keep_saver: Whether the checkpoint contains values. If not, the graph that saves and
            restores them is removed too.
    """
    _compact_graph(folder / "saved_model.pb", prefix, content, keep_saver)
    if not keep_saver:
        _compact_checkpoint(folder / "variables" / "variables")
    # A hash of the graph before compaction, which loaders do not require.
    (folder / "fingerprint.pb").unlink(missing_ok=True)


def _compact_graph(file: Path, prefix: str, content: bytes, keep_saver: bool) -> None:
    from tensorflow.core.protobuf import saved_model_pb2

    model = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    (meta,) = model.meta_graphs
    # Only older runtimes use the list of ops; default values that these do not know are already
    # stripped. The operation that initializes has a signature, which all loaders prefer.
    meta.meta_info_def.ClearField("stripped_op_list")
    meta.meta_info_def.ClearField("tensorflow_git_version")
    meta.collection_def.pop("saved_model_main_op", None)
    if not keep_saver:
        meta.ClearField("saver_def")
    object_graphs.share_signatures(meta)

    _feed_assets(meta)
    library = meta.graph_def.library
    functions = {function.signature.name: function for function in library.function}
    for node in itertools.chain(meta.graph_def.node, *(f.node_def for f in library.function)):
        function_defs.strip(node)
    pure = function_defs.reading(functions)
    gradients = {gradient.gradient_func for gradient in library.registered_gradients}
    object_graphs.simplify(meta.object_graph_def, pure, gradients)
    captured = object_graphs.captured_nodes(meta.object_graph_def)
    for name, function in functions.items():
        function_defs.simplify(function, captured.get(name, ()), only_reads=name in pure)
        _strip_function(function)
    _remove_unused(meta, functions, _ends(meta), gradients)
    _shorten(meta, "f")
    graph = meta.graph_def.SerializeToString(deterministic=True)
    digest = hashlib.sha256(prefix.encode())
    digest.update(content)
    digest.update(graph)
    hashed = np.base_repr(int.from_bytes(digest.digest()[:5], "big"), 36).lower()
    _rename_variables(meta, prefix, hashed)
    _shorten(meta, f"f{hashed}")
    file.write_bytes(model.SerializeToString(deterministic=True))


def _compact_checkpoint(prefix: Path) -> None:
    """Removes all objects but variables from a checkpoint without values.

    `tf.saved_model.load` expects to find in it the variables among the attributes of the root.
    """
    import tensorflow as tf
    from tensorflow.core.protobuf import trackable_object_graph_pb2

    content = tf.train.load_checkpoint(str(prefix)).get_tensor(_OBJECTS)
    graph = trackable_object_graph_pb2.TrackableObjectGraph.FromString(content)
    root = graph.nodes[0]
    retain(root.children, lambda child: child.local_name == "variables")
    kept = sorted(map(int, closure(["0"], lambda i: _children(graph.nodes[int(i)]))))
    new = {old: i for i, old in enumerate(kept)}
    nodes = [graph.nodes[old] for old in kept]
    for node in nodes:
        for child in node.children:
            child.node_id = new[child.node_id]
    del graph.nodes[:]
    graph.nodes.extend(nodes)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=[_OBJECTS],
        shape_and_slices=[""],
        tensors=[tf.constant(graph.SerializeToString(deterministic=True))],
    )


def _children(node: Any) -> Iterator[str]:
    return (str(child.node_id) for child in node.children)


def _ends(meta: Any) -> set[str]:
    """Returns the names of the nodes by which loaders use the graph."""
    tensors = [asset.tensor_info for asset in meta.asset_file_def]
    for signature in meta.signature_def.values():
        tensors += [*signature.inputs.values(), *signature.outputs.values()]
    names = {node_of(tensor.name) for tensor in tensors}
    objects = meta.object_graph_def.nodes
    names |= {item.constant.operation for item in objects if item.HasField("constant")}
    if meta.HasField("saver_def"):
        saver = meta.saver_def
        for name in (saver.filename_tensor_name, saver.save_tensor_name, saver.restore_op_name):
            names.add(node_of(name))
    return names


def _feed_assets(meta: Any) -> None:
    """Passes the paths of assets on directly, which TensorFlow writes to variables first."""
    nodes = {node.name: node for node in meta.graph_def.node}
    assets = {node_of(asset.tensor_info.name) for asset in meta.asset_file_def}
    paths = {
        node_of(node.input[0]): node_of(node.input[1])
        for node in nodes.values()
        if node.op == "AssignVariableOp" and node_of(node.input[1]) in assets
    }
    reads = {
        node.name: paths[node_of(node.input[0])]
        for node in nodes.values()
        if node.op == "ReadVariableOp" and node_of(node.input[0]) in paths
    }
    written = {
        f"^{node.name}"
        for node in nodes.values()
        if node.op == "AssignVariableOp" and node_of(node.input[0]) in paths
    }
    for node in nodes.values():
        retain(node.input, lambda reference: reference not in written)
        node.input[:] = [function_defs.renamed(reference, reads) for reference in node.input]


def _remove_unused(
    meta: Any, functions: Mapping[str, Any], ends: set[str], gradients: set[str]
) -> None:
    graph = meta.graph_def
    nodes = {node.name: node for node in graph.node}
    kept = closure(ends, lambda name: map(node_of, nodes[name].input))
    retain(graph.node, lambda node: node.name in kept)
    called = {name for node in graph.node for name in references(node)}
    called |= {*object_graphs.concrete_functions(meta.object_graph_def), *gradients}
    called = closure(
        called & functions.keys(),
        lambda name: (
            inner
            for node in functions[name].node_def
            for inner in references(node)
            if inner in functions
        ),
    )
    retain(graph.library.function, lambda function: function.signature.name in called)
    retain(graph.library.gradient, lambda gradient: gradient.function_name in called)


def _strip_function(function: Any) -> None:
    from tensorflow.core.framework import types_pb2

    # The shapes of the arguments are in their attributes, too.
    function.attr.pop("_input_shapes", None)
    function.attr.pop("_construction_context", None)
    # Where a variable is read, its shape is needed. Calls and assignments do without it.
    used = {
        node_of(reference)
        for node in function.node_def
        if node.op not in ("AssignVariableOp", "PartitionedCall", "StatefulPartitionedCall")
        for reference in node.input
    }
    named = function_defs.named_arguments(function)
    for i, argument in enumerate(function.signature.input_arg):
        if argument.type == types_pb2.DT_STRING and i not in named:
            function.arg_attr.pop(i, None)  # It states only that a path is a scalar.
        if argument.type == types_pb2.DT_RESOURCE:
            function.arg_attr.pop(i, None)  # The same of a handle.
            if argument.name not in used:
                argument.ClearField("handle_data")


def _rename_variables(meta: Any, old: str, new: str) -> None:
    for node in meta.graph_def.node:
        if node.op == "VarHandleOp":
            shared = node.attr["shared_name"].s.decode().removeprefix(f"{old}/")
            node.attr["shared_name"].s = f"{new}/{shared}".encode()
    for item in meta.object_graph_def.nodes:
        if item.variable.name.startswith(f"{old}/"):
            item.variable.name = f"{new}/{item.variable.name.removeprefix(f'{old}/')}"


def _shorten(meta: Any, prefix: str) -> None:
    """Numbers functions, and nodes that nothing outside the graph refers to.

    Names are a third of a graph. Functions of two models in one session must have different names.
    """
    graph, objects = meta.graph_def, meta.object_graph_def
    names = (function.signature.name for function in graph.library.function)
    called = dict(zip(names, function_defs.numbered(prefix), strict=False))
    bodies = (graph.node, *(function.node_def for function in graph.library.function))
    # Of a function that is an operation, callers name the outputs.
    operations = {node.op for body in bodies for node in body}
    inside = {}
    for function in graph.library.function:
        name = function.signature.name
        inside[name] = function_defs.shorten(function, called, outputs=name not in operations)
    for gradient in graph.library.gradient:
        gradient.function_name = called[gradient.function_name]
        gradient.gradient_func = called.get(gradient.gradient_func, gradient.gradient_func)
    for gradient in graph.library.registered_gradients:
        gradient.gradient_func = called.get(gradient.gradient_func, gradient.gradient_func)
    for alias in list(meta.meta_info_def.function_aliases):
        value = meta.meta_info_def.function_aliases.pop(alias)
        meta.meta_info_def.function_aliases[called.get(alias, alias)] = value

    kept = _ends(meta) - {node_of(asset.tensor_info.name) for asset in meta.asset_file_def}
    free = (name for name in function_defs.numbered("") if name not in kept)
    short = {node.name: node.name if node.name in kept else next(free) for node in graph.node}
    for node in graph.node:
        node.name = short[node.name]
        node.input[:] = [function_defs.renamed(reference, short) for reference in node.input]
        function_defs.rename_calls(node, called)
    for asset in meta.asset_file_def:
        asset.tensor_info.name = function_defs.renamed(asset.tensor_info.name, short)

    for node in objects.nodes:
        if node.HasField("function"):
            listed = node.function.concrete_functions
            listed[:] = [called[name] for name in listed]
        if node.HasField("bare_concrete_function"):
            bare = node.bare_concrete_function
            bare.concrete_function_name = called[bare.concrete_function_name]
        if node.HasField("captured_tensor"):
            tensor = node.captured_tensor
            tensor.name = function_defs.renamed(tensor.name, inside[tensor.concrete_function])
            tensor.concrete_function = called[tensor.concrete_function]
    for name in list(objects.concrete_functions):
        function = objects.concrete_functions[name]
        copy = type(function)()
        copy.CopyFrom(function)
        del objects.concrete_functions[name]
        objects.concrete_functions[called[name]].CopyFrom(copy)
