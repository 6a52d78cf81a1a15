"""Lottery tickets in Keras 3: find the sparse nets that train as well as the dense one."""

from lottery_ticket_pruner import serialization as _serialization  # noqa: F401 (registers)
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.callbacks import PrunerCallback
from lottery_ticket_pruner.compression import ModelComparison, PruneResult, compare, prune
from lottery_ticket_pruner.mask_schedules import DynamicSparseTraining, GradualPruning
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.tickets import TicketResult, find_ticket

__version__ = "1.0.0.dev0"

__all__ = [
    "DynamicSparseTraining",
    "GradualPruning",
    "Latency",
    "LotteryTicketPruner",
    "ModelComparison",
    "PruneResult",
    "PrunerCallback",
    "TicketResult",
    "compare",
    "find_ticket",
    "prune",
]
