"""Everything that this package needs from TensorFlow beyond its public API.

The docstring of each function says why the public API is not sufficient.
`tests/masked_layers/test_tensorflow.py` checks each of them against the installed TensorFlow, which
is imported only when a function needs it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf


def gradient_names(graphs: Iterable[Any]) -> list[str]:
    """Returns the names of gradients that TensorFlow registered for operations of graphs."""
    names = []
    for graph in graphs:
        for operation in graph.get_operations():
            if operation.type == "IdentityN":  # Created by `tf.custom_gradient`.
                try:
                    names.append(operation.get_attr("_gradient_op_type").decode())
                except ValueError:  # It has no registered gradient.
                    continue
    return names


def forget_gradients(names: Iterable[str]) -> None:
    """Removes gradients from TensorFlow's registry, for which there is no public function."""
    from tensorflow.python.framework import ops

    for name in names:
        ops.gradient_registry._registry.pop(name, None)


def keep_out_of_checkpoint(variable: tf.Variable) -> None:
    """Makes `tf.saved_model.save` write the variable without a value.

    TensorFlow has no public way to do this. For the checkpoint it uses the variable itself, and for
    the restore function of the v1 loader the variable's copy in the exported graph.
    """
    export = variable._export_to_saved_model_graph

    def export_without_value(object_map: Any, **kwargs: Any) -> Any:
        exported = export(object_map=object_map, **kwargs)
        object_map[variable]._serialize_to_tensors = dict
        return exported

    variable._serialize_to_tensors = dict
    variable._export_to_saved_model_graph = export_without_value


def is_stateful(op: str) -> bool:
    """Returns whether an operation has effects or reads state; unknown ones count as stateful.

    Publicly, only the operations of an existing graph can be asked.
    """
    from tensorflow.python.framework import op_def_registry

    definition = op_def_registry.get(op)
    return definition is None or definition.is_stateful
