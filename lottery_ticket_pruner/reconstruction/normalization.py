"""Statistics of batch normalization, estimated again in a pruned network."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers

from lottery_ticket_pruner.evidence import State, batches, layer_inputs
from lottery_ticket_pruner.reconstruction.fitting import Target, finite
from lottery_ticket_pruner.training import ArrayDataset
from masked_layers.paths import plain_class


def has_statistics(layer: layers.Layer) -> bool:
    """Returns whether a layer is a built `BatchNormalization`."""
    return plain_class(layer).call is layers.BatchNormalization.call and layer.built


def reads_only(layer: layers.BatchNormalization, target: Target) -> bool:
    """Returns whether a layer normalizes the outputs of another one, channel by channel.

    This can be told in the graph of a Functional or Sequential model, for layers that are called
    once.
    """
    axis = target.product.channel_axis
    if axis is None or target.layer.activation is not keras.activations.linear:
        return False
    try:
        outputs = target.layer.output
        return layer.input is outputs and layer.axis in (axis, axis % len(outputs.shape))
    except (AttributeError, ValueError):  # It was called several times, or not in a graph.
        return False


def statistics(
    model: keras.Model,
    data: ArrayDataset,
    layer: layers.BatchNormalization,
    calls: int,
    state: State,
    batch_size: int,
) -> list[tuple[keras.Variable, np.ndarray]]:
    """Returns the moving mean and variance of a layer, as estimated on examples.

    Args:
        model: The network before the update.
        data: Examples.
        layer: The normalization layer.
        calls: Number of calls of the layer in one forward pass.
        state: The masks and weights of the pruned network that differ from those of the model.
        batch_size: Number of examples in a forward pass.

    Raises:
        ValueError: If the inputs of the layer are not finite.
    """
    size = layer.moving_mean.shape[0]
    count, sums, squares = 0, np.zeros(size), np.zeros(size)
    for batch in batches(data, batch_size):
        for _, inputs in layer_inputs(model, batch, [layer], state=state, calls=calls):
            array = finite(layer.moving_mean.path, inputs).astype("float64")
            rows = np.moveaxis(array, layer.axis, -1).reshape(-1, size)
            count += len(rows)
            sums += rows.sum(axis=0)
            squares += np.square(rows).sum(axis=0)
    mean = sums / count
    variance = np.maximum(squares / count - mean**2, 0.0)
    return [(layer.moving_mean, mean), (layer.moving_variance, variance)]
