"""The command `lottery-ticket report`: tables, pictures and a web page that compares runs."""

import base64
import dataclasses
import functools
import importlib.resources
import io
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jinja2
import matplotlib as mpl
import rich.progress
import tyro
from matplotlib.figure import Figure
from rich.console import Console

import lottery_ticket_pruner
from lottery_ticket_pruner import analyses
from lottery_ticket_pruner.experiments import figures, masks, report, results
from lottery_ticket_pruner.experiments.masks import Kept
from lottery_ticket_pruner.experiments.options import OptionalPath
from lottery_ticket_pruner.experiments.results import Group
from lottery_ticket_pruner.folders import make_folder
from masked_layers.files import replacing

_Folders = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER...")]


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """Compare runs: tables here, and pictures, a table of all rows and a web page in a folder.

    Where runs left their tickets, they are compared, too: what they keep of each layer, what the
    masks of several seeds and configurations have in common next to what chance gives, and how many
    of the kept weights ended with the sign they started with.
    """

    folders: _Folders
    """Run folders, and folders that hold some, such as a sweep's or ./runs."""
    out: OptionalPath = None
    """Folder to write report.html, tables.md, results.csv and *.png to; by default `report` inside
    of FOLDER, if that is one, else ./report."""
    quiet: bool = False
    """Print nothing but errors."""


def write_report(config: ReportConfig, console: Console | None = None) -> Path:
    """Print the tables, write them, the pictures and the page, and return the page's path.

    Runs that differ in nothing but their seeds are replicates of each other.

    Raises:
        ValueError: no folders, or one that holds no readable results.
        OSError: a folder that is not there, or the report's that cannot be written.
    """
    console = console or Console(quiet=config.quiet)
    if not config.folders:
        raise ValueError("Name at least one run folder, or a folder of run folders.")
    groups = results.groups_of(results.find_runs(config.folders))
    kepts = read_tickets(groups, console)
    overviews = [*report.overviews(groups), *masks.comparisons(kepts)]
    sections = [(kept.label, [*_sheets(kept.group), *masks.sheets_of(kept)]) for kept in kepts]
    for sheet in overviews:
        console.print(sheet.table())
    for title, sheets in sections:
        console.print(f"\n{title}", markup=False, style="bold")
        for sheet in sheets:
            console.print(sheet.table())
    out = config.out or (config.folders[0] if len(config.folders) == 1 else Path()) / "report"
    _check_replaceable(out)
    make_folder(out)
    # First: it says that the other files are of a report, also after an interruption.
    with replacing(out / "report.html") as file:
        file.write(render(kepts).encode())
    charts = [chart for group in groups for chart in _charts(group)]
    charts = [*_comparisons(groups), *_mask_charts(kepts), *charts]
    for number, chart in enumerate(charts, 1):
        _titled(chart).savefig(out / f"picture-{number}.png", dpi=150)
    runs = [run for group in groups for run in group.runs]
    with replacing(out / "results.csv") as file:
        results.tidy(runs).to_csv(file, index=False)
    with replacing(out / "tables.md") as file:
        texts = [f"# Lottery tickets: {_title(groups)}", *(sheet.markdown() for sheet in overviews)]
        for (title, sheets), kept in zip(sections, kepts, strict=True):
            texts += [f"## {title}", *(sheet.markdown() for sheet in sheets)]
            texts += [f"Not loaded: {text}" for text in kept.unreadable]
        file.write("\n\n".join([*texts, ""]).encode())
    console.print(
        f"{out / 'report.html'}; tables.md, results.csv and {len(charts)} *.png next to it",
        highlight=False,
    )
    return out / "report.html"


