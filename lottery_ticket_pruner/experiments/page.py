"""The command `lottery-ticket report`: tables, pictures and a web page that compares runs."""

import base64
import dataclasses
import importlib.resources
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import keras
import matplotlib as mpl
import rich.progress
import tyro
from matplotlib.figure import Figure
from rich.console import Console

import lottery_ticket_pruner
import masked_layers as ml
from lottery_ticket_pruner.experiments import report, results
from lottery_ticket_pruner.experiments.results import Group
from masked_layers.files import replacing

_Path = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
_Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Compare runs: tables here, and pictures, a table of all rows and a web page in a folder."""

    folders: _Folders
    """Run folders, and folders that hold some, such as a sweep's or ./runs."""
    out: _Path = None
    """Folder to write report.html, results.csv and *.png to; by default `report` inside of FOLDER,
    if that is one, else ./report."""
    quiet: bool = False
    """Print nothing but errors."""


def write_report(config: ReportConfig, console: Console | None = None) -> Path:
    """Print the tables, write the pictures and the page, and return the page's path.

    Runs that differ in nothing but their seeds are replicates of each other.

    Raises:
        ValueError: no folders, or one that holds no readable results.
        OSError: a folder that is not there, or the report's that cannot be written.
    """
    console = console or Console(quiet=config.quiet)
    if not config.folders:
        raise ValueError("Name at least one run folder, or a folder of run folders.")
    groups = results.groups_of(results.find_runs(config.folders))
    for sheet in report.overviews(groups):
        console.print(sheet.table())
    for group in groups:
        console.print(f"\n{group.label or group.title}", markup=False, style="bold")
        for sheet in _sheets(group):
            console.print(sheet.table())
    out = config.out or (config.folders[0] if len(config.folders) == 1 else Path()) / "report"
    out.mkdir(parents=True, exist_ok=True)
    charts = [chart for group in groups for chart in _charts(group)]
    charts = [*_comparisons(groups), *charts]
    for number, chart in enumerate(charts, 1):
        _titled(chart).savefig(out / f"picture-{number}.png", dpi=150)
    runs = [run for group in groups for run in group.runs]
    with replacing(out / "results.csv") as file:
        results.tidy(runs).to_csv(file, index=False)
    with replacing(out / "report.html") as file:
        file.write(render(groups, console).encode())
    console.print(
        f"{out / 'report.html'}; results.csv and {len(charts)} *.png next to it", highlight=False
    )
    return out / "report.html"


# --- What is shown --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture, and what stands above and below it."""

    title: str
    caption: str
    lines: Sequence[report.Line]
    x_label: str = "weights left"
    dense: Sequence[float] = ()

    def figure(self, figsize: tuple[float, float] = (4.8, 3.4)) -> Figure:
        """The picture without its title and caption."""
        return report.picture(self.lines, dense=self.dense, x_label=self.x_label, figsize=figsize)


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """What the tickets of a group keep of one weight.

    Attributes:
        path: The weight.
        shape: Its shape.
        size: Number of its entries.
        kept: How many the masks keep, in each ticket.
    """

    path: str
    shape: tuple[int, ...]
    size: int
    kept: tuple[int, ...]

    @property
    def share(self) -> float:
        """Share of weights left, over all tickets."""
        return sum(self.kept) / (len(self.kept) * self.size)

    @property
    def kept_text(self) -> str:
        """How many are kept, from the least to the most."""
        least, most = min(self.kept), max(self.kept)
        return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def layers_of(group: Group) -> tuple[list[LayerRow], int, list[str]]:
    """What is left of every masked weight: rows, number of tickets, files that did not load."""
    kept: dict[str, tuple[tuple[int, ...], int, list[int]]] = {}
    unreadable, tickets = [], 0
    for path in _tickets(group):
        try:
            found = ml.sparsity_report(keras.models.load_model(path, compile=False))
        # Whatever Keras and its file formats raise about a file, or a layer not imported.
        except Exception as error:
            unreadable.append(f"{path}: {str(error).splitlines()[0]}")
            continue
        tickets += 1
        for row in found:
            kept.setdefault(row.path, (row.shape, row.size, []))[2].append(row.alive)
    rows = [LayerRow(path, *columns[:2], tuple(columns[2])) for path, columns in kept.items()]
    if rows:
        totals = tuple(map(sum, zip(*(row.kept for row in rows), strict=True)))
        rows.append(LayerRow("total", (), sum(row.size for row in rows), totals))
    return rows, tickets, unreadable


def _tickets(group: Group) -> list[Path]:
    return [path for run in group.runs for path in sorted(run.folder.glob("ticket*.keras"))]


def _sheets(group: Group) -> list[report.Sheet]:
    if group.is_instability:
        return [report.instability_sheet(group.rows)]
    if not group.has_rounds:
        return [report.best_sheet(group.rows)]
    sheets = [report.accuracy_sheet(group.rows)]
    if (group.rows["arm"] == "ticket").any():
        sheets.append(report.difference_sheet(group.rows))
    return sheets


