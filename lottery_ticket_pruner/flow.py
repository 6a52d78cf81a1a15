"""The earlier place of `SynapticFlow`: `lottery_ticket_pruner.evidence`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.evidence import SynapticFlow

__all__ = ["SynapticFlow"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.evidence")
