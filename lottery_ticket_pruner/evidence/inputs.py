"""Records the inputs of layers in forward passes that leave the model unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, TypeAlias

import keras
from keras import layers, ops

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.training import ArrayDataset, Arrays, map_arrays
from masked_layers.types import Tensor

# Variables and the values that they have during a forward pass.
State: TypeAlias = Sequence[tuple[keras.Variable, Tensor]]


def batches(data: ArrayDataset, batch_size: int) -> Iterator[Arrays]:
    """Yields the inputs of a data set in batches, as tensors."""
    for start in range(0, len(data), batch_size):
        yield map_arrays(ops.convert_to_tensor, data.take(slice(start, start + batch_size))[0])


def layer_inputs(
    model: keras.Model,
    batch: Arrays,
    wanted: Collection[layers.Layer],
    *,
    state: State = (),
    calls: int | None = None,
) -> list[tuple[layers.Layer, Tensor]]:
    """Returns the inputs of layers in one forward pass, in inference mode.

    The model is left unchanged, because everything that the pass would change is discarded.

    Args:
        model: A masked or plain model.
        batch: Inputs of the model as tensors.
        wanted: Layers inside the model.
        state: Variables that have other values during the pass.
        calls: Number of calls of these layers after which the pass ends. By default it runs to
            the end of the model.

    Returns:
        A list of (layer, inputs) for each call of these layers, in the order of the calls.
    """
    seen: list[tuple[layers.Layer, Tensor]] = []

    def noting(layer: layers.Layer, call: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def noting_call(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append((layer, inputs))
            if len(seen) == calls:
                raise _Enough
            return call(inputs, *args, **kwargs)

        return noting_call

    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_gradients())
        stack.enter_context(keras.StatelessScope(list(state)))
        for layer in wanted:
            # A functional model uses the `call` of its layers, and no hook runs around it.
            stack.enter_context(_keras.replaced(layer, "call", noting(layer, layer.call)))
        with contextlib.suppress(_Enough):
            model(batch, training=False)
    return seen


class _Enough(BaseException):
    """Ends a forward pass. Keras would add a description to an `Exception`."""


def _without_gradients() -> contextlib.AbstractContextManager[Any]:
    """On torch, the graph of a gradient would keep all activations in memory."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()
