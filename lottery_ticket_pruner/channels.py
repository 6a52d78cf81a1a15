"""Finds the channels of a model for pruning requests that need them, and logs what stays."""

import dataclasses
import logging
import weakref
from collections.abc import Mapping, Sequence

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import criteria, selection, structures
from lottery_ticket_pruner.variables import read
from masked_layers.text_tables import shortened

_logger = logging.getLogger(__name__)


def follow(model: keras.Model, structure: structures.Structure | None) -> ml.ChannelFamilies | None:
    """Returns the channels of a model if a structure needs them, or None.

    Args:
        model: A built model.
        structure: The structure, or None.

    Raises:
        ValueError: If the structure is coupled, and the channels of the model cannot be followed.
    """
    if structure is None or not (structure.coupled or structure.whole_outputs):
        return None
    try:
        return ml.channel_families(model)
    except ValueError:
        if structure.coupled:
            raise
        return None


class Followed:
    """The channels of the model of a pruner, which are followed only once.

    Layers that stay whole are logged then, before anything is pruned.
    """

    def __init__(self) -> None:
        self._found = weakref.WeakKeyDictionary[keras.Model, ml.ChannelFamilies]()
        self._told: set[str] = set()

    def of(self, model: keras.Model, request: selection.Request) -> ml.ChannelFamilies | None:
        """Returns the channels as `follow` does, with the current scales as arrays."""
        structure = request.structure
        if structure is None or not (structure.coupled or structure.whole_outputs):
            return None
        found = self._found.get(model) or follow(model, structure)
        if found is not None:
            self._found[model] = found
        if repr(structure) not in self._told:
            self._told.add(repr(structure))
            _log(model, structure, found)
        if found is not None and "macs" in (request.budget or {}) and found.uncounted:
            _logger.warning(
                "The multiply-adds of these weights are not known, so the budget leaves them out: "
                "%s",
                ", ".join(found.uncounted),
            )
        if found is None or not isinstance(request.criterion, criteria.ChannelCriterion):
            return found
        families = [
            dataclasses.replace(
                family, scales=tuple((read(scale), entries) for scale, entries in family.scales)
            )
            for family in found.families
        ]
        return dataclasses.replace(found, families=tuple(families))


def _log(
    model: keras.Model, structure: structures.Structure, found: ml.ChannelFamilies | None
) -> None:
    """Logs which layers stay whole."""
    if found is None:
        _logger.warning(
            "The channels of %r cannot be followed, so the biases of pruned outputs and the "
            "weights that read them are kept: only Sequential and Functional models have a graph.",
            model.name,
        )
    elif structure.coupled and (found.whole or found.not_followed):
        whole = "; ".join([*_by_reason(found.not_followed), *_by_reason(found.whole)])
        _logger.warning("%s leaves layers of %r whole: %s", structure, model.name, whole)


def share_left(
    model: keras.Model,
    structure: structures.Structure | None,
    graph: ml.ChannelFamilies | None,
) -> float | None:
    """Returns the share of the channels, or of filters and units, that a structure has left.

    Args:
        model: The masked model.
        structure: The structure, or None.
        graph: The channels of the model, or None.

    Returns:
        None for a structure that prunes neither.
    """
    if structure is None:
        return None
    masks = ml.get_masks(model)
    if isinstance(structure, structures.Channels) and graph is not None:
        kept = [
            selection.kept_channels(family, masks)
            for family in graph.families
            if structure.takes(family.kind)
        ]
    elif structure.whole_outputs:
        kept = [
            np.any(masks[ref.path], axis=_besides(masks[ref.path].ndim, ref.output_axes))
            for ref in ml.masked_refs(model)
            if ref.output_axes
        ]
    else:
        return None
    return float(np.mean(np.concatenate([flags.reshape(-1) for flags in kept])))


