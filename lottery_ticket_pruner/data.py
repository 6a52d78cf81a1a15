"""The earlier place of `arrays_of` and `pair_of`: `lottery_ticket_pruner.training`."""

import warnings

from lottery_ticket_pruner.training import arrays_of, pair_of

__all__ = ["arrays_of", "pair_of"]

warnings.warn(
    "`arrays_of` and `pair_of` have moved to `lottery_ticket_pruner.training`: import them from "
    "there. `lottery_ticket_pruner.data` will be removed in a later release.",
    DeprecationWarning,
    stacklevel=2,
)
