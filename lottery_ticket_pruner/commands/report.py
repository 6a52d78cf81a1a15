"""The command `lottery-ticket report`: tables, pictures and a web page that compares runs."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from lottery_ticket_pruner.experiments import results
from lottery_ticket_pruner.experiments.options import OptionalPath
from lottery_ticket_pruner.experiments.reports import (
    contents,
    run_folders,
    tables,
    ticket_masks,
    web_page,
)
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
    groups = run_folders.groups_of(run_folders.find_runs(config.folders))
    kepts = ticket_masks.read_tickets(groups, console)
    overviews = [*tables.overviews(groups), *ticket_masks.comparisons(kepts)]
    sections = [
        (kept.label, [*contents.sheets_of(kept.group), *ticket_masks.sheets_of(kept)])
        for kept in kepts
    ]
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
        file.write(web_page.render(kepts).encode())
    charts = [chart for group in groups for chart in contents.charts_of(group)]
    charts = [*contents.comparisons(groups), *contents.mask_charts(kepts), *charts]
    for number, chart in enumerate(charts, 1):
        contents.titled(chart).savefig(out / f"picture-{number}.png", dpi=150)
    runs = [run for group in groups for run in group.runs]
    with replacing(out / "results.csv") as file:
        run_folders.tidy(runs).to_csv(file, index=False)
    with replacing(out / "tables.md") as file:
        texts = [
            f"# Lottery tickets: {contents.title_of(groups)}",
            *(sheet.markdown() for sheet in overviews),
        ]
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
