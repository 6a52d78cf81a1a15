"""Norms of the inputs that each weight is multiplied with, measured on data (Wanda)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.evidence.differentiation import Tensor, gradient
from lottery_ticket_pruner.evidence.gradients import prunable_refs
from lottery_ticket_pruner.training import Arrays, Examples, map_arrays
from masked_layers.maskable import raw_variable, weights_inside
from masked_layers.masks import raw_view
from masked_layers.paths import plain_class

# Layers whose output, but for the activation, is linear in the kernel and in the bias.
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


def input_norms(model: keras.Model, x: Arrays, *, batch_size: int = 32) -> dict[str, np.ndarray]:
    """The 2-norm of what each masked weight is multiplied with, over a calibration set.

    For a weight of a dense layer that is the norm of its input feature over all examples and
    positions; for one of a convolution, over all patches (zeros of the padding count as zeros).
    A bias is multiplied with ones. Layers used several times, and tied weights, see the inputs of
    all uses.

    The model runs in inference mode, under its masks, and is left exactly as it was.

    Args:
        model: Masked or plain.
        x: Inputs, the examples along the first axis; or a list or dict of such arrays.
        batch_size: Examples per forward pass. What enters the layers is held in memory for one
            batch.

    Returns:
        A dict from the path of each masked weight (in a plain model of each maskable one) to a
        float32 array of the weight's shape.

    Raises:
        ValueError: If a masked weight belongs to a layer that multiplies other things than its
            inputs with it, or of which that is not known. The message names all of these. Or there
            is no example, or the arrays are not of one length.

    Reference:
        - [Sun et al., arXiv 2306.11695](https://arxiv.org/abs/2306.11695), section 3
    """
    refs = prunable_refs(model)
    users = _users(model, {id(ref.variable) for ref in refs})
    data = Examples.of(x)
    ml.sync(model)
    sums = {id(ref.variable): np.zeros(ref.variable.shape, "float64") for ref in refs}
    # The scope holds back whatever the forward passes would change.
    with keras.StatelessScope(), _recording(users) as seen:
        for start in range(0, len(data), batch_size):
            (batch,) = data.take(slice(start, start + batch_size))
            model(map_arrays(ops.convert_to_tensor, batch), training=False)
            for layer, inputs in seen:
                variables = [raw_variable(layer, name) for name in users[layer]]
                for variable, array in zip(
                    variables, _squares(layer, variables, inputs), strict=True
                ):
                    sums[id(variable)] += ops.convert_to_numpy(array)
            seen.clear()
    return {ref.path: np.sqrt(sums[id(ref.variable)]).astype("float32") for ref in refs}


def _users(model: keras.Model, variables: set[int]) -> dict[layers.Layer, list[str]]:
    """The layers that hold these variables, each with the names of its own."""
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
            "What enters a weight is known for layers of the classes "
            f"{', '.join(cls.__name__ for cls in _LINEAR)}. It is not for: {', '.join(unknown)}. "
            "Leave them without masks: `masked_layers.convert_to_masked(model, exclude=...)`, or "
            "`include` the others."
        )
    return users


@contextlib.contextmanager
def _recording(users: dict[layers.Layer, list[str]]) -> Iterator[list[tuple[layers.Layer, Tensor]]]:
    """Notes the inputs of each call of these layers while it is open."""
    seen: list[tuple[layers.Layer, Tensor]] = []

    def noting(layer: layers.Layer, call: Callable) -> Callable:
        def noting_call(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((layer, inputs))
            return call(inputs, *args, **kwargs)

        return noting_call

    with contextlib.ExitStack() as stack:
        for layer in users:
            # A functional model calls its layers by their `call`, and no hook runs around it.
            stack.enter_context(_keras.replaced(layer, "call", noting(layer, layer.call)))
        yield seen


def _squares(layer: layers.Layer, variables: list[keras.Variable], inputs: Tensor) -> list[Tensor]:
    """The sum of squares of what each entry of the variables was multiplied with in one call.

    Without its activation the layer is linear in them, so the gradient of the sum of its outputs is
    the sum of what each entry meets: for squared inputs, the sum of squares.
    """
    squared = ops.square(ops.cast(inputs, variables[0].dtype))

    def total(weights: list[Tensor]) -> tuple[Tensor, None]:
        with raw_view(), keras.StatelessScope(list(zip(variables, weights, strict=True))):
            return ops.sum(plain_class(layer).call(layer, squared)), None

    activation, layer.activation = layer.activation, None
    try:
        # Where, does not matter: the sum is linear.
        zeros = [ops.zeros(variable.shape, variable.dtype) for variable in variables]
        return gradient(total, zeros)[0]
    finally:
        layer.activation = activation