def _charts(group: Group) -> list[Chart]:
    title = group.label or group.title
    if group.is_instability:
        return []  # The run's own picture shows it.
    if not group.has_rounds:
        return [
            Chart(", ".join(filter(None, (title, name))), _bands(lines), lines, x_label)
            for name, lines, x_label in report.charts(group.rows)
        ]
    lines = report.arm_lines(group.rows)
    dense = report.dense_accuracies(group.rows)
    return [Chart(title, _bands(lines), lines, dense=dense)] if lines else []


def _comparisons(groups: Sequence[Group]) -> list[Chart]:
    """The tickets of all groups, in a picture for each data set and network."""
    together: dict[str, list[report.Line]] = {}
    for group in groups:
        if group.has_rounds and (group.rows["arm"] == "ticket").any():
            names = (group.config.get("data"), group.config.get("network"))
            line = dataclasses.replace(report.line_of_arm(group.rows, "ticket"), label=group.label)
            together.setdefault(", ".join(map(str, names)), []).append(line)
    return [
        Chart(f"Tickets compared: {names}", _bands(lines), report.with_looks(lines))
        for names, lines in together.items()
        if len(lines) > 1
    ]


def _bands(lines: Sequence[report.Line]) -> str:
    return report.describe_bands(len(sample) for line in lines for sample in line.samples)


def _titled(chart: Chart) -> Figure:
    figure = chart.figure((8, 4.6))
    title = "\n".join(filter(None, (chart.title, chart.caption)))
    figure.axes[0].set_title(title, fontsize=10)
    return figure


# --- The page -------------------------------------------------------------------------------------


def render(groups: Sequence[Group], console: Console | None = None) -> str:
    """The page as HTML that needs no other file: styles and pictures are inside."""
    numbers = iter(range(1, 10**6))

    def drawn(chart: Chart) -> dict[str, Any]:
        image = svg(chart.figure(), f"p{next(numbers)}", f"{chart.title}. {chart.caption}")
        return {"title": chart.title, "caption": chart.caption, "svg": image}

    comparisons = [drawn(chart) for chart in _comparisons(groups)]
    sections = []
    for group in _tracked(groups, console):
        layers, tickets, unreadable = layers_of(group)
        sections.append(
            {
                "title": group.label or group.title,
                "runs": [run.folder for run in group.runs],
                "seeds": sorted({int(seed) for seed in group.rows["seed"]}),
                "charts": [drawn(chart) for chart in _charts(group)],
                "sheets": _sheets(group),
                "layers": layers,
                "tickets": tickets,
                "unreadable": unreadable,
                "images": _images(group),
            }
        )
    options = list(dict.fromkeys(option for group in groups for option in group.config))
    varied = results.varied_options([group.config for group in groups])
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["value"] = results.as_text
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    template = importlib.resources.files(__package__).joinpath("page.html")
    page = environment.from_string(template.read_text(encoding="utf-8"))
    return page.render(
        title=_title(groups),
        groups=groups,
        overviews=report.overviews(groups),
        comparisons=comparisons,
        sections=sections,
        varied=varied,
        common=[option for option in options if option not in varied],
        palette=list(zip(report.PALETTE, _DARK_PALETTE, strict=True)),
        version=lottery_ticket_pruner.__version__,
    )


# The same colours on a dark page.
_DARK_PALETTE = (
    "#56A8E8",
    "#F28A4B",
    "#35C79A",
    "#E3A3CB",
    "#F2B84B",
    "#8FD0F5",
    "#C2A27A",
    "#A8A8A8",
)
_INK, _GRID, _MUTED = "#000000", "#b0b0b0", "#737373"


def svg(figure: Figure, prefix: str, label: str) -> str:
    """A figure as an SVG element to put into a page: it takes the page's colours and font.

    Args:
        figure: The figure.
        prefix: Comes before its identifiers, to tell them from those of other figures.
        label: What it shows, for those who do not see it.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    colours = {_INK: "ink", _GRID: "grid", _MUTED: "muted"}
    colours |= {colour.lower(): f"c{number}" for number, colour in enumerate(report.PALETTE)}
    for colour, name in colours.items():
        text = text.replace(colour, f"var(--{name})")
    escaped = str(jinja2.filters.escape(label))
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _images(group: Group) -> list[tuple[str, str]]:
    """Pictures that a run other than of rounds left, as name and data URL."""
    if group.has_rounds:  # drawn anew, over all replicates
        return []
    return [
        (
            f"{run.folder.name}/{path.name}",
            f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        )
        for run in group.runs
        for path in sorted(run.folder.glob("*.png"))
    ]


def _title(groups: Sequence[Group]) -> str:
    names = dict.fromkeys(
        ", ".join(str(group.config[key]) for key in ("data", "network") if group.config.get(key))
        for group in groups
    )
    return " and ".join(filter(None, names)) if len(names) <= 2 else f"{len(groups)} configurations"


def _tracked(groups: Sequence[Group], console: Console | None) -> Iterator[Group]:
    console = console or Console(quiet=True)
    yield from rich.progress.track(groups, "reading tickets", console=console, transient=True)
