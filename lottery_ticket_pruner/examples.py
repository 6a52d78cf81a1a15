"""The earlier place of `Examples`: `lottery_ticket_pruner.training`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import Examples

__all__ = ["Examples"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
