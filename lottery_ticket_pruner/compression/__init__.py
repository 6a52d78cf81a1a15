"""From a trained model to the smallest one that is good enough."""

from lottery_ticket_pruner.compression.comparing import (
    ModelComparison,
    Subject,
    compare,
    compare_subjects,
    predict_in_batches,
)
from lottery_ticket_pruner.compression.metrics import Comparison, compare_models
from lottery_ticket_pruner.compression.parts import Parts, parts_of, split_off_test, test_part_of
from lottery_ticket_pruner.compression.plan import Goals, Options, Plan
from lottery_ticket_pruner.compression.pruning import prune, search
from lottery_ticket_pruner.compression.result import (
    Findings,
    PruneResult,
    reason_of,
    save_model,
    verdict_of,
)
from lottery_ticket_pruner.compression.states import STATE_FILE
from lottery_ticket_pruner.compression.steps import served_size

__all__ = [
    "STATE_FILE",
    "Comparison",
    "Findings",
    "Goals",
    "ModelComparison",
    "Options",
    "Parts",
    "Plan",
    "PruneResult",
    "Subject",
    "compare",
    "compare_models",
    "compare_subjects",
    "parts_of",
    "predict_in_batches",
    "prune",
    "reason_of",
    "save_model",
    "search",
    "served_size",
    "split_off_test",
    "test_part_of",
    "verdict_of",
]
