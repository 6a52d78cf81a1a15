"""Selection: turns scores into masks, with exact counts.

Pure functions on arrays, without a model. Ties are broken in an order that depends only on the
seed.
"""

from lottery_ticket_pruner.selection.amounts import drop_count
from lottery_ticket_pruner.selection.budgets import Costs
from lottery_ticket_pruner.selection.byte_search import StoredSize
from lottery_ticket_pruner.selection.channels import shortfalls
from lottery_ticket_pruner.selection.families import kept_channels
from lottery_ticket_pruner.selection.latency_search import Probe
from lottery_ticket_pruner.selection.lowest import drop_lowest
from lottery_ticket_pruner.selection.multiply_adds import MultiplyAdds
from lottery_ticket_pruner.selection.new_masks import (
    Measure,
    apart,
    select,
    select_many,
    update,
    update_many,
)
from lottery_ticket_pruner.selection.random_masks import shuffled_within
from lottery_ticket_pruner.selection.request import Request, resolve_scope
from lottery_ticket_pruner.selection.served_latency import Loads, Product, ServedProbe
from lottery_ticket_pruner.selection.weight_budgets import WeightProbe
from lottery_ticket_pruner.selection.weights import Weights
from lottery_ticket_pruner.shares import Share

__all__ = [
    "Costs",
    "Loads",
    "Measure",
    "MultiplyAdds",
    "Probe",
    "Product",
    "Request",
    "ServedProbe",
    "Share",
    "StoredSize",
    "WeightProbe",
    "Weights",
    "apart",
    "drop_count",
    "drop_lowest",
    "kept_channels",
    "resolve_scope",
    "select",
    "select_many",
    "shortfalls",
    "shuffled_within",
    "update",
    "update_many",
]
