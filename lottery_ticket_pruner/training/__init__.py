"""Training on data in memory, in compiled loops around the model's own step."""

from typing import TYPE_CHECKING

from lottery_ticket_pruner._moved import earlier_names
from lottery_ticket_pruner.training.augmentation import Augmentation, CropAndFlip
from lottery_ticket_pruner.training.dataset import ArrayDataset, Arrays, map_arrays
from lottery_ticket_pruner.training.engine import engine_of, fixed_batch_size
from lottery_ticket_pruner.training.engine_settings import EngineSettings, settings
from lottery_ticket_pruner.training.loading import pair_of, to_arrays
from lottery_ticket_pruner.training.loops import (
    History,
    batch_order,
    evaluate,
    fit,
    held_out,
    train,
    train_by_plan,
)
from lottery_ticket_pruner.training.plans import Listeners, TrainingPlan, check_integer
from lottery_ticket_pruner.training.step_callback import LoopChanges, StepCallback

__all__ = [
    "ArrayDataset",
    "Arrays",
    "Augmentation",
    "CropAndFlip",
    "EngineSettings",
    "History",
    "Listeners",
    "LoopChanges",
    "StepCallback",
    "TrainingPlan",
    "batch_order",
    "check_integer",
    "engine_of",
    "evaluate",
    "fit",
    "fixed_batch_size",
    "held_out",
    "map_arrays",
    "pair_of",
    "settings",
    "to_arrays",
    "train",
    "train_by_plan",
]

if not TYPE_CHECKING:  # Otherwise type checkers would accept every name.
    __getattr__ = earlier_names(__name__, {"Examples": ArrayDataset, "arrays_of": to_arrays})
