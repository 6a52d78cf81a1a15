"""Measures TorchScript programs with sparse kernels, for budgets of latency of single weights."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping

import keras
import numpy as np

import masked_layers as ml
from lottery_ticket_pruner import selection
from lottery_ticket_pruner.budgets import Latency
from lottery_ticket_pruner.overrides import bystanders_kept, masks_replaced
from masked_layers import shrinking, torchscript

_logger = logging.getLogger(__name__)

# Sparsities for which kernels are measured. Below the first one, the export tries none.
_SPARSITIES = (torchscript.SPARSE_FROM, 0.65, 0.8, 0.9, 0.95, 0.98, 0.999)


@dataclasses.dataclass(frozen=True)
class ServedLatency:
    """The latency of a TorchScript program with which a budget was met.

    Attributes:
        budget: The budget.
        predicted: Latency that was predicted for this program, in the unit of the budget; None if
            the model met the budget before the update.
        measured: The same as measured.
        dense_milliseconds: Median milliseconds of a call of the program with dense kernels.
        milliseconds: The same for the program of the pruned model.
        trials: Number of programs that were measured.
        report: The report on the program, as `masked_layers.export_sparse_torch` returns it.
    """

    budget: Latency
    predicted: float | None
    measured: float
    dense_milliseconds: float
    milliseconds: float
    trials: int
    report: ml.TorchReport

    @property
    def met(self) -> bool:
        """True if the measured latency is within the budget."""
        return self.measured <= self.budget.limit

    def __str__(self) -> str:
        unit = "ms" if self.budget.share is None else "of the latency without pruning"
        predicted = "" if self.predicted is None else f", predicted {self.predicted:.3g}"
        return (
            f"measured {self.measured:.3g} {unit}{predicted}, batch size "
            f"{self.budget.batch_size}, threads: {self.report.threads}, programs tried: "
            f"{self.trials}; TorchScript {self.dense_milliseconds:.3g} ms -> "
            f"{self.milliseconds:.3g} ms"
        )


class ServedProbes:
    """Measures the programs that would be served of a model, for `selection.select`.

    The masks of the model are changed only while it is copied.

    Args:
        model: The masked model.
        latency: The budget.
    """

    def __init__(self, model: keras.Model, latency: Latency) -> None:
        self._model, self._latency = model, latency
        self._tried: list[tuple[Mapping[str, np.ndarray], ServedLatency]] = []

    def loads(self) -> selection.Loads:
        """Measures the products of the model with sparse kernels, and logs which have none.

        Raises:
            ImportError: If PyTorch is missing.
            NotImplementedError: If the model cannot be written as TorchScript.
        """
        latency = self._latency
        with bystanders_kept():
            dense = shrinking.unpruned(self._model)
        costs = torchscript.program_costs(dense, _SPARSITIES, batch_size=latency.batch_size)
        share, limit = latency.share, latency.limit
        budget = limit / 1e3 if share is None else share * costs.seconds
        # Alone, products of small inputs take longer than in the program; no more than all of it.
        alone = sum(each.dense for each in costs.products)
        scale = min(1.0, costs.seconds / alone) / budget if alone else 1 / budget
        refs = ml.masked_refs(self._model)
        sizes = {ref.path: math.prod(ref.variable.shape) for ref in refs}
        products = [
            selection.Product(
                {path: sizes[path] for path in paths},
                scale * sum(each.dense for each in found),
                _SPARSITIES,
                (scale * np.sum([each.sparse for each in found], axis=0)).tolist(),
                gain=torchscript.GAIN,
            )
            for paths, found in _together(costs.products, sizes).items()
        ]
        known = {path for each in products for path in each.sizes}
        if others := [path for path in sizes if path not in known]:
            _logger.warning(
                "No time is saved by pruning these weights, which have no sparse kernel, so the "
                "budget of latency keeps them: %s",
                ", ".join(others),
            )
        rest = max(0.0, costs.seconds / budget - sum(each.dense for each in products))
        return selection.Loads(products, rest)

    def __call__(self, masks: Mapping[str, np.ndarray], *, predicted: float | None) -> float:
        """Returns the latency of the program with these masks, divided by the budget.

        Args:
            masks: Bool masks by path.
            predicted: The expected result, or None if the products were not measured.

        Raises:
            ImportError: If PyTorch is missing.
            NotImplementedError: If the model cannot be written as TorchScript.
        """
        with bystanders_kept(), masks_replaced(self._model, masks):
            pruned = ml.strip_masks(self._model)
        latency = self._latency
        report = torchscript.program_report(pruned, batch_size=latency.batch_size)
        if report.programs:
            dense, seconds = report.programs["dense"], report.programs[report.program]
        else:
            costs = torchscript.program_costs(pruned, (), batch_size=latency.batch_size)
            dense = seconds = costs.seconds
        measured = 1e3 * seconds if latency.share is None else seconds / dense
        found = ServedLatency(
            budget=latency,
            predicted=None if predicted is None else predicted * latency.limit,
            measured=measured,
            dense_milliseconds=1e3 * dense,
            milliseconds=1e3 * seconds,
            trials=len(self._tried) + 1,
            report=report,
        )
        self._tried.append((dict(masks), found))
        _logger.info("Tried sparse kernels: %s.", found)
        return measured / latency.limit

    def measured(self, masks: Mapping[str, np.ndarray]) -> ServedLatency:
        """Returns what was measured with these masks."""
        found = next(
            latency
            for tried, latency in reversed(self._tried)
            if all(np.array_equal(mask, masks[path]) for path, mask in tried.items())
        )
        return dataclasses.replace(found, trials=len(self._tried))


def _together(
    products: tuple[torchscript.ProductCosts, ...], masked: Mapping[str, int]
) -> dict[tuple[str, ...], list[torchscript.ProductCosts]]:
    """Returns the products by their masked weights; those that share a weight are in one entry."""
    found: dict[tuple[str, ...], list[torchscript.ProductCosts]] = {}
    for product in products:
        paths = [path for path in product.paths if path in masked]
        joined, members = dict.fromkeys(paths), [product]
        for others in [others for others in found if joined.keys() & set(others)]:
            joined |= dict.fromkeys(others)
            members += found.pop(others)
        if joined:
            found[tuple(joined)] = members
    return found
