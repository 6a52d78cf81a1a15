"""Sparse SavedModels that any TensorFlow runtime can serve.

TensorFlow is imported only when a function needs it.
"""

from masked_layers.serving.codes import scaled
from masked_layers.serving.inspection import inspect
from masked_layers.serving.report import StorageReport, StorageRow
from masked_layers.serving.samples import outputs_of, samples_of
from masked_layers.serving.saved_model import export_sparse_saved_model, stored_nbytes
from masked_layers.serving.tracing import effective_values
from masked_layers.serving.verification import relative_difference

__all__ = [
    "StorageReport",
    "StorageRow",
    "effective_values",
    "export_sparse_saved_model",
    "inspect",
    "outputs_of",
    "relative_difference",
    "samples_of",
    "scaled",
    "stored_nbytes",
]
