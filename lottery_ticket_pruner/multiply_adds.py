"""Counts the multiply-adds of a masked model, for budgets of single weights."""

from __future__ import annotations

import logging
import math

import keras

import masked_layers as ml
from lottery_ticket_pruner import selection

_logger = logging.getLogger(__name__)


def multiply_adds(model: keras.Model) -> selection.MultiplyAdds:
    """Returns the multiply-adds of a model for one example, by masks.

    They are counted as in the report of `masked_layers.shrink`, with the kept weights of each
    kernel in place of all.

    Args:
        model: The masked model.

    Raises:
        ValueError: If the model is neither Sequential nor Functional, or an input shape that
            decides about the number is not fixed.
    """
    graph = ml.channel_families(model)
    if unknown := [path for path, number in graph.positions.items() if number is None]:
        raise ValueError(
            "The multiply-adds of these kernels are unknown, because the input shape of the model "
            f"is not fixed: {unknown}. Give the model a fixed input shape, or pass a `sparsity`."
        )
    known = {path: number for path, number in graph.positions.items() if number}
    sizes = {ref.path: math.prod(ref.variable.shape) for ref in ml.masked_refs(model)}
    others = {**graph.unmasked, **{path: math.prod(s) for path, s in graph.products.items()}}
    if idle := [path for path in sizes if path not in known]:
        _logger.warning(
            "No multiply-adds are known of these weights, so the budget keeps them and does not "
            "count any: %s",
            ", ".join(idle),
        )
    return selection.MultiplyAdds(
        uses={path: number for path, number in known.items() if path in sizes},
        rest=sum(number * others[path] for path, number in known.items() if path not in sizes),
        sizes={path: size for path, size in sizes.items() if path in known},
    )
