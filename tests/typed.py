"""Typical user code for type checkers: `mypy` checks this file, and nothing runs it."""

import keras
import numpy as np

import masked_layers
from lottery_ticket_pruner import (
    LotteryTicketPruner,
    callbacks,
    criteria,
    distributions,
    schedules,
    training,
    treatments,
)
from masked_layers import MaskedConv2D, MaskedDense, MaskedLayer, MaskedLSTM

layers: list[keras.layers.Layer] = [
    MaskedConv2D(8, 3, padding="same", masked_weights=["kernel"]),
    MaskedLSTM(16, mask_bias=True),
    MaskedDense(3),
]
model: keras.Model = masked_layers.convert_to_masked(keras.Sequential(layers))
ref: masked_layers.WeightRef = masked_layers.weight_refs(model)[0]
name: str = ref.layer.name
kept: masked_layers.MaskedRef = masked_layers.masked_refs(model)[0]
mask: np.ndarray = kept.mask.to_numpy()


def units(layer: MaskedDense) -> int:
    kept: MaskedLayer = layer
    assert isinstance(kept, MaskedDense)
    return layer.units


@criteria.register("relative_growth", needs={"initial", "final"}, elementwise=True)
def relative_growth(group: criteria.Group) -> np.ndarray:
    return np.abs(group.final) / (np.abs(group.initial) + 0.01)


@criteria.register("loss_change", needs={"current", "gradient"}, elementwise=True)
def loss_change(group: criteria.Group) -> np.ndarray:
    return -group.gradient * group.current


@distributions.register("fan_in")
def fan_in(shape: tuple[int, ...]) -> float:
    return shape[-1] / float(np.prod(shape))


@schedules.register("staircase")
def staircase(step: int) -> float:
    return min(step // 1000, 9) / 10


@treatments.register_kept("halved", needs_final=True)
def halved(kernel: treatments.Kernel) -> np.ndarray:
    return kernel.final / 2


@treatments.register_pruned("frozen_tenth")
def frozen_tenth(kernel: treatments.Kernel, values: np.ndarray) -> np.ndarray:
    return np.where(kernel.mask, values, kernel.initial / 10)


def prune(model: keras.Model) -> float:
    pruner = LotteryTicketPruner(model)
    pruner.update_masks(relative_growth, rate=0.5)
    return masked_layers.sparsity_report(model).sparsity


def prune_while_training(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    pruner = LotteryTicketPruner(model)
    pruning = callbacks.GradualPruning(pruner, "staircase", scope="global")
    training.train(model, x, y, steps=9000, batch_size=60, on_progress=pruning.advance)
    pruner.treat(halved, treatments.get_pruned("zero"))
