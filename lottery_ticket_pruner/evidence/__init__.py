"""Measurements that criteria need besides recorded weights: gradients, activations, flow."""

from lottery_ticket_pruner.evidence.activations import input_norms, require_known_inputs
from lottery_ticket_pruner.evidence.flow import SynapticFlow
from lottery_ticket_pruner.evidence.gradients import hessian_gradients, loss_gradients
from lottery_ticket_pruner.evidence.inputs import State, batches, layer_inputs
from lottery_ticket_pruner.evidence.sources import differentiates, measurement, unpacked

__all__ = [
    "State",
    "SynapticFlow",
    "batches",
    "differentiates",
    "hessian_gradients",
    "input_norms",
    "layer_inputs",
    "loss_gradients",
    "measurement",
    "require_known_inputs",
    "unpacked",
]
