"""Everything this library needs from TensorFlow beyond its public API, in one place.

Each function says why the public API does not do; `tests/masked_layers/test_tensorflow.py` checks
each of them against the installed TensorFlow, which is imported when a function needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


def gradient_names(graphs: Iterable[Any]) -> list[str]:
    """Returns the names under which TensorFlow registered gradients for operations of graphs."""
    names = []
    for graph in graphs:
        for operation in graph.get_operations():
            if operation.type == "IdentityN":  # What `tf.custom_gradient` makes.
                try:
                    names.append(operation.get_attr("_gradient_op_type").decode())
                except ValueError:  # It has no gradient of its own.
                    continue
    return names


def forget_gradients(names: Iterable[str]) -> None:
    """Takes gradients out of the registry of TensorFlow, which has no inverse of registering."""
    from tensorflow.python.framework import ops

    for name in names:
        ops.gradient_registry._registry.pop(name, None)


def keep_out_of_checkpoint(variable: tf.Variable) -> None:
    """Makes `tf.saved_model.save` write the variable without a value.

    TensorFlow has no public way to say so. It asks the variable itself for the checkpoint, and the
    copy in the exported graph for the restore function that the v1 loader runs.
    """
    export = variable._export_to_saved_model_graph

    def export_without_value(object_map: Any, **kwargs: Any) -> Any:
        exported = export(object_map=object_map, **kwargs)
        object_map[variable]._serialize_to_tensors = dict
        return exported

    variable._serialize_to_tensors = dict
    variable._export_to_saved_model_graph = export_without_value
