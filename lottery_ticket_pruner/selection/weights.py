"""The mask and records of a kernel, and the checks for the criterion that reads them."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from lottery_ticket_pruner import criteria, structures

HOW_TO_RECORD = {
    "initial": "Record them with `pruner.set_initial_weights(model)`.",
    "final": "Record them with `pruner.set_pretrained_weights(model)` after training.",
    "current": "Pass the raw weights as `current`.",
}

_ARRAYS = (*criteria.RECORDS, *criteria.EVIDENCE)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Weights:
    """The mask and records of a kernel, all of the same shape.

    Args:
        mask: Bool array, True where a weight is kept.
        output_axes: Axes that index outputs, for `scope="output"`. By default the last axis.
        input_axes: Axes that index inputs, for structures. By default the second-last axis.
        initial: Array of the recorded initial weights (any real dtype), or None.
        final: Array of the recorded final weights, or None.
        current: Array of the current raw weights, or None.
        gradient: Evidence `gradient` of `criteria.Group`, or None.
        hessian_gradient: Evidence `hessian_gradient`, or None.
        flow: Evidence `flow`, or None.
        input_norm: Evidence `input_norm`, or None.
    """

    mask: np.ndarray
    output_axes: tuple[int, ...] = (-1,)
    input_axes: tuple[int, ...] = (-2,)
    initial: np.ndarray | None = None
    final: np.ndarray | None = None
    current: np.ndarray | None = None
    gradient: np.ndarray | None = None
    hessian_gradient: np.ndarray | None = None
    flow: np.ndarray | None = None
    input_norm: np.ndarray | None = None

    @property
    def layout(self) -> structures.Layout:
        """Meaning of the axes."""
        return structures.Layout(self.mask.shape, self.input_axes, self.output_axes)

    def with_records(self, records: Mapping[str, np.ndarray]) -> "Weights":
        """Returns the kernel with its records and evidence replaced by these, by name."""
        kept = {name: records.get(name, getattr(self, name)) for name in _ARRAYS}
        return Weights(
            mask=self.mask, output_axes=self.output_axes, input_axes=self.input_axes, **kept
        )


def joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Returns all elements as a read-only 1-D array. A single array is not copied."""
    flat = [array.reshape(-1) for array in arrays]
    whole = flat[0].view() if len(flat) == 1 else np.concatenate(flat)
    whole.flags.writeable = False
    return whole


def records_of(kernel: Weights) -> dict[str, np.ndarray]:
    """Returns the existing records and evidence of a kernel, by name."""
    arrays = {name: getattr(kernel, name) for name in _ARRAYS}
    return {name: array for name, array in arrays.items() if array is not None}


def prepared(criterion: criteria.Criterion, path: str, kernel: Weights) -> Weights:
    """Returns a kernel with the records that a criterion reads, checked and at least float32.

    Args:
        criterion: Criterion that scores the weights.
        path: Path of the kernel, for messages.
        kernel: Kernel with any records.

    Raises:
        ValueError: If a record is missing, does not have the shape of the mask, or contains NaN or
            infinity.
    """
    mask = np.asarray(kernel.mask, dtype=bool)
    records = {}
    for name in criterion.needs | criterion.optional:
        array = getattr(kernel, name)
        if array is None:
            if name in criterion.evidence:
                raise ValueError(
                    f"Criterion {criterion.name!r} needs the {name} of {path!r}, which is only "
                    "computed by `LotteryTicketPruner.update_masks` of a masked model."
                )
            if name in criterion.needs:
                raise ValueError(
                    f"Criterion {criterion.name!r} needs the {name} weights of {path!r}, which "
                    f"have not been recorded. {HOW_TO_RECORD[name]}"
                )
            continue
        array = np.asarray(array)
        if array.shape != mask.shape:
            raise ValueError(
                f"The {_called(name)} of {path!r} have shape {array.shape}, its mask {mask.shape}. "
                "Both must be recorded from the same model."
            )
        # Differences of half-precision weights would round or overflow.
        array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
        if not _all_finite(array):
            raise ValueError(
                f"The {_called(name)} of {path!r} contain NaN or infinity, which cannot be "
                "ranked. Did the training diverge?"
            )
        records[name] = array
    bare = Weights(mask=mask, output_axes=kernel.output_axes, input_axes=kernel.input_axes)
    return bare.with_records(records)


def _all_finite(array: np.ndarray) -> bool:
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()  # Faster than to look at each; only an overflow needs that.
    return bool(np.isfinite(total) or np.isfinite(array).all())


def _called(name: str) -> str:
    return f"{name} weights" if name in criteria.RECORDS else f"{name} values"
