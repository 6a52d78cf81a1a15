"""The earlier place of `arrays_of` and `pair_of`: `lottery_ticket_pruner.training`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import arrays_of, pair_of

__all__ = ["arrays_of", "pair_of"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
