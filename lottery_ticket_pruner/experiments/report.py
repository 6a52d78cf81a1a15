"""Tables and pictures of a run's rows."""

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import rich.box
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.table import Table

COLUMNS = (
    "round",
    "arm",
    "replicate",
    "sparsity",
    "test_accuracy",
    "test_loss",
    "early_stop_step",
    "seconds",
    "validation_loss",
)
LABELS = {
    "dense": "dense",
    "ticket": "ticket",
    "random_reinit": "random reinit",
    "reinit_same_sign": "reinit same signs",
    "random_mask": "random mask",
    "reshuffled_mask": "reshuffled mask",
}
# Okabe & Ito's palette, which readers with any colour vision tell apart.
_COLOURS = {
    "ticket": "#0072B2",
    "random_reinit": "#D55E00",
    "reinit_same_sign": "#E69F00",
    "random_mask": "#009E73",
    "reshuffled_mask": "#CC79A7",
}
_MARKERS = {
    "ticket": "o",
    "random_reinit": "s",
    "reinit_same_sign": "D",
    "random_mask": "^",
    "reshuffled_mask": "v",
}
_TICKS = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


class CsvWriter:
    """Writes rows to a CSV file one by one, each on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Append one row; numbers are kept to six digits."""
        rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        self._writer.writerow(rounded)
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a `results.csv` back into rows of numbers."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {k: v if k == "arm" else float(v) for k, v in r.items()} for r in csv.DictReader(file)
        ]


@dataclasses.dataclass(frozen=True)
class Cell:
    """The replicates of one arm in one round."""

    round: int
    arm: str
    sparsity: float
    accuracies: tuple[float, ...]
    early_stop_steps: tuple[float, ...]


def cells(rows: Iterable[dict[str, Any]]) -> list[Cell]:
    """Group rows by round and arm, in order of the rounds."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((int(row["round"]), row["arm"]), []).append(row)
    return [
        Cell(
            number,
            arm,
            float(np.mean([row["sparsity"] for row in group])),
            tuple(row["test_accuracy"] for row in group),
            tuple(row["early_stop_step"] for row in group),
        )
        for (number, arm), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def arms_of(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The arms that occur, the ticket first."""
    present = {row["arm"] for row in rows}
    return [arm for arm in LABELS if arm in present and arm != "dense"]


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """Accuracy of every arm per round: the mean over replicates, and their deviation.

    The column of early stops is the ticket's (in the first line the dense run's), in steps.
    """
    found = {(cell.round, cell.arm): cell for cell in cells(rows)}
    arms = arms_of(rows)
    replicates = len({row["replicate"] for row in rows})
    table = Table(
        box=rich.box.SIMPLE,
        title="test accuracy, %"
        + (f": mean ± standard deviation of {replicates} replicates" if replicates > 1 else ""),
    )
    for heading in ("round", "weights", *(LABELS[arm] for arm in arms), "early stop"):
        table.add_column(heading, justify="right", no_wrap=True)
    for number in sorted({number for number, _ in found}):
        main = found.get((number, "ticket")) or found[number, "dense"]
        shown = [found.get((number, arm)) for arm in arms] if number else [main]
        accuracies = [_accuracy(cell) if cell else "" for cell in shown]
        table.add_row(
            str(number) if number else "dense",
            f"{1 - main.sparsity:.2%}",
            *accuracies,
            *[""] * (len(arms) - len(accuracies)),
            f"{np.mean(main.early_stop_steps):.0f}",
        )
    return table


def accuracy_picture(rows: Sequence[dict[str, Any]], title: str) -> Figure:
    """Test accuracy against weights left: lines through the means, bands over the replicates.

    Both axes are logarithmic, the upright one in the error, so that 98 and 99 % stay apart while
    an arm that collapses still shows.
    """
    grouped = cells(rows)
    dense = next(cell for cell in grouped if cell.arm == "dense")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    level = np.mean(dense.accuracies)
    style = {"color": "0.3", "linewidth": 1.2, "linestyle": "--"}
    axes.axhline(_error(level), label=f"dense, {100 * level:.2f} %", **style)
    for arm in arms_of(rows):
        own = [cell for cell in grouped if cell.arm == arm]
        left = [100 * (1 - cell.sparsity) for cell in own]
        means = [_error(np.mean(cell.accuracies)) for cell in own]
        style = {"color": _COLOURS[arm], "marker": _MARKERS[arm], "markersize": 5}
        axes.plot(left, means, label=LABELS[arm], linewidth=1.8, **style)
        lowest = [_error(min(cell.accuracies)) for cell in own]
        highest = [_error(max(cell.accuracies)) for cell in own]
        axes.fill_between(left, lowest, highest, color=_COLOURS[arm], alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.set_yscale("log")
    least = min(100 * (1 - cell.sparsity) for cell in grouped)
    axes.set_xlim(105, 0.9 * least)
    axes.set_xticks([tick for tick in _TICKS if tick > 0.9 * least], minor=False)
    errors = [_error(accuracy) for cell in grouped for accuracy in cell.accuracies]
    bottom, top = 1.15 * max(errors), 0.85 * min(errors)
    axes.set_ylim(bottom, top)
    axes.set_yticks([tick for tick in _TICKS if top <= tick <= bottom], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda left, _: f"{left:g} %"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: f"{100 - error:g} %"))
    axes.minorticks_off()
    axes.set_xlabel("weights left")
    axes.set_ylabel("test accuracy")
    replicates = len(dense.accuracies)
    bands = f"; bands: lowest to highest of {replicates} replicates" if replicates > 1 else ""
    axes.set_title(title + bands, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left", frameon=False)
    return figure


def _error(accuracy: float) -> float:
    """Errors in percent; none at all is drawn where one in ten thousand would be."""
    return max(100 * (1 - accuracy), 0.01)


def _accuracy(cell: Cell) -> str:
    mean = f"{100 * np.mean(cell.accuracies):.2f}"
    if len(cell.accuracies) == 1:
        return mean
    return f"{mean} ± {100 * np.std(cell.accuracies, ddof=1):.2f}"
