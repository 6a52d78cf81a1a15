"""The command `lottery-ticket report`: tables, figures and a web page that compare runs."""

import re
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from _lottery_ticket.commands import ReportConfig
from lottery_ticket_pruner.commands import prune_again
from lottery_ticket_pruner.experiments import progress, results
from lottery_ticket_pruner.experiments.reports import (
    contents,
    run_folders,
    ticket_masks,
    web_page,
)
from lottery_ticket_pruner.experiments.reports.ticket_masks import GroupTickets
from lottery_ticket_pruner.experiments.written import PICTURE, refuse_to_replace
from lottery_ticket_pruner.folders import make_folder
from masked_layers.files import replacing


def write_report(config: ReportConfig, console: Console | None = None) -> Path:
    """Prints the tables, writes all files of the report, and returns the path of the web page.

    Runs that differ only in their seeds are replicates of each other.

    Raises:
        ValueError: If there are no folders, or one of them has no readable results.
        OSError: If a folder does not exist, or that of the report cannot be written.
    """
    console = console or progress.console(quiet=config.quiet)
    if not config.folders:
        raise ValueError("Name at least one run folder, or a folder of run folders.")
    pruned = prune_again.pruned_in(config.folders)
    others = [folder for folder in config.folders if not _holds_only(folder, pruned)]
    if pruned:
        pages = prune_again.report(pruned, None if others else config.out, console)
        if not others:
            return pages[-1]
    groups = run_folders.groups_of(run_folders.find_runs(others))
    all_tickets = ticket_masks.read_tickets(groups, console)
    overviews = [*contents.overviews(groups), *ticket_masks.comparisons(all_tickets)]
    sections = [
        (
            of_group.label,
            contents.conclusion_of(of_group.group),
            [
                *contents.view_of(of_group.group).sheets(of_group.group),
                *ticket_masks.sheets_of(of_group),
            ],
        )
        for of_group in all_tickets
    ]
    comparison = contents.comparison_of(groups)
    for sheet in overviews:
        console.print(sheet.table())
    _say(console, comparison)
    for title, conclusion, sheets in sections:
        console.print(f"\n{title}", markup=False, style="bold")
        _say(console, conclusion)
        for sheet in sheets:
            console.print(sheet.table())
    out = config.out or (config.folders[0] if len(config.folders) == 1 else Path()) / "report"
    _check_replaceable(out)
    make_folder(out)
    # Written first, because it marks the other files as a report, even after an interruption.
    with replacing(out / "report.html") as file:
        file.write(web_page.render(all_tickets, out).encode())
    pictures = _write_pictures(out, all_tickets)
    runs = [run for group in groups for run in group.runs]
    with replacing(out / "results.csv") as file:
        run_folders.tidy(runs).to_csv(file, index=False)
    with replacing(out / "tables.md") as file:
        texts = [
            f"# Lottery tickets: {contents.title_of(groups)}",
            *(sheet.markdown() for sheet in overviews),
            *filter(None, [comparison]),
        ]
        for (title, conclusion, sheets), of_group in zip(sections, all_tickets, strict=True):
            texts += [f"## {title}", *filter(None, [conclusion])]
            texts += [sheet.markdown() for sheet in sheets]
            texts += [f"Not loaded: {text}" for text in of_group.unreadable]
        file.write("\n\n".join([*texts, ""]).encode())
    progress.say(
        console, f"{out / 'report.html'}; tables.md, results.csv and {pictures} *.png next to it"
    )
    return out / "report.html"


def _say(console: Console, text: str) -> None:
    if text:
        progress.say(console, text)


def _write_pictures(out: Path, all_tickets: Sequence[GroupTickets]) -> int:
    """Writes the pictures, deletes those of an earlier report, and returns their number."""
    named = contents.named(all_tickets)
    for name, picture in named.items():
        results.write_figure(out / name, contents.titled(picture))
    for path in out.iterdir():
        if path.name not in named and re.fullmatch(PICTURE, path.name):
            path.unlink()
    return len(named)


def _holds_only(folder: Path, pruned: list[Path]) -> bool:
    """Returns True if a folder, or every run inside, is one of `lottery-ticket prune`."""
    if folder in pruned:
        return True
    inside = [one for one in pruned if one.parent == folder]
    return bool(inside) and not any(results.is_run(one) for one in folder.iterdir())


def _check_replaceable(out: Path) -> None:
    """Raises ValueError if a report would replace files that do not belong to an earlier report."""
    if any((out / name).exists() for name in (results.CONFIG_FILE, results.SWEEP_FILE)):
        raise ValueError(
            f"'{out}' is itself the folder of a run or a sweep, whose {results.RESULTS_FILE} a "
            "report would replace. Choose another folder with --out."
        )
    names = [results.RESULTS_FILE, "tables.md"]
    names += sorted(path.name for path in out.glob("*.png") if re.fullmatch(PICTURE, path.name))
    there = [name for name in names if (out / name).exists()]
    if not (out / "report.html").exists():
        refuse_to_replace(out, there, "report")
