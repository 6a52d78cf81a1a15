"""The earlier place of `to_arrays` (then `arrays_of`) and `pair_of`: `training`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.training import pair_of
from lottery_ticket_pruner.training import to_arrays as arrays_of

__all__ = ["arrays_of", "pair_of"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.training")
