"""The earlier place and name of `lottery_ticket_pruner.training.ArrayDataset`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import ArrayDataset as Examples

__all__ = ["Examples"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
