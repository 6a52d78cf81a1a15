"""A Dense layer whose only weights are the kept ones, each a value in a vector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from lottery_ticket_pruner.training.kept_weights import KeptKernel
from masked_layers.types import Tensor


class KeptDense(keras.layers.Layer):
    """Computes what a masked Dense layer computes, for the inputs and units that matter.

    Args:
        kept: The kept weights.
        gather: Whether to compute products of kept weights one by one, and not as a matrix.
    """

    def __init__(self, kept: KeptKernel, *, gather: bool) -> None:
        super().__init__(name=kept.layer.name, dtype="float32")
        self.activation = kept.layer.activation
        self.use_bias = kept.layer.use_bias
        self._kept = kept
        # Made here, outside of every graph, because a tensor made in one cannot be used in another.
        self._product = _gathered(kept) if gather else None
        self._places = _tensor(np.stack([kept.rows, kept.columns], axis=1))

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the kernel, a vector of the kept weights, and the bias of the kept units."""
        # Random values would be overwritten, and would change which seeds later layers draw.
        shape = (len(self._kept.rows),)
        self.kernel = self.add_weight(name="kernel", shape=shape, initializer="zeros")
        if self.use_bias:
            shape = (len(self._kept.units),)
            self.bias = self.add_weight(name="bias", shape=shape, initializer="zeros")

    def call(self, x: Tensor, training: bool = False) -> Tensor:
        """Returns the outputs of the kept units, `(batch, units)`, of `(batch, inputs)`."""
        x = ops.cast(x, "float32")  # Keras does not cast integers.
        # Evaluations are not compiled by XLA on TensorFlow, and would store every product.
        if self._product is None or not training:
            shape = (len(self._kept.inputs), len(self._kept.units))
            y = ops.matmul(x, ops.scatter(self._places, ops.convert_to_tensor(self.kernel), shape))
        else:
            y = self._product(ops.transpose(x), ops.convert_to_tensor(self.kernel))
            y = ops.transpose(y)
        if self.use_bias:
            y = y + self.bias
        return self.activation(y)

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `(batch, units)`."""
        return (input_shape[0], len(self._kept.units))


class KeptInputs(keras.layers.Layer):
    """Selects the inputs that kept weights read, of `(batch, inputs)`.

    An example with an infinite or NaN input becomes NaN, also if no kept weight reads this input: a
    product with the masked kernel has a term of 0 times this input.
    """

    def __init__(self, inputs: np.ndarray) -> None:
        super().__init__(name="kept_inputs", dtype="float32")
        self._inputs = _tensor(inputs)

    def call(self, x: Tensor) -> Tensor:
        """Returns the selected inputs, as float32."""
        x = ops.cast(x, "float32")
        finite = ops.all(ops.isfinite(x), axis=1, keepdims=True)
        return ops.where(finite, ops.take(x, self._inputs, axis=1), float("nan"))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `(batch, number of selected inputs)`."""
        return (input_shape[0], len(self._inputs))


def _tensor(array: np.ndarray) -> Tensor:
    return ops.convert_to_tensor(array.astype("int32"))


def _gathered(kept: KeptKernel) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns a function of inputs `(inputs, batch)` and kept weights, which returns the outputs.

    Both the product and its derivative with respect to the inputs are sums over tables of kept
    weights, one row per unit and one per input, because adding to single entries is slow.
    """
    by_unit = _table(kept.columns, len(kept.units))
    by_input = _table(kept.rows, len(kept.inputs))
    unit_weights, input_weights = _tensor(by_unit), _tensor(by_input)
    # The slots that are not used have a weight of zero and any input.
    unit_inputs = _tensor(np.append(kept.rows, 0)[by_unit])
    input_units = _tensor(np.append(kept.columns, 0)[by_input])
    rows, columns = _tensor(kept.rows), _tensor(kept.columns)

    @ops.custom_gradient
    def product(x: Tensor, weights: Tensor) -> Any:
        padded = ops.concatenate([weights, ops.zeros((1,), weights.dtype)])

        def summed(table: Tensor, values: Tensor, places: Tensor) -> Tensor:
            terms = _rows(values, places) * ops.expand_dims(_rows(padded, table), -1)
            return ops.sum(terms, axis=1)

        def gradient(*arguments: Any, upstream: Any = None) -> tuple[Tensor, Tensor]:
            if upstream is None:
                (upstream,) = arguments
            of_weights = ops.sum(_rows(x, rows) * _rows(upstream, columns), axis=1)
            return summed(input_weights, upstream, input_units), of_weights

        return summed(unit_weights, x, unit_inputs), gradient

    return product


def _table(owners: np.ndarray, number: int) -> np.ndarray:
    """Returns the positions of the kept weights of each owner, padded with their number.

    An owner without kept weights is possible: the bias of a unit without inputs is trained.
    """
    order = np.argsort(owners, kind="stable")
    counts = np.bincount(owners, minlength=number)
    first = np.cumsum(counts) - counts
    table = np.full((len(counts), counts.max()), len(owners))
    table[owners[order], np.arange(len(owners)) - first[owners[order]]] = order
    return table


def _rows(values: Tensor, places: Tensor) -> Tensor:
    # `ops.take` would check every index.
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.gather(values, places)
    return values[places]
