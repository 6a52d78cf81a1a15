"""The earlier place of `Augmentation` and `CropAndFlip`: `lottery_ticket_pruner.training`."""

import warnings

from lottery_ticket_pruner.training import Augmentation, CropAndFlip

__all__ = ["Augmentation", "CropAndFlip"]

warnings.warn(
    "`Augmentation` and `CropAndFlip` have moved to `lottery_ticket_pruner.training`: import them "
    "from there. `lottery_ticket_pruner.augmentation` will be removed in a later release.",
    DeprecationWarning,
    stacklevel=2,
)
