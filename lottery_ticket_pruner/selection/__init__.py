"""Selection: how many weights go, and which. Scores become masks, to the exact count.

Pure functions on arrays, without a model. Weights with equal scores go in an order that the seed
alone decides.
"""

from lottery_ticket_pruner.selection.amounts import drop_count
from lottery_ticket_pruner.selection.lowest import drop_lowest
from lottery_ticket_pruner.selection.new_masks import (
    Measure,
    select,
    select_many,
    update,
    update_many,
)
from lottery_ticket_pruner.selection.request import Request, resolve_scope
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import Share

__all__ = [
    "Measure",
    "Request",
    "Share",
    "Weights",
    "drop_count",
    "drop_lowest",
    "resolve_scope",
    "select",
    "select_many",
    "update",
    "update_many",
]
