"""The channels of a model, for structures that prune across kernels."""

import logging
from collections.abc import Mapping

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import selection

_logger = logging.getLogger(__name__)


def families_of(model: keras.Model, request: selection.Request) -> tuple[ml.ChannelFamily, ...]:
    """Returns the channels that a request prunes or completes, none where it needs none.

    What stays whole is logged, before anything is pruned.

    Args:
        model: A built model.
        request: What is to be pruned.

    Raises:
        ValueError: If the structure is one of coupled channels, and those of the model cannot be
            followed.
    """
    structure = request.structure
    if structure is None or not (structure.coupled or structure.whole_outputs):
        return ()
    try:
        found = ml.channel_families(model)
    except ValueError as error:
        if structure.coupled:
            raise
        _logger.warning(
            "Biases and shifts of pruned outputs stay in %r, and with them what reads these "
            "outputs: %s",
            model.name,
            error,
        )
        return ()
    if structure.coupled and (found.whole or found.not_followed):
        _logger.warning("%s leaves layers of %r whole: %s", structure, model.name, _reasons(found))
    return found.families


def _reasons(found: ml.ChannelFamilies) -> str:
    reasons: Mapping[str, str] = {**found.not_followed, **found.whole}
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def note_limits(
    request: selection.Request,
    families: tuple[ml.ChannelFamily, ...],
    before: Mapping[str, np.ndarray],
    after: Mapping[str, np.ndarray],
) -> None:
    """Logs the families of which fewer channels were pruned than asked for.

    Args:
        request: What was pruned.
        families: All families of the model.
        before: Masks by path before.
        after: Masks by path afterwards.
    """
    structure, rate = request.structure, request.rate
    if structure is None or not structure.coupled or not isinstance(rate, float):
        return
    held = []
    for family in families:
        kept = [int(selection.kept_channels(family, masks).sum()) for masks in (before, after)]
        if request.scope == "layer" and kept[0] - kept[1] < int(rate * kept[0] + 1e-6):
            held.append(f"{', '.join(family.layers)}: {kept[1]} of {family.size} stay")
    if held:
        _logger.warning(
            "%s took fewer channels than a rate of %s: %s", structure, rate, "; ".join(held)
        )
