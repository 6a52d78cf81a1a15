"""Measures the latency of the smaller models that pruning would leave."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import channels, selection
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.overrides import bystanders_kept, masks_replaced
from masked_layers import shrinking

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class MeasuredLatency:
    """The latency with which a budget of latency was met.

    Attributes:
        budget: The budget.
        timing: Times of the model without pruned weights and of the smaller model, called in turns.
        predicted: Latency that the search predicted for this model, in the unit of the budget.
        measured: The same as measured at the end.
        trials: Number of smaller models that were measured.
    """

    budget: Latency
    timing: ml.Timing
    predicted: float
    measured: float
    trials: int

    @property
    def milliseconds(self) -> float:
        """Median milliseconds of a call of the smaller model."""
        return self.timing.after

    @property
    def met(self) -> bool:
        """True if the latency measured at the end is within the budget."""
        return self.measured <= self.budget.limit

    def __str__(self) -> str:
        unit = "ms" if self.budget.share is None else "of the latency without pruning"
        return (
            f"measured {self.measured:.3g} {unit}, predicted {self.predicted:.3g}, batch size "
            f"{self.budget.batch_size}, smaller models tried: {self.trials}; {self.timing}"
        )


class Probes:
    """Measures smaller models, for `selection.select`.

    The masks of the model are changed only while it is shrunk.

    Args:
        model: The masked model.
        graph: The channels of the model.
        latency: The budget.

    Attributes:
        unpruned: Latency of the model without pruned weights, divided by the budget.
        measured: The last final measurement, or None.

    Raises:
        ValueError: If the size of an input is not fixed.
    """

    def __init__(self, model: keras.Model, graph: ml.ChannelFamilies, latency: Latency) -> None:
        self._model, self._graph, self._latency = model, graph, latency
        self._trials = 0
        self.measured: MeasuredLatency | None = None
        with bystanders_kept():
            self._dense = shrinking.Compiled(shrinking.unpruned(model), latency.batch_size)
        if latency.share is not None:
            self.unpruned = 1 / latency.share
        else:
            timing = shrinking.compare(self._dense, self._dense)
            self.unpruned = self._measured(timing) / latency.limit

    def __call__(
        self, masks: Mapping[str, np.ndarray], *, predicted: float, final: bool = False
    ) -> float:
        """Returns the latency of the smaller model that masks leave, divided by the budget.

        Args:
            masks: Bool masks by path.
            predicted: The expected result.
            final: Whether to measure for longer, and set `measured`.
        """
        masks = {**masks, **channels.without_pruned(self._model, self._graph, masks)}
        with bystanders_kept(), masks_replaced(self._model, masks):
            smaller, _ = ml.shrink(self._model, return_report=True)
        after = shrinking.Compiled(smaller, self._latency.batch_size)
        limits: dict[str, Any] = {"seconds": 10.0, "rounds": (15, 101)} if final else {}
        timing = shrinking.compare(self._dense, after, **limits)
        self._trials += not final
        load = self._measured(timing) / self._latency.limit
        _logger.info("Tried a smaller model: %s.", timing)
        if final:
            limit, measured = self._latency.limit, self._measured(timing)
            self.measured = MeasuredLatency(
                self._latency, timing, predicted * limit, measured, self._trials
            )
        del smaller, after
        gc.collect()  # Models and their compiled functions refer to each other.
        return load

    def _measured(self, timing: ml.Timing) -> float:
        """Returns a latency in the unit of the budget."""
        return timing.after if self._latency.share is None else timing.ratio


def milliseconds_without_pruning(model: keras.Model, batch_size: int) -> float:
    """Measures the latency of a masked model without pruned weights, as a budget counts it."""
    with bystanders_kept():
        dense = shrinking.Compiled(shrinking.unpruned(model), batch_size)
    return shrinking.compare(dense, dense).after


def probes(
    model: keras.Model, graph: ml.ChannelFamilies | None, request: selection.Request
) -> Probes | None:
    """Returns the measurements that a request needs, or None if it has no budget of latency."""
    latency = (request.budget or {}).get("latency")
    if graph is None or not graph.families or not isinstance(latency, Latency):
        return None
    return Probes(model, graph, latency)
