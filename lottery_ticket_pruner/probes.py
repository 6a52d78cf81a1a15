"""Chooses the measurements that a budget needs, and reports what was reached."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import latencies, multiply_adds, notices, payloads, selection
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.served_latencies import ServedLatency, ServedProbes

_logger = logging.getLogger(__name__)

MeasuredLatency: TypeAlias = latencies.MeasuredLatency | ServedLatency
Probe: TypeAlias = selection.Probe | selection.WeightProbe


class Reached(NamedTuple):
    """Values that a budget has reached; None for other budgets.

    Attributes:
        latency: The measured latency.
        stored_bytes: The bytes that are stored.
        multiply_adds: The multiply-adds of the kept single weights.
    """

    latency: MeasuredLatency | None = None
    stored_bytes: int | None = None
    multiply_adds: int | None = None


def probe_of(
    model: keras.Model,
    graph: ml.ChannelFamilies | None,
    request: selection.Request,
    *,
    reconstruct: bool = False,
) -> Probe | None:
    """Returns the measurements for the budget of a request, or None if it needs none.

    Args:
        model: The masked model.
        graph: Its channels, if the request needs them.
        request: The pruning request.
        reconstruct: Whether the weights are changed afterwards.

    Raises:
        ValueError: If the budget cannot be measured in this model.
    """
    budget = request.budget or {}
    if request.structure is not None and request.structure.coupled:
        return latencies.probes(model, graph, request)
    latency = budget.get("latency")
    if isinstance(latency, Latency):
        return ServedProbes(model, latency)
    if "macs" in budget:
        return multiply_adds.multiply_adds(model)
    return payloads.stored_size(model, request, reconstruct=reconstruct)


def reached(probe: Probe | None, masks: Mapping[str, np.ndarray]) -> Reached:
    """Logs and returns what was reached, and warns if a latency exceeds its budget.

    Args:
        probe: The measurements for the budget, or None.
        masks: The new masks.

    Warns:
        UserWarning: If measurements are too noisy to meet a budget of latency.
    """
    latency: MeasuredLatency | None = None
    if isinstance(probe, latencies.Probes):
        latency = probe.measured
    elif isinstance(probe, ServedProbes):
        latency = probe.measured(masks)
    if latency is not None:
        _logger.info("Latency: %s.", latency)
        if not latency.met:
            notices.warn(
                f"The pruned model is slower than its budget in the last measurement ({latency}). "
                "Other load on this machine makes measured times vary: update the masks again when "
                "it is idle, or pass a smaller budget."
            )
    stored = probe.of(masks) if isinstance(probe, selection.StoredSize) else None
    macs = None
    if isinstance(probe, selection.MultiplyAdds):
        macs = probe.of(masks)
        _logger.info("Multiply-adds of kept weights: %d of %d.", macs, probe.dense)
    return Reached(latency, stored, macs)
