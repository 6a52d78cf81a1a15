"""Rows of measurements, and their table for terminals, as Markdown and as JSON."""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
import statistics
import subprocess
from pathlib import Path
from typing import Any

import psutil
from rich import box
from rich.table import Table

DISTRIBUTIONS = (
    "keras",
    "tensorflow",
    "jax",
    "torch",
    "numpy",
    "tf_keras",
    "tensorflow-model-optimization",
)
HEADS = ("measured", "ours", "peer or limit", "theirs", "ratio", "goal", "repeats")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison of our measurements with those of a peer or with a limit.

    Attributes:
        benchmark: Name of the benchmark.
        what: Description of the measured quantity.
        ours: Our measurements, one per round.
        peer: Name of the peer or limit.
        theirs: The peer's measurements in the same rounds, or a single number, the limit.
        unit: Unit of all measurements.
        goal: Goal of the ratio; None if the row has no goal.
        faster: Whether the ratio is theirs / ours and must be at least the goal. Otherwise it is
            ours / theirs and must be at most the goal.
        missing: Reason why there are no measurements, or "".
    """

    benchmark: str
    what: str
    ours: list[float]
    peer: str
    theirs: list[float]
    unit: str
    goal: float | None = None
    faster: bool = False
    missing: str = ""

    @property
    def ratios(self) -> list[float]:
        """Ratio in each round."""
        theirs = self.theirs * len(self.ours) if len(self.theirs) == 1 else self.theirs
        pairs = zip(self.ours, theirs, strict=True)
        return [b / a if self.faster else a / b for a, b in pairs]

    @property
    def met(self) -> bool | None:
        """True if the median of the ratios reaches the goal; None without goal or figures."""
        if self.goal is None or self.missing:
            return None
        ratio = statistics.median(self.ratios)
        return ratio >= self.goal if self.faster else ratio <= self.goal

    def cells(self) -> tuple[str, ...]:
        """Returns the cells under `HEADS`: medians, with the extremes in parentheses."""
        goal = "" if self.goal is None else f"{'≥' if self.faster else '≤'} {self.goal:g}"
        if self.missing:
            return self.what, "", self.peer, self.missing, "", goal, ""
        if self.met is not None:
            goal += ", met" if self.met else ", MISSED"
        ratio = _spread(self.ratios) + (" times faster" if self.faster else "")
        return (
            self.what,
            f"{_spread(self.ours)} {self.unit}",
            self.peer,
            f"{_spread(self.theirs)} {self.unit}",
            ratio,
            goal,
            str(len(self.ours)),
        )


def _spread(values: list[float]) -> str:
    median = _short(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({_short(min(values))} to {_short(max(values))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1_000 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """Returns the properties of the machine that affect results, without identifying it."""
    return {
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "system": platform.system(),
        "gpu": _gpu(),
    }


def _gpu() -> str:
    command = shutil.which("nvidia-smi")
    if command is None:
        return "no GPU"
    query = [command, "--query-gpu=name", "--format=csv,noheader"]
    result = subprocess.run(query, capture_output=True, text=True, check=False)
    return ", ".join(result.stdout.split("\n")[:-1]) or "no GPU"


def _processor() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Returns the versions of Keras, the backends and the peers, None if not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def table(rows: list[Row]) -> Table:
    """Returns the table for a terminal."""
    shown = Table(box=box.SIMPLE_HEAD)
    for head in HEADS:
        shown.add_column(head, overflow="fold")
    for row in rows:
        style = {True: "green", False: "red", None: ""}[row.met]
        shown.add_row(*row.cells(), style=style)
    return shown


def markdown(rows: list[Row], about: dict[str, Any]) -> str:
    """Returns the table in Markdown, below a line about the machine."""
    lines = [" | ".join(("", *cells, "")).strip() for cells in (HEADS, *(r.cells() for r in rows))]
    lines.insert(1, "|" + "---|" * len(HEADS))
    return "\n".join([sentence(about), "", *lines]) + "\n"


def sentence(about: dict[str, Any]) -> str:
    machine = about["machine"]
    installed = [f"{name} {number}" for name, number in about["versions"].items() if number]
    return (
        f"Measured on {about['date']}: {machine['processor']}, {machine['cores']} cores, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB, {machine['gpu']}, "
        f"{machine['system']}; load average "
        f"{about['load'][0]:.1f} at the start, {about['load'][1]:.1f} at the end (of the "
        f"benchmarks themselves, too). {', '.join(installed)}."
    )


def as_json(rows: list[Row], about: dict[str, Any]) -> str:
    """Returns all measurements as JSON, with the median ratios and whether they meet the goals."""
    body = [
        {
            **dataclasses.asdict(row),
            "ratio": None if row.missing else statistics.median(row.ratios),
            "met": row.met,
        }
        for row in rows
    ]
    return json.dumps({**about, "rows": body}, indent=1) + "\n"


def between(text: str, name: str, body: str) -> str:
    """Returns a document with `body` as the text between the two markers of this name.

    Raises:
        ValueError: If the document does not have each marker exactly once, in order.
    """
    begin, end = f"<!-- benchmarks {name} -->\n", f"<!-- end of benchmarks {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"Expected one line {begin.strip()!r} and, after it, one line {end!r}.")
    return text[: text.index(begin) + len(begin)] + body + text[text.index(end) :]
