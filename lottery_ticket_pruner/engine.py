"""The earlier place of `engine_of`: `lottery_ticket_pruner.training`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import engine_of

__all__ = ["engine_of"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
