"""The result of a search: the model that is good and small enough, and how it was found."""

import dataclasses
import functools
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras

import masked_layers as ml
from lottery_ticket_pruner.compression.metrics import Comparison
from lottery_ticket_pruner.compression.steps import served_size
from lottery_ticket_pruner.wording import DropText
from masked_layers.files import replacing, temporary_folder
from masked_layers.serving import StorageReport
from masked_layers.text_tables import aligned

_HEADINGS = (
    *("step", "method", "sparsity", "macs", "latency", "bytes"),
    *("validation", "drop", "trained", "seconds", ""),
)
# What a model is that misses a goal.
_MISSES = {
    "sparsity": "too dense",
    "size": "too large",
    "macs": "too many macs",
    "latency": "too slow",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Findings:
    """Results of a search, without the model.

    Attributes:
        rows: One dict per model that was tried: `step`, `method` (`"dense"` for the first),
            `sparsity`, `macs` (of pruned channels, the share of the multiply-adds that is left, or
            None if it is not known), `latency` (in milliseconds, if there is a goal of latency),
            `size` (bytes as served, of models that should meet a goal of size), `validation` (the
            metric), `drop` (from the dense model), `accepted` (whether the drop is within the
            tolerance), `misses` (names of the other goals that are not met, separated by commas),
            `steps` (of training, without those of earlier rows), `seconds` and `note`. Ready for
            `pandas.DataFrame(rows)`.
        scan: One dict per weight and share of it that was pruned alone, without training: `path`,
            `density`, `kept` (entries), `value` (the metric on at most 512 validation examples),
            `drop` and `loss` (its rise). Empty if `method` was not `"auto"` or there was no
            tolerance.
        test: The metric of the dense model and of `model` on the test data, which nothing else has
            used.
        sparsity: Share of the weights of all masked kernels that were pruned or removed.
        higher_is_better: Direction of the metric.
        tolerance: The drop that was acceptable, or None.
        meets_goals: Whether every goal is met. `max_drop` is judged on the validation data.
        conclusion: Sentences that say what was found, and if the goals are not met, what came
            nearest and why.
        notes: Further sentences about what was decided: parts of the data that were split off,
            whether the model was found to be trained, how long each step trained.
        cautions: Those of the notes that qualify the conclusion: which metric was chosen, examples
            that were split off, too few of them for the tolerance. Reports show them next to it.
    """

    rows: list[dict[str, Any]]
    scan: list[dict[str, Any]]
    test: Comparison
    sparsity: float
    higher_is_better: bool
    tolerance: float | None
    meets_goals: bool
    conclusion: str
    notes: tuple[str, ...]
    cautions: tuple[str, ...] = ()

    @property
    def table(self) -> str:
        """The rows as text."""
        return "\n".join(aligned(self.cells(), left={1}))

    def cells(self) -> list[tuple[str, ...]]:
        """Returns the headings and the rows as texts, without columns that are empty."""
        told = self.test.told
        headings = tuple(told.heading if name == "drop" else name for name in _HEADINGS)
        lines = [headings, *(_cells(row, told) for row in self.rows)]
        columns = [i for i in range(len(_HEADINGS)) if any(line[i] for line in lines[1:])]
        return [tuple(line[i] for i in columns) for line in lines]

    @property
    def remarks(self) -> list[str]:
        """Sentences about steps that failed."""
        said: set[str] = set()
        failed = [row for row in self.rows if row["note"]]
        return [f"Step {row['step']}: {reason_of(row, said)}" for row in failed]

    def __str__(self) -> str:
        texts = [self.table, *self.remarks, f"test: {self.test}", self.conclusion, *self.notes]
        return "\n".join(texts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneResult(Findings):
    """A pruned model, and how it was found. It prints as a table and a conclusion.

    Attributes:
        model: The smallest model that was good enough: masked, or with `method="channels"` a plain
            model without the pruned channels. If none was, the dense model with masks of ones.
    """

    model: keras.Model

    @functools.cached_property
    def size(self) -> int:
        """Bytes of the model as a sparse SavedModel, which is written to find out.

        Raises:
            ImportError: If TensorFlow is missing.
        """
        return served_size(self.model)

    def export(self, path: str | os.PathLike[str], **options: Any) -> StorageReport:
        """Writes the model as a sparse SavedModel folder.

        Args:
            path: The folder, such as `served/1`.
            **options: Further arguments of `masked_layers.export_sparse_saved_model`.
        """
        return ml.export_sparse_saved_model(self.model, path, **options)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `model.keras` and, in `served/1`, a sparse SavedModel into a folder.

        Args:
            folder: The folder. Created if it does not exist; these two are replaced in it.

        Raises:
            ImportError: If TensorFlow is missing. `model.keras` is written in any case.
            OSError: If the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self.model, folder / "model.keras")
        self.export(folder / "served" / "1")


def save_model(model: keras.Model, path: Path) -> None:
    """Writes a model to a `.keras` file that is complete or absent."""
    with temporary_folder() as folder:
        file = folder / path.name  # Keras requires this suffix.
        model.save(file)
        with file.open("rb") as stored, replacing(path) as whole:
            shutil.copyfileobj(stored, whole)


def verdict_of(row: Mapping[str, Any]) -> str:
    """Returns in a few words whether a model is good enough, or what it is not."""
    if row["note"]:
        return "failed"
    if row["method"] == "dense":
        return ""
    if not row["accepted"]:
        return "too much"
    missed = row.get("misses")  # Earlier versions did not store them.
    return ", ".join(_MISSES[goal] for goal in missed.split(", ")) if missed else "accepted"


def reason_of(row: Mapping[str, Any], said: set[str]) -> str:
    """Returns why a step failed, without advice that was given before.

    Args:
        row: A row with a note, whose first sentence is the reason.
        said: The advice so far, to which that of this row is added.
    """
    reason, ends, advice = str(row["note"]).partition(". ")
    if not ends or advice not in said:
        said.add(advice)
        return str(row["note"])
    return f"{reason}."


def _cells(row: dict[str, Any], told: DropText) -> tuple[str, ...]:
    return (
        str(row["step"]),
        row["method"].replace("_", " "),
        f"{row['sparsity']:.2%}",
        "" if row["macs"] is None else f"{row['macs']:.2%}",
        "" if row["latency"] is None else f"{row['latency']:.3g} ms",
        "" if row.get("size") is None else f"{row['size']:,}",
        "" if row["validation"] is None else f"{row['validation']:.4f}",
        "" if row["drop"] is None else told.number(row["drop"]),
        f"{row['steps']} steps" if row.get("steps") else "",  # Earlier versions did not count.
        f"{row['seconds']:.1f}",
        verdict_of(row),
    )
