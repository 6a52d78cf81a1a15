"""Evidence: what a criterion needs beside the records, worked out on the model and on data."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from numbers import Real
from typing import Any

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import criteria, selection
from lottery_ticket_pruner.activations import input_norms
from lottery_ticket_pruner.data import arrays_of
from lottery_ticket_pruner.flow import SynapticFlow
from lottery_ticket_pruner.gradients import hessian_gradients, loss_gradients

Source = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]


def update(
    model: keras.Model,
    criterion: criteria.Criterion,
    kernels: Mapping[str, selection.Weights],
    *,
    data: Any = None,
    rate: selection.Share | None = None,
    sparsity: selection.Share | None = None,
    **options: Any,
) -> dict[str, np.ndarray]:
    """New masks, as `selection.update` has them, with the evidence that the criterion needs.

    Args:
        model: masked; it is not changed.
        criterion: what ranks the weights. In several rounds, each round drops the same share of
            what is alive, and the last reaches what was asked for exactly.
        kernels: the weights by path, without evidence. Nothing in them is changed.
        data: `(x, y)` or `(x, y, sample_weight)`, or `x` where no targets are needed.
        rate: as for `selection.update`.
        sparsity: as for `selection.update`.
        **options: further arguments of `selection.update`.

    Raises:
        ValueError: there are no data of the kind that the criterion needs, whatever the evidence
            or `selection.update` refuses, or rounds are to lead on from masks that are not ones
            under a structure.
    """
    structure, keep_sparser = options.get("structure"), options.get("keep_sparser", False)
    amounts = _amounts(criterion, kernels, rate, sparsity, structure, keep_sparser)
    sources = {name: _SOURCES[name](criterion, model, data) for name in criterion.evidence}
    for amount in amounts:
        masks = {path: kernel.mask for path, kernel in kernels.items()}
        found = {name: source(masks) for name, source in sources.items()}
        kernels = {
            path: dataclasses.replace(kernel, **{name: found[name][path] for name in found})
            for path, kernel in kernels.items()
        }
        masks = selection.update(criterion, kernels, **amount, **options)
        kernels = {
            path: dataclasses.replace(kernel, mask=masks[path]) for path, kernel in kernels.items()
        }
    return masks


def _amounts(
    criterion: criteria.Criterion,
    kernels: Mapping[str, selection.Weights],
    rate: selection.Share | None,
    sparsity: selection.Share | None,
    structure: Any,
    keep_sparser: bool,
) -> list[dict[str, selection.Share | None]]:
    """What to ask of the selection, round by round."""
    last = {"rate": rate, "sparsity": sparsity}
    share = rate if sparsity is None else sparsity
    rounds = criterion.rounds
    # What is wrong with the amount is for the selection to say.
    if rounds == 1 or not isinstance(share, Real) or not 0 <= share < 1:
        return [last]
    size = sum(kernel.mask.size for kernel in kernels.values())
    alive = sum(int(np.count_nonzero(kernel.mask)) for kernel in kernels.values())
    if structure is not None and (alive < size or sparsity is None):
        raise ValueError(
            f"Criterion {criterion.name!r} prunes in {rounds} rounds. With a structure these start "
            "from masks of ones and lead to a `sparsity`: reset the masks, or leave one of both."
        )
    now = alive / size
    # What was asked for, not what is left once counts are rounded: that is for each round to do.
    then = now * (1 - rate) if sparsity is None else min(now, 1 - sparsity)
    if structure is None:
        left = alive - selection.drop_count(
            size, alive, rate=rate, sparsity=sparsity, keep_sparser=keep_sparser
        )
        last = {"sparsity": 1 - left / size}
    densities = [now * (then / now) ** (k / rounds) for k in range(1, rounds)]
    return [*({"sparsity": 1 - density} for density in densities), last]


def _of_loss(function: Callable) -> Callable[..., Source]:
    """The source of what a function of model, inputs and targets finds."""

    def source(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
        x, y, sample_weight = _unpack(data)
        if x is None or y is None:
            raise ValueError(
                f"Criterion {criterion.name!r} differentiates the model's loss, for which it needs "
                "inputs and targets: `update_masks(..., data=(x, y))`. "
                f"Received: data={'None' if data is None else 'without targets'}"
            )

        def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            with _under(model, masks):
                return function(model, x, y, sample_weight=sample_weight)

        return find

    return source


def _of_inputs(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
    x = _unpack(data)[0]
    if x is None:
        raise ValueError(
            f"Criterion {criterion.name!r} measures what enters each layer, for which it needs "
            "inputs: `update_masks(..., data=x)`. Received: data=None"
        )

    def find(masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with _under(model, masks):
            return input_norms(model, x)

    return find


def _of_flow(criterion: criteria.Criterion, model: keras.Model, data: Any) -> Source:
    return SynapticFlow(model, _unpack(data)[0])


_SOURCES: dict[str, Callable[..., Source]] = {
    "gradient": _of_loss(loss_gradients),
    "hessian_gradient": _of_loss(hessian_gradients),
    "flow": _of_flow,
    "input_norm": _of_inputs,
}


def differentiates(criterion: criteria.Criterion) -> bool:
    """Returns whether a criterion needs targets, to differentiate the loss."""
    return bool({"gradient", "hessian_gradient"} & set(criterion.evidence))


def _unpack(data: Any) -> tuple[Any, Any, Any]:
    """`(x, y, sample_weight)` of what Keras calls data; a list is several inputs, not a pair."""
    parts = data if isinstance(data, tuple) else arrays_of(data)
    if not 1 <= len(parts) <= 3:
        raise ValueError(
            "`data` must be x, (x, y) or (x, y, sample_weight). "
            f"Received a tuple of {len(parts)} parts."
        )
    return (*parts, None, None)[:3]


@contextlib.contextmanager
def _under(model: keras.Model, masks: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Gives the model other masks for a while."""
    before = ml.get_masks(model)
    changed = {path for path, mask in masks.items() if not np.array_equal(mask, before[path])}
    ml.set_masks(model, {path: masks[path] for path in changed})
    try:
        yield
    finally:
        ml.set_masks(model, {path: before[path] for path in changed})