def _check_replaceable(out: Path) -> None:
    """Raises ValueError where a report would replace files that are none of an earlier one."""
    if any((out / name).exists() for name in (results.CONFIG_FILE, results.SWEEP_FILE)):
        raise ValueError(
            f"'{out}' is itself the folder of a run or a sweep, whose {results.RESULTS_FILE} a "
            "report would replace. Give --out another folder."
        )
    names = (results.RESULTS_FILE, "tables.md", "picture-1.png")
    there = [name for name in names if (out / name).exists()]
    if there and not (out / "report.html").exists():
        raise ValueError(
            f"'{out}' holds no report, but {', '.join(there)}, which a report would replace. Give "
            "--out another folder, or move what is there."
        )


def read_tickets(groups: Sequence[Group], console: Console | None = None) -> list[Kept]:
    """Reads the masks of the tickets of each group, and shows a bar meanwhile."""
    console = console or Console(quiet=True)
    tracked: Iterable[Group] = rich.progress.track(
        groups, "reading tickets", console=console, transient=True
    )
    return [masks.read_tickets(group) for group in tracked]


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
        return figures.picture(self.lines, dense=self.dense, x_label=self.x_label, figsize=figsize)


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A picture of another kind: what draws it, and what stands above and below it."""

    title: str
    caption: str
    draw: Callable[[], Figure]

    def figure(self, figsize: tuple[float, float] | None = None) -> Figure:
        """The picture without its title and caption, in the size that suits it."""
        return self.draw()


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


def _mask_charts(kepts: Sequence[Kept]) -> list[Drawing]:
    """Draws what tickets keep of each layer, with which signs, and what they have in common."""
    charts = []
    sparsities, signs = masks.layer_sparsities(kepts), masks.same_signs(kepts)
    if sparsities:
        draw = functools.partial(analyses.plot_layer_sparsity, sparsities)
        charts.append(Drawing("Pruned weights of each layer", "Of the last tickets", draw))
    if signs:
        label = "share with the sign they started with"
        draw = functools.partial(analyses.plot_by_layer, signs, label)
        charts.append(Drawing("Signs of the kept weights", "Of the last tickets", draw))
    for overlap, seeds in masks.between(kepts):
        caption = f"Of the last tickets at the same seed, {seeds} seed{'s' if seeds > 1 else ''}"
        draw = functools.partial(analyses.plot_overlap, overlap)
        charts.append(Drawing("Kept by both masks over kept by either", caption, draw))
    return charts


def _bands(lines: Sequence[report.Line]) -> str:
    return report.describe_bands(len(sample) for line in lines for sample in line.samples)


def _titled(chart: Chart | Drawing) -> Figure:
    figure = chart.figure((8, 4.6))
    figure.suptitle("\n".join(filter(None, (chart.title, chart.caption))), fontsize=10)
    return figure


# --- The page -------------------------------------------------------------------------------------


def render(kepts: Sequence[Kept]) -> str:
    """The page as HTML that needs no other file: styles and pictures are inside.

    Args:
        kepts: The groups with their tickets, see `read_tickets`.
    """
    numbers = iter(range(1, 10**6))

    def drawn(chart: Chart | Drawing) -> dict[str, Any]:
        image = svg(chart.figure(), f"p{next(numbers)}", f"{chart.title}. {chart.caption}")
        return {"title": chart.title, "caption": chart.caption, "svg": image}

    groups = [kept.group for kept in kepts]
    comparisons = [drawn(chart) for chart in _comparisons(groups)]
    mask_charts = [drawn(chart) for chart in _mask_charts(kepts)]
    sections = []
    for kept in kepts:
        group = kept.group
        sections.append(
            {
                "title": kept.label,
                "runs": [run.folder for run in group.runs],
                "seeds": sorted({int(seed) for seed in group.rows["seed"]}),
                "charts": [drawn(chart) for chart in _charts(group)],
                "sheets": _sheets(group),
                "layers": kept.layers,
                "tickets": len(kept.tickets),
                "unreadable": kept.unreadable,
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
        mask_sheets=masks.comparisons(kepts),
        mask_charts=mask_charts,
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
    if group.has_rounds:  # drawn again, over all replicates
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
