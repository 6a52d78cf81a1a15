"""Products with single kept weights, in place of a matrix: how they are computed, and their cost.

Costs are those of a training step for one example, in entries of a masked kernel whose inputs need
no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import keras
import numpy as np
from keras import ops

from lottery_ticket_pruner.training.engine_settings import settings
from lottery_ticket_pruner.training.kept_weights import KeptKernel
from masked_layers.devices import computes_on_cpu
from masked_layers.types import Tensor

# An entry of a matrix made of single values.
_ENTRY = 0.8

# Returns the outputs, `(batch, units)`, of inputs `(batch, inputs)` and kept weights.
Product = Callable[[Tensor, Tensor], Tensor]


class Products(Protocol):
    """A way to compute the products of kept weights and inputs.

    Attributes:
        in_evaluations: Whether it is used in evaluations as well.
    """

    in_evaluations: bool

    def cost(self, kept: KeptKernel) -> float:
        """Returns the estimated cost of a training step."""

    def faster(self, kept: KeptKernel) -> bool:
        """Returns True if this is faster than a matrix with the kept weights."""

    def of(self, kept: KeptKernel) -> Product:
        """Returns the product of these kept weights, with its derivative."""


class Gathered:
    """Products computed one by one from tables, in loops compiled by XLA for a CPU.

    Elsewhere every product would be stored, also in evaluations, which TensorFlow does not compile.
    """

    in_evaluations = False

    # Measured on x86-64: a slot of the tables, and the fixed cost of a matrix.
    _SLOT = 10
    _MATRIX = 15_000

    def cost(self, kept: KeptKernel) -> float:
        """Returns the estimated cost of a training step."""
        return _ENTRY * min(self._SLOT * kept.slots, kept.entries + kept.size)

    def faster(self, kept: KeptKernel) -> bool:
        """Returns True if this is faster than a matrix with the kept weights."""
        return self._SLOT * kept.slots < kept.entries * kept.products / 2 + self._MATRIX

    def of(self, kept: KeptKernel) -> Product:
        """Returns the product of these kept weights, with its derivative.

        Both the product and its derivative with respect to the inputs are sums over tables of kept
        weights, one row per unit and one per input, because adding to single entries is slow.
        """
        by_unit = _table(kept.columns, len(kept.units))
        by_input = _table(kept.rows, len(kept.inputs))
        unit_weights, input_weights = indices(by_unit), indices(by_input)
        # The slots that are not used have a weight of zero and any input.
        unit_inputs = indices(np.append(kept.rows, 0)[by_unit])
        input_units = indices(np.append(kept.columns, 0)[by_input])
        rows, columns = indices(kept.rows), indices(kept.columns)

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

        return lambda x, weights: ops.transpose(product(ops.transpose(x), weights))


class Sparse:
    """Products of PyTorch with a sparse matrix, on a CPU."""

    in_evaluations = True

    # Measured on x86-64, with batches of 60 and 256 and widths of 300 to 2,048: a kept weight, and
    # how many entries of a matrix take as long.
    _WEIGHT = 2
    _ENTRIES = 8

    def cost(self, kept: KeptKernel) -> float:
        """Returns the estimated cost of a training step."""
        return self._WEIGHT * kept.size

    def faster(self, kept: KeptKernel) -> bool:
        """Returns True if this is faster than a matrix with the kept weights."""
        return self._ENTRIES * kept.size < kept.entries

    def of(self, kept: KeptKernel) -> Product:
        """Returns the product of these kept weights, with its derivative."""
        from lottery_ticket_pruner.training.sparse_products import SparseProduct

        return SparseProduct(kept)


def cost(kept: KeptKernel, products: Products | None) -> float:
    """Returns the estimated cost of a training step with these products, or with a matrix."""
    if products is not None and products.faster(kept):
        return products.cost(kept)
    return _ENTRY * (kept.entries + kept.size)


def products_for(model: keras.Model, steps: int) -> Products | None:
    """Returns how to compute single products in a training of so many steps, or None."""
    backend = keras.backend.backend()
    if backend == "tensorflow":
        by_xla = steps >= settings.xla_steps and computes_on_cpu()
        return _GATHERED if by_xla else None
    if backend == "jax":
        return _GATHERED if computes_on_cpu() and model.jit_compile else None
    on_cpu = all(variable.value.device.type == "cpu" for variable in model.trainable_variables)
    return _SPARSE if on_cpu and not model.jit_compile else None


_GATHERED = Gathered()
_SPARSE = Sparse()


def indices(array: np.ndarray) -> Tensor:
    """Returns a tensor of int32."""
    return ops.convert_to_tensor(array.astype("int32"))


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
