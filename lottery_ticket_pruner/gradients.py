"""The earlier place of two functions, `hessian_gradients` and `loss_gradients`, of `evidence`."""

from lottery_ticket_pruner._moved import warn_of_earlier_place
from lottery_ticket_pruner.evidence import hessian_gradients, loss_gradients

__all__ = ["hessian_gradients", "loss_gradients"]

warn_of_earlier_place(__name__, "lottery_ticket_pruner.evidence")
