"""The earlier place of `input_norms`: `lottery_ticket_pruner.evidence`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.evidence import input_norms

__all__ = ["input_norms"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.evidence")
