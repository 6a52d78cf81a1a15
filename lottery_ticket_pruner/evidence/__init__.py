"""Measurements that criteria need besides recorded weights: gradients, activations, flow."""

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
