"""Budgets of latency, as users give them."""

from __future__ import annotations

import dataclasses
from typing import Any

from lottery_ticket_pruner.checks import is_integer, is_number


class UnreachableBudgetError(ValueError):
    """An error for a budget that no pruning meets.

    Args:
        found: What cannot be met, and what was reached.
        remedy: What to do, in words of `update_masks`.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found} {remedy}")
        self.found = found


@dataclasses.dataclass(frozen=True)
class Latency:
    """A budget of latency on this machine, for `update_masks(budget={"latency": ...})`.

    With `structure="channels"`, the budget is met by the model that `masked_layers.shrink` returns.
    It is called in turns with the model without pruned weights, both compiled as for `predict`, and
    the median over all turns counts. Where other load on the machine makes elapsed times vary, the
    share is that of processor time (see `masked_layers.Timing`); milliseconds are always those of
    elapsed time.

    For single weights, it is met by the TorchScript program that
    `masked_layers.export_sparse_torch` writes, compared with the program with dense kernels, on
    PyTorch's default number of threads. On one thread, times are those of the thread.

    Args:
        share: Largest share of the latency of the model without pruned weights, in (0, 1].
        milliseconds: Largest latency in milliseconds, in place of a share.
        batch_size: Number of examples in a batch.

    Raises:
        ValueError: If not exactly one of `share` and `milliseconds` is given, or a number is out of
            range.

    Example:
    ```python
    pruner.update_masks(
        "smallest_weights",
        budget={"latency": Latency(0.5, batch_size=8)},
        structure="channels",
    )
    print(pruner.measured_latency)
    ```
    """

    share: float | None = None
    milliseconds: float | None = dataclasses.field(default=None, kw_only=True)
    batch_size: int = dataclasses.field(default=1, kw_only=True)

    def __post_init__(self) -> None:
        if (self.share is None) == (self.milliseconds is None):
            raise ValueError(
                "A latency budget is either a share of the latency of the model without pruned "
                f"weights, or `milliseconds`. Received: {self}"
            )
        if self.share is not None and not (is_number(self.share) and 0 < self.share <= 1):
            meant = ""
            if is_number(self.share) and 1 < self.share < float("inf"):
                meant = f". For a time, pass Latency(milliseconds={self.share:g})"
            raise ValueError(
                "The share of the latency must be a number in (0, 1]. "
                f"Received: {self.share!r}{meant}"
            )
        limit = self.milliseconds
        if limit is not None and not (is_number(limit) and 0 < limit < float("inf")):
            raise ValueError(f"`milliseconds` must be a positive number. Received: {limit!r}")
        if not is_integer(self.batch_size) or self.batch_size < 1:
            raise ValueError(
                f"`batch_size` must be a positive integer. Received: {self.batch_size!r}"
            )

    @classmethod
    def of(cls, value: Any) -> Latency:
        """Returns a budget for itself or for a share with the default batch size.

        Raises:
            ValueError: If the value is neither.
        """
        return value if isinstance(value, cls) else cls(value)

    @property
    def limit(self) -> float:
        """The share or the milliseconds."""
        limit = self.milliseconds if self.share is None else self.share
        assert limit is not None
        return limit

    def text(self, load: float) -> str:
        """Returns a latency as text. A load of 1 is the whole budget."""
        unit = "ms" if self.share is None else "of the latency without pruning"
        return f"{load * self.limit:.3g} {unit}"
