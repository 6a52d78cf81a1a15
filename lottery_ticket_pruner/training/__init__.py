"""Training on data in memory, in compiled loops around the model's own step."""

from lottery_ticket_pruner.training.augmentation import Augmentation, CropAndFlip
from lottery_ticket_pruner.training.dataset import Arrays, Examples, map_arrays
from lottery_ticket_pruner.training.engine import engine_of
from lottery_ticket_pruner.training.engine_settings import EngineSettings, settings
from lottery_ticket_pruner.training.loading import arrays_of, pair_of
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

__all__ = [
    "Arrays",
    "Augmentation",
    "CropAndFlip",
    "EngineSettings",
    "Examples",
    "History",
    "Listeners",
    "TrainingPlan",
    "arrays_of",
    "batch_order",
    "check_integer",
    "engine_of",
    "evaluate",
    "fit",
    "held_out",
    "map_arrays",
    "pair_of",
    "settings",
    "train",
    "train_by_plan",
]