def macs_left(model: keras.Model, graph: ml.ChannelFamilies) -> float | None:
    """Returns the share of the multiply-adds that is left in a masked model without its channels.

    None if the multiply-adds of a kernel are unknown, because the input shape is not fixed.
    """
    masks = ml.get_masks(model)
    costs = selection.Costs(graph, {path: mask.shape for path, mask in masks.items()})
    if costs.unknown or not graph.positions:
        return None
    return costs.left("macs", [selection.kept_channels(family, masks) for family in graph.families])


def _besides(rank: int, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(rank) if axis not in {other % rank for other in axes})


def left_out(
    graph: ml.ChannelFamilies | None, masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns masks of normalizations that leave out the channels without a kept weight.

    Args:
        graph: The channels of the model, or None.
        masks: Masks of weights by path.
    """
    found: dict[str, np.ndarray] = {}
    for family in [] if graph is None else graph.families:
        if family.normalized:
            kept = np.append(selection.kept_channels(family, masks), True)  # -1 is the last.
            for path, members in family.normalized.items():
                found[path] = kept[members] & found.get(path, True)
    return found


def without_pruned(
    model: keras.Model, graph: ml.ChannelFamilies | None, masks: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Returns `left_out` without the channels that the model leaves out already."""
    current = {ref.path: ref.mask.to_numpy() for ref in ml.channel_refs(model)}
    return {path: mask & current[path] for path, mask in left_out(graph, masks).items()}


def leave_out(
    model: keras.Model, graph: ml.ChannelFamilies | None, masks: Mapping[str, np.ndarray]
) -> None:
    """Makes normalizations of a model leave out the channels that have no kept weight."""
    if found := without_pruned(model, graph, masks):
        ml.set_masks(model, found)


def leaving_out(
    measure: selection.Measure, model: keras.Model, graph: ml.ChannelFamilies | None
) -> selection.Measure:
    """Returns a measure for which normalizations leave out the channels of pruned weights, too."""
    return lambda masks: measure({**masks, **without_pruned(model, graph, masks)})


def _by_reason(reasons: Mapping[str, str]) -> list[str]:
    """Returns a text for each reason, with the names of up to three layers it applies to."""
    layers: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        layers.setdefault(reason, []).append(name)
    return [f"{shortened(names, 3)}: {reason}" for reason, names in layers.items()]


def note_limits(
    request: selection.Request,
    graph: ml.ChannelFamilies | None,
    kernels: Mapping[str, selection.Weights],
    masks: Mapping[str, np.ndarray],
) -> None:
    """Logs the families in which fewer channels were pruned than requested.

    Args:
        request: The pruning request.
        graph: The channels of the model, or None.
        kernels: The kernels before, by path.
        masks: The masks afterwards, by path.
    """
    structure = request.structure
    # Early steps of a schedule may request less than one multiple of `round_to`.
    if graph is None or structure is None or not structure.coupled or request.keep_sparser:
        return
    if request.budget is not None:
        return
    before = {path: kernel.mask for path, kernel in kernels.items()}
    _log_shortfalls(request, selection.shortfalls(request, graph, before, masks))


def note_end(
    request: selection.Request,
    graph: ml.ChannelFamilies | None,
    masks: Mapping[str, np.ndarray],
) -> None:
    """Logs the families that did not reach the last sparsity of a schedule.

    Args:
        request: The last request of the schedule.
        graph: The channels of the model, or None.
        masks: The masks at the end of the training, by path.
    """
    if graph is not None and request.structure is not None and request.structure.coupled:
        _log_shortfalls(request, selection.shortfalls(request, graph, masks, masks))


def _log_shortfalls(request: selection.Request, found: Mapping[str, str]) -> None:
    if found:
        _logger.warning(
            "%s pruned fewer channels than %s requires: %s",
            request.structure,
            _amount(request),
            "; ".join(f"{name}: {numbers}" for name, numbers in found.items()),
        )


def _amount(request: selection.Request) -> str:
    if request.rate is not None:
        return f"a rate of {request.rate}"
    return f"a sparsity of {request.sparsity}"
