"""The earlier place of `Augmentation` and `CropAndFlip`: `lottery_ticket_pruner.training`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import Augmentation, CropAndFlip

__all__ = ["Augmentation", "CropAndFlip"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
