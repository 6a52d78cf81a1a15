"""Evidence: what criteria need beside the records, measured on the model and on data."""

from lottery_ticket_pruner.evidence.activations import input_norms
from lottery_ticket_pruner.evidence.flow import SynapticFlow
from lottery_ticket_pruner.evidence.gradients import hessian_gradients, loss_gradients
from lottery_ticket_pruner.evidence.sources import differentiates, measurement

__all__ = [
    "SynapticFlow",
    "differentiates",
    "hessian_gradients",
    "input_norms",
    "loss_gradients",
    "measurement",
]
