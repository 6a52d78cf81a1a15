"""Norms of the inputs that each weight multiplies, measured on data (Wanda)."""

from __future__ import annotations

from collections.abc import Collection

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner.evidence.differentiation import gradient
from lottery_ticket_pruner.evidence.gradients import prunable_refs
from lottery_ticket_pruner.evidence.inputs import State, batches, layer_inputs
from lottery_ticket_pruner.training import ArrayDataset, Arrays
from masked_layers.maskable import raw_variable, weights_inside
from masked_layers.masks import raw_view
from masked_layers.paths import plain_class
from masked_layers.types import Tensor

# Layers whose output is linear in the kernel and the bias, except for the activation.
_LINEAR = (
    layers.Dense,
    layers.EinsumDense,
    layers.Conv1D,
    layers.Conv2D,
    layers.Conv3D,
    layers.Conv1DTranspose,
    layers.Conv2DTranspose,
    layers.Conv3DTranspose,
    layers.DepthwiseConv1D,
    layers.DepthwiseConv2D,
)


def input_norms(
    model: keras.Model,
    x: Arrays,
    *,
    batch_size: int = 32,
    paths: Collection[str] | None = None,
    state: State = (),
    calls: int | None = None,
) -> dict[str, np.ndarray]:
    """Returns the 2-norm, over a calibration set, of the inputs that each masked weight multiplies.

    For a dense layer this is the norm of an input feature over all examples and positions. For a
    convolution it is the norm over all patches, in which padding counts as zeros. Biases multiply
    ones. For layers used several times, and for tied weights, the inputs of all uses count.

    The model runs in inference mode, under its masks, and is left unchanged.

    Args:
        model: A masked or plain model.
        x: Inputs with examples along the first axis: an array, or a list or dict of arrays.
        batch_size: Number of examples per forward pass. The inputs of all layers are held in memory
            for one batch.
        paths: Paths of the weights to measure. Default: all masked weights.
        state: Variables that have other values during the measurement.
        calls: Number of calls of the measured layers after which a forward pass may end.

    Returns:
        A dict from the path of each measured weight (in a plain model, each maskable weight) to a
        float32 array of the shape of the weight.

    Raises:
        ValueError: If a masked weight belongs to a layer that is not known to multiply its inputs
            with it (the message names all such weights), there are no examples, or the arrays
            differ in length.

    Reference:
        - [Sun et al., arXiv 2306.11695](https://arxiv.org/abs/2306.11695), section 3
    """
    refs = [ref for ref in prunable_refs(model) if paths is None or ref.path in paths]
    users = _users(model, {id(ref.variable) for ref in refs})
    data = ArrayDataset.of(x)
    ml.sync(model)
    sums = {id(ref.variable): np.zeros(ref.variable.shape, "float64") for ref in refs}
    for batch in batches(data, batch_size):
        for layer, inputs in layer_inputs(model, batch, users, state=state, calls=calls):
            variables = [raw_variable(layer, name) for name in users[layer]]
            for variable, array in zip(variables, _squares(layer, variables, inputs), strict=True):
                sums[id(variable)] += ops.convert_to_numpy(array)
    return {ref.path: np.sqrt(sums[id(ref.variable)]).astype("float32") for ref in refs}


def require_known_inputs(model: keras.Model) -> None:
    """Raises the error of `input_norms` if the inputs of some weights of a model are not known.

    Args:
        model: A masked or plain model.

    Raises:
        ValueError: If there are such weights. The message names them all.
    """
    _users(model, {id(ref.variable) for ref in prunable_refs(model)})


def _users(model: keras.Model, variables: set[int]) -> dict[layers.Layer, list[str]]:
    """Returns the layers that hold these variables, each with the names of its variables."""
    users: dict[layers.Layer, list[str]] = {}
    unknown = []
    known = {cls.call for cls in _LINEAR}
    for path, layer, name in weights_inside(model, biases=True):
        if id(raw_variable(layer, name)) in variables:
            users.setdefault(layer, []).append(name)
            if plain_class(layer).call not in known:
                unknown.append(f"{path} ({plain_class(layer).__name__})")
    if unknown:
        raise ValueError(
            "The inputs of weights are only known for layers of the classes "
            f"{', '.join(cls.__name__ for cls in _LINEAR)}, not for: {', '.join(unknown)}. "
            "Leave these without masks: `masked_layers.convert_to_masked(model, exclude=...)`, or "
            "`include` the others."
        )
    return users


def _squares(layer: layers.Layer, variables: list[keras.Variable], inputs: Tensor) -> list[Tensor]:
    """Returns, for each entry of the variables, the sum of squares of its inputs in one call.

    Without its activation, the layer is linear in these variables. The gradient of the sum of its
    outputs is therefore the sum of the inputs of each entry, or of their squares if the inputs are
    squared.
    """
    squared = ops.square(ops.cast(inputs, variables[0].dtype))

    def total(weights: list[Tensor]) -> tuple[Tensor, None]:
        with raw_view(), keras.StatelessScope(list(zip(variables, weights, strict=True))):
            return ops.sum(plain_class(layer).call(layer, squared)), None

    activation, layer.activation = layer.activation, None
    try:
        # At any point, because the sum is linear.
        zeros = [ops.zeros(variable.shape, variable.dtype) for variable in variables]
        return gradient(total, zeros)[0]
    finally:
        layer.activation = activation
