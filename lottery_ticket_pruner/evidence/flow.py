"""Synaptic flow: gradients of the output of a model with positive weights (SynFlow)."""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.evidence.differentiation import gradient
from lottery_ticket_pruner.evidence.gradients import compiled, effective_value
from lottery_ticket_pruner.training import Arrays
from masked_layers.copying import copy_model
from masked_layers.masks import raw_view
from masked_layers.types import Tensor


class SynapticFlow:
    """Gradient of the sum of a model's logits with respect to its weights, all made positive.

    It is computed on a float64 copy, because products over many layers exceed the range of float32.
    In the copy, all weights including biases and statistics are replaced by their absolute values,
    and the activations of its outputs are removed (a softmax would make the sum constant). It runs
    in inference mode on an input of ones.

    In a network of linear maps and rectifiers, the sum of abs(weight) times flow is the same for
    every layer. A weight that cannot change the output has a flow of zero and is pruned first. This
    includes the queries and keys of attention over equal positions, which has uniform weights.

    Args:
        model: A masked model. It is not changed.
        x: Inputs of which only the shape is used. None if the model has a fixed input shape.

    Raises:
        ValueError: If the model cannot be copied, its inputs are not floats or have an unknown
            shape, or its outputs are probabilities that do not come from an output activation.

    Reference:
        - [Tanaka et al., arXiv 2006.05467](https://arxiv.org/abs/2006.05467), section 5
    """

    def __init__(self, model: keras.Model, x: Arrays | None = None) -> None:
        ones = _ones(model, x)
        with _keras.double_precision():
            self._model = copy_model(model, dtype="float64")
            for output in _keras.output_layers(self._model):
                _take_activation(output)
            for variable in self._model.weights:
                if "float" in variable.dtype:
                    variable.assign(np.abs(ops.convert_to_numpy(variable)))
            self._ones = keras.tree.map_structure(ops.convert_to_tensor, ones)
            _refuse_probabilities(model, self._model(self._ones, training=False))
            self._refs = ml.masked_refs(self._model)
            self._masks = ml.get_masks(self._model)
            self._weights = [
                ops.convert_to_tensor(np.abs(ops.convert_to_numpy(effective_value(ref))))
                for ref in self._refs
            ]
            own = {id(ref.variable) for ref in self._refs}
            others = [variable for variable in self._model.variables if id(variable) not in own]
            # On JAX, a compiled function treats all values that are not arguments as constants.
            self._others = others if keras.backend.backend() == "jax" else []
            self._gradient = compiled(self._model, self._trace)

    def __call__(self, masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Returns the flow through each weight, including pruned ones, under the given masks.

        Args:
            masks: Bool arrays by path, for all masked weights. Each must be a subset of the mask of
                the model.

        Returns:
            A dict from path to float64 array.
        """
        with _keras.double_precision():
            pruned = [self._masks[ref.path] & ~masks[ref.path] for ref in self._refs]
            pruned = [ops.convert_to_tensor(gone) for gone in pruned]
            others = [variable.value for variable in self._others]
            flows = self._gradient(self._weights, pruned, others)
            return {
                ref.path: ops.convert_to_numpy(flow)
                for ref, flow in zip(self._refs, flows, strict=True)
            }

    def _trace(
        self, weights: list[Tensor], pruned: list[Tensor], others: list[Tensor]
    ) -> list[Tensor]:
        weights = [
            ops.where(gone, ops.zeros_like(weight), weight)
            for gone, weight in zip(pruned, weights, strict=True)
        ]

        def total(weights: list[Tensor]) -> tuple[Tensor, None]:
            variables = [*[ref.variable for ref in self._refs], *self._others]
            state = list(zip(variables, [*weights, *others], strict=True))
            with raw_view(), keras.StatelessScope(state):
                outputs = self._model(self._ones, training=False)
            return sum(ops.sum(output) for output in keras.tree.flatten(outputs)), None

        return gradient(total, weights)[0]


def _ones(model: keras.Model, x: Arrays | None) -> Arrays:
    """Returns one example of ones, in the structure of the model's inputs."""
    inputs = _keras.input_specs(model) if x is None else keras.tree.map_structure(np.asarray, x)
    if any("float" not in str(tensor.dtype) for tensor in keras.tree.flatten(inputs)):
        raise ValueError(
            "SynFlow sends ones through the model, which must accept floats. "
            f"{model.name!r} has integer inputs, such as the indices of an embedding: use "
            "another criterion."
        )
    shapes = [tuple(tensor.shape)[1:] for tensor in keras.tree.flatten(inputs)]
    if any(size is None for shape in shapes for size in shape):
        raise ValueError(
            f"SynFlow needs inputs of a fixed shape. Those of {model.name!r} have {shapes}: pass "
            "`data=x` with an example, of which only the shape is used."
        )
    ones = [np.ones((1, *shape)) for shape in shapes]
    return keras.tree.pack_sequence_as(inputs, ones)


def _take_activation(output: keras.Operation) -> None:
    """Replaces the activation of an output layer by the identity."""
    inner = _keras.output_layers(output)
    if isinstance(output, layers.TimeDistributed):
        inner = [output.layer]
    for layer in inner:
        _take_activation(layer)
    if isinstance(output, layers.Softmax):
        _keras.make_identity(output)
    elif isinstance(output, layers.RNN):
        pass  # Its activation is part of the recurrence.
    elif isinstance(output, layers.Layer) and hasattr(output, "activation"):
        output.activation = keras.activations.linear


def _refuse_probabilities(model: keras.Model, outputs: Tensor) -> None:
    for output in keras.tree.flatten(outputs):
        array = ops.convert_to_numpy(output)
        if array.ndim > 1 and array.shape[-1] > 1 and np.allclose(array.sum(-1), 1, atol=1e-9):
            raise ValueError(
                f"The outputs of {model.name!r} add up to 1: they are probabilities, which do not "
                "change with the scale of their inputs. SynFlow removes the activation of output "
                "layers, but here it is elsewhere. Change the model to return logits."
            )
