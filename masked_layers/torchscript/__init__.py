"""TorchScript programs with sparse kernels where they are faster: files and Keras models.

PyTorch is imported only when a function needs it.
"""

from masked_layers.torchscript.candidates import program_costs, program_report
from masked_layers.torchscript.costs import GAIN, SPARSE_FROM, ProductCosts, ProgramCosts
from masked_layers.torchscript.export import export_sparse_torch
from masked_layers.torchscript.inference import AcceleratedModel, accelerate
from masked_layers.torchscript.report import KernelRow, TorchReport

__all__ = [
    "GAIN",
    "SPARSE_FROM",
    "AcceleratedModel",
    "KernelRow",
    "ProductCosts",
    "ProgramCosts",
    "TorchReport",
    "accelerate",
    "export_sparse_torch",
    "program_costs",
    "program_report",
]
