"""Selection: how many weights go, and which. Scores become masks, to the exact count.

Pure functions on arrays, without a model. Weights with equal scores go in an order that the seed
alone decides.
"""

from lottery_ticket_pruner.selection.amounts import drop_count, resolve_scope
from lottery_ticket_pruner.selection.lowest import drop_lowest
from lottery_ticket_pruner.selection.new_masks import update, update_many
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import Share

__all__ = [
    "Share",
    "Weights",
    "drop_count",
    "drop_lowest",
    "resolve_scope",
    "update",
    "update_many",
]
