"""A Dense layer whose only weights are the kept ones, each a value in a vector."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from lottery_ticket_pruner.training.kept_products import Products, indices
from lottery_ticket_pruner.training.kept_weights import KeptKernel
from masked_layers.types import Tensor


class KeptDense(keras.layers.Layer):
    """Computes what a masked Dense layer computes, for the inputs and units that matter.

    Args:
        kept: The kept weights.
        products: How to compute products of single kept weights. None to make a matrix of them.
    """

    def __init__(self, kept: KeptKernel, products: Products | None) -> None:
        super().__init__(name=kept.layer.name, dtype="float32")
        self.activation = kept.layer.activation
        self.use_bias = kept.layer.use_bias
        self._kept = kept
        # Made here, outside of every graph, because a tensor made in one cannot be used in another.
        self._product = None if products is None else products.of(kept)
        self._in_evaluations = products is not None and products.in_evaluations
        self._places = indices(np.stack([kept.rows, kept.columns], axis=1))

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
        weights = ops.convert_to_tensor(self.kernel)
        if self._product is not None and (training or self._in_evaluations):
            y = self._product(x, weights)
        else:
            y = ops.matmul(x, self._matrix(weights))
        if self.use_bias:
            y = y + self.bias
        return self.activation(y)

    def _matrix(self, weights: Tensor) -> Tensor:
        shape = (len(self._kept.inputs), len(self._kept.units))
        if keras.backend.backend() == "torch":
            # `ops.scatter` has a Python loop over the values there.
            return ops.scatter_update(ops.zeros(shape, "float32"), self._places, weights)
        return ops.scatter(self._places, weights, shape)

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
        self._inputs = indices(inputs)

    def call(self, x: Tensor) -> Tensor:
        """Returns the selected inputs, as float32."""
        x = ops.cast(x, "float32")
        finite = ops.all(ops.isfinite(x), axis=1, keepdims=True)
        return ops.where(finite, ops.take(x, self._inputs, axis=1), float("nan"))

    def compute_output_shape(self, input_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """Returns `(batch, number of selected inputs)`."""
        return (input_shape[0], len(self._inputs))
