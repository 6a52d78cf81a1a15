"""TorchScript files that PyTorch alone loads and runs, with sparse kernels where they are faster.

PyTorch is imported only when a function needs it.
"""

from masked_layers.torchscript.export import export_sparse_torch
from masked_layers.torchscript.report import KernelRow, TorchReport

__all__ = ["KernelRow", "TorchReport", "export_sparse_torch"]
