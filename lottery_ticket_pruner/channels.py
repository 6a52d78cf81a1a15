"""Finds the channels of a model for pruning requests that need them, and logs what stays."""

import logging
from collections.abc import Mapping

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import selection

_logger = logging.getLogger(__name__)


def channels_of(model: keras.Model, request: selection.Request) -> ml.ChannelFamilies | None:
    """Returns the channels of a model if a pruning request needs them, or None.

    Logs a warning about layers that stay whole, before anything is pruned.

    Args:
        model: A built model.
        request: The pruning request.

    Raises:
        ValueError: If the structure is coupled, and the channels of the model cannot be followed.
    """
    structure = request.structure
    if structure is None or not (structure.coupled or structure.whole_outputs):
        return None
    try:
        found = ml.channel_families(model)
    except ValueError as error:
        if structure.coupled:
            raise
        _logger.warning(
            "The channels of %r cannot be followed, so the biases of pruned outputs and the "
            "weights that read them are kept: %s",
            model.name,
            error,
        )
        return None
    if structure.coupled and (found.whole or found.not_followed):
        whole = "; ".join([*_by_reason(found.not_followed), *_by_reason(found.whole)])
        _logger.warning("%s leaves layers of %r whole: %s", structure, model.name, whole)
    return found


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Returns a text for each reason, with the names of up to three layers it applies to."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    return [
        f"{', '.join(names[:3])}{f' and {len(names) - 3} more' * (len(names) > 3)}: {reason}"
        for reason, names in layers.items()
    ]


def note_limits(
    request: selection.Request,
    graph: ml.ChannelFamilies | None,
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
) -> None:
    """Logs the families in which fewer channels were pruned than requested.

    Args:
        request: The pruning request.
        graph: The channels of the model, or None.
        before: Bool masks by path, before pruning.
        after: Bool masks by path, after pruning.
    """
    structure, rate = request.structure, request.rate
    if graph is None or structure is None or not structure.coupled or not isinstance(rate, float):
        return
    if request.scope != "layer":
        return
    held = []
    for family in graph.families:
        then, now = (
            int(np.count_nonzero(selection.kept_channels(family, masks)))
            for masks in (before, after)
        )
        if then - now < selection.drop_count(family.size, then, rate=rate):
            held.append(f"{', '.join(family.layers)}: {now} of {family.size} are kept")
    if held:
        _logger.warning(
            "%s pruned fewer channels than a rate of %s requires: %s",
            structure,
            rate,
            "; ".join(held),
        )
