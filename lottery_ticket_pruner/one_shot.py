"""Prunes a trained model without training: layer by layer, and with reconstruction."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import channels, evidence, notices, reconstruction, selection
from lottery_ticket_pruner.overrides import weights_replaced
from lottery_ticket_pruner.records import is_masked
from lottery_ticket_pruner.training import ArrayDataset, Arrays
from masked_layers import MaskedRef, workers
from masked_layers.maskable import raw_variable, weights_inside
from masked_layers.paths import plain_class, walk

_logger = logging.getLogger(__name__)

# Examples in a forward pass, and bytes of all inputs of its layers, as far as one example allows.
_BATCH, _BYTES = 128, 2**26
Masks = dict[str, np.ndarray]
Values = list[tuple[keras.Variable, np.ndarray]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manner:
    """The manner in which masks are chosen and kept weights are changed.

    Attributes:
        reconstruct: Whether kept weights are fitted to the former outputs of their layers.
        sequential: Whether the inputs of each layer are measured after the layers before it have
            been pruned (and reconstructed).
    """

    reconstruct: bool = False
    sequential: bool = False


ALL_AT_ONCE = Manner()


def masks_and_values(
    model: keras.Model,
    request: selection.Request,
    kernels: Mapping[str, selection.Weights],
    graph: ml.ChannelFamilies | None,
    data: Any,
    manner: Manner,
    final: Sequence[np.ndarray] | None,
    probe: selection.Probe | selection.WeightProbe | None = None,
) -> tuple[Masks, Values]:
    """Computes new masks of a model, and new values of its weights and statistics.

    The model is left unchanged.

    Args:
        model: A model. A plain one is pruned without data.
        request: The pruning request.
        kernels: Its kernels by path.
        graph: Its channels, if the request needs them.
        data: Data as for `update_masks`.
        manner: How to prune.
        final: The recorded final weights, or None.
        probe: Measurements for a budget, or None.

    Returns:
        The masks by path, and pairs of a variable and its new value.

    Raises:
        ValueError: If data is missing or the request does not fit the model.
    """
    criterion = request.criterion
    if not is_masked(model) or not (criterion.evidence or manner.reconstruct):
        return selection.select(request, kernels, graph=graph, probe=probe), []
    parts = evidence.unpacked(data)
    if manner.reconstruct and parts[0] is None:
        raise ValueError(
            "`reconstruct=True` fits the kept weights on examples and needs inputs: "
            "`update_masks(..., reconstruct=True, data=x)`. Received: data=None"
        )
    in_order = manner.sequential and parts[0] is not None
    alone = _alone(model, request, kernels) if in_order else None
    masks = {}
    if alone is None:
        # Criteria of final weights measure their evidence with these weights in the model.
        with weights_replaced(model, final if "final" in criterion.needs else None):
            measure: selection.Measure = evidence.measurement(model, criterion, parts)
            measure = channels.leaving_out(measure, model, graph)
            masks = selection.select(
                request, kernels, measure if criterion.evidence else None, graph, probe
            )
        if not manner.reconstruct:
            return masks, []
    network = _PrunedNetwork(model, parts[0])
    if alone is None:
        network.set_masks({**masks, **channels.without_pruned(model, graph, masks)})
    left = network.not_fitted() if manner.reconstruct else {}
    _in_order(network, kernels, alone, manner)
    if left:
        notices.warn(
            "These kernels were not reconstructed: "
            + "; ".join(f"{path}: {reason}" for path, reason in left.items())
        )
    for variable, _ in network.values[:1]:
        new = [value for _, value in network.values]
        workers.check_agreement(variable, new, "reconstructed weights")
    return {path: network.masks.get(path, kernels[path].mask) for path in kernels}, network.values


def _alone(
    model: keras.Model, request: selection.Request, kernels: Mapping[str, selection.Weights]
) -> dict[str, selection.Request] | None:
    """Returns a request for each kernel if its weights are ranked by the inputs of its layer.

    Raises:
        ValueError: If these inputs are not known for a masked weight.
    """
    criterion = request.criterion
    if criterion.evidence != {"input_norm"} or "final" in criterion.needs:
        return None
    alone = selection.apart(request, kernels)
    if alone is None:
        _logger.warning(
            "%s was measured on the model before the update, and not layer by layer, because %s "
            "ranks weights of several layers together.",
            criterion.name,
            "a budget" if request.budget else request.structure or f"the scope {request.scope!r}",
        )
    else:
        evidence.require_known_inputs(
            model
        )  # Now, to name all weights before anything is measured.
    return alone


class _PrunedNetwork:
    """A masked model with other masks and values, which exist only in its forward passes."""

    def __init__(self, model: keras.Model, x: Arrays) -> None:
        ml.sync(model)
        self.model, self.x, self.data = model, x, ArrayDataset.of(x)
        self.masks: Masks = {}
        self._refs = {ref.path: ref for ref in (*ml.masked_refs(model), *ml.channel_refs(model))}
        self._state: dict[int, tuple[keras.Variable, Any]] = {}
        self._values: dict[int, tuple[keras.Variable, np.ndarray]] = {}
        masked = {id(ref.variable): ref.path for ref in ml.masked_refs(model)}
        self._weights: dict[layers.Layer, list[str]] = {}
        for _, layer, name in weights_inside(model, biases=True):
            if path := masked.get(id(raw_variable(layer, name))):
                self._weights.setdefault(layer, []).append(path)
        normalizations = [layer for _, layer in walk(model) if reconstruction.has_statistics(layer)]
        example = next(evidence.batches(self.data, 1))
        seen = evidence.layer_inputs(model, example, [*self._weights, *normalizations])
        self._shapes: dict[layers.Layer, list[tuple[int, ...]]] = {}
        for layer, inputs in seen:
            self._shapes.setdefault(layer, []).append(tuple(inputs.shape))
        self.calls = {layer: len(shapes) for layer, shapes in self._shapes.items()}

    @functools.cached_property
    def batch_size(self) -> int:
        """Examples in a forward pass, which a functional model ends with all its activations."""
        shapes = [shape for each in self._shapes.values() for shape in each]
        size = 4 * sum(math.prod(shape) for shape in shapes)
        largest = max((target.bytes for target in self.targets.values()), default=0)
        return max(1, min(_BATCH, max(_BYTES, largest) // max(1, size)))

    @property
    def state(self) -> list[tuple[keras.Variable, Any]]:
        """Variables with other values than in the model, as tensors."""
        return list(self._state.values())

    @property
    def values(self) -> Values:
        """New values of weights and statistics."""
        return list(self._values.values())

    def set_masks(self, masks: Mapping[str, np.ndarray]) -> None:
        """Sets masks of weights and normalizations by path."""
        self.masks |= masks
        for path, mask in masks.items():
            variable = self._refs[path].mask.value
            self._state[id(variable)] = variable, ops.convert_to_tensor(mask, dtype="bool")

    def assign(self, values: Values) -> None:
        """Sets weights and statistics."""
        for variable, value in values:
            tensor = ops.convert_to_tensor(value, dtype=variable.dtype)
            self._values[id(variable)] = variable, value
            self._state[id(variable)] = variable, tensor

    def weights_of(self, layer: layers.Layer) -> list[str]:
        """Returns the masked weights of a layer for which no layer before it has decided."""
        earlier = [*self.calls, *self._weights]
        earlier = earlier[: earlier.index(layer)]
        taken = {path for other in earlier for path in self._weights.get(other, ())}
        return [path for path in self._weights.get(layer, ()) if path not in taken]

    def order(self) -> Iterator[layers.Layer]:
        """Yields the layers with masks or statistics, in the order of their first calls."""
        yield from self.calls
        yield from (layer for layer in self._weights if layer not in self.calls)

    def input_norms(self, paths: Sequence[str]) -> dict[str, np.ndarray]:
        """Returns the norms of the inputs of weights in the pruned network."""
        holders = [layer for layer, own in self._weights.items() if {*own} & {*paths}]
        calls = sum(self.calls.get(layer, 0) for layer in holders)
        return evidence.input_norms(
            self.model,
            self.x,
            batch_size=self.batch_size,
            paths=paths,
            state=self.state,
            calls=calls or None,
        )

    @functools.cached_property
    def targets(self) -> dict[layers.Layer, reconstruction.Target]:
        """The layers that can be reconstructed, in the order of their first calls."""
        kernels = {ref.layer: ref for ref in self._kernels() if not self._why_not(ref)}
        found = {}
        for layer in self.calls:
            product = reconstruction.product_of(layer) if layer in kernels else None
            if product is not None:
                found[layer] = reconstruction.Target(
                    path=kernels[layer].path,
                    layer=layer,
                    kernel=kernels[layer],
                    product=product,
                    shapes=self._shapes[layer],
                )
        return found

    def not_fitted(self) -> dict[str, str]:
        """Returns the reasons why masked kernels cannot be reconstructed, by path."""
        reasons = {ref.path: self._why_not(ref) for ref in self._kernels()}
        return {path: reason for path, reason in reasons.items() if reason}

    def _kernels(self) -> list[MaskedRef]:
        return [ref for ref in ml.masked_refs(self.model) if ref.output_axes]

    def _why_not(self, ref: MaskedRef) -> str:
        if sum(ref.path in own for own in self._weights.values()) > 1:
            return "several layers share it"
        if ref.mask.quantization is not None:
            return "its weights are rounded in the forward pass, and the fit would be rounded, too"
        if reconstruction.product_of(ref.layer) is None:
            return f"{plain_class(ref.layer).__name__} is not a product of inputs and kernel"
        return "" if ref.layer in self.calls else "its layer was not called"

    @property
    def unplaced(self) -> bool:
        """True if a masked weight is in a layer without calls, whose place in the order is unknown.

        Such as a recurrent cell, which a backend may compute without calling it.
        """
        return not self._weights.keys() <= self.calls.keys()


def _in_order(
    network: _PrunedNetwork,
    kernels: Mapping[str, selection.Weights],
    alone: Mapping[str, selection.Request] | None,
    manner: Manner,
) -> None:
    """Prunes the layers of a network and fits their weights, in the order of their calls."""
    fitted = _Fitted(network, manner) if manner.reconstruct else None
    for layer in network.order():
        paths = network.weights_of(layer)
        if alone is not None and paths:
            norms = network.input_norms(paths)
            for path in paths:
                if path in alone:
                    weights = {path: kernels[path].with_records({"input_norm": norms[path]})}
                    network.set_masks(selection.select(alone[path], weights))
        if fitted is not None:
            fitted.reach(layer)


class _Fitted:
    """The fits of a network, layer by layer.

    Args:
        network: The network, whose values are set.
        manner: Whether to fit each layer after those before it, or all at once.
    """

    def __init__(self, network: _PrunedNetwork, manner: Manner) -> None:
        self._network, self._sequential = network, manner.sequential
        targets = list(network.targets.values())
        model, data, batch_size = network.model, network.data, network.batch_size
        self._former = reconstruction.FormerOutputs(model, data, targets, batch_size)
        self._last: tuple[reconstruction.Target, reconstruction.Fit] | None = None
        self._changed = network.unplaced
        if not self._sequential:
            state = network.state
            for fit in reconstruction.fit_apart(model, data, targets, state, batch_size):
                self._take(fit)

    def reach(self, layer: layers.Layer) -> None:
        """Fits a layer, or estimates its statistics, after all layers before it."""
        network, model, data = self._network, self._network.model, self._network.data
        state, batch_size = network.state, network.batch_size
        target = network.targets.get(layer)
        if target is not None and self._sequential:
            fit = reconstruction.fit_after(model, data, target, self._former, state, batch_size)
            self._take(fit)
            self._last = target, fit
        elif layer in network.calls and reconstruction.has_statistics(layer) and self._changed:
            if self._last is not None and reconstruction.reads_only(layer, self._last[0]):
                fit = self._last[1]
                values = [(layer.moving_mean, fit.mean), (layer.moving_variance, fit.variance)]
            else:
                calls = network.calls[layer]
                values = reconstruction.statistics(model, data, layer, calls, state, batch_size)
            network.assign(values)
        self._changed |= bool(network.weights_of(layer))

    def _take(self, fit: reconstruction.Fit) -> None:
        _note(fit)
        self._network.assign(fit.values)


def _note(fit: reconstruction.Fit) -> None:
    _logger.info(
        "Reconstructed %s: the squared error of its outputs is %.3g of their squares, %.3g with "
        "the mask alone.",
        *(fit.path, fit.after, fit.before),
    )
