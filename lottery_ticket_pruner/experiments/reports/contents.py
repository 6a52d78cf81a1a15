"""The contents of a report: the tables and figures for each group of results."""

import dataclasses
import functools
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import TypeAlias

import pandas as pd
from matplotlib.figure import Figure

from lottery_ticket_pruner import analyses
from lottery_ticket_pruner.experiments.reports import (
    conclusions,
    figures,
    portraits,
    statistics,
    tables,
    ticket_masks,
)
from lottery_ticket_pruner.experiments.reports.run_folders import Group
from lottery_ticket_pruner.experiments.reports.ticket_masks import GroupTickets
from lottery_ticket_pruner.experiments.results import LINES_FILE, read_table


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of accuracies, with its title, its caption and a name for its file."""

    name: str
    title: str
    caption: str
    lines: Sequence[figures.Line]
    x_label: str = figures.WEIGHTS
    dense: Sequence[float] = ()

    def figure(self, figsize: tuple[float, float] = (4.8, 3.4)) -> Figure:
        """Returns the figure without its title and caption."""
        figure = figures.line_figure(
            self.lines, dense=self.dense, x_label=self.x_label, figsize=figsize
        )
        figures.add_values(figure.axes[0], self.lines, self.x_label)
        return figure


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure drawn by a function, with its title, its caption and a name for its file."""

    name: str
    title: str
    caption: str
    draw: Callable[[], Figure]

    def figure(self, figsize: tuple[float, float] | None = None) -> Figure:
        """Returns the figure without its title and caption, by default in the size that fits it."""
        return self.draw()


Picture: TypeAlias = Chart | Drawing


@dataclasses.dataclass(frozen=True)
class View:
    """The parts of a report for the results of one kind of experiment.

    Attributes:
        sheets: Returns the tables for a group of runs.
        charts: Returns the figures for a group of runs.
        overviews: Returns the tables that compare groups of runs.
        conclusion: Returns a sentence or two about a group of runs.
    """

    sheets: Callable[[Group], list[tables.Sheet]]
    charts: Callable[[Group], list[Picture]]
    overviews: Callable[[Sequence[Group]], list[tables.Sheet]]
    conclusion: Callable[[pd.DataFrame], str]


def view_of(group: Group) -> View:
    """Returns the parts of a report for a group."""
    return VIEWS[group.kind.command]


def overviews(groups: Sequence[Group]) -> list[tables.Sheet]:
    """Returns the tables that compare groups."""
    sheets = []
    for command, view in VIEWS.items():
        own = [group for group in groups if group.kind.command == command]
        sheets += view.overviews(own) if own else []
    return sheets


def _search_sheets(group: Group) -> list[tables.Sheet]:
    sheets = [tables.accuracy_sheet(group.rows)]
    if (group.rows["arm"] == "ticket").any():
        sheets.append(tables.difference_sheet(group.rows))
    return sheets


def _search_charts(group: Group) -> list[Picture]:
    lines = figures.arm_lines(group.rows)
    if not lines:
        return []
    title = f"Accuracy of the ticket and its controls: {group.label or group.title}"
    dense = statistics.dense_accuracies(group.rows)
    return [Chart("accuracy", title, figures.describe_spread(lines), lines, dense=dense)]


def _mask_charts(group: Group) -> list[Picture]:
    rows = group.rows.drop(columns="dense_accuracy", errors="ignore")
    found: list[Picture] = [
        Chart(
            "accuracy-of-masks",
            f"Accuracy of the masks{f': {name}' if name else ''}",
            figures.describe_spread(lines),
            lines,
            x_label,
        )
        for name, lines, x_label in figures.charts(rows)
    ]
    if {"criterion", "weights", "dwr", "sparsity"} <= set(rows):
        caption = "Mean test accuracy in percent. Each row is a criterion."
        for (weights, dwr), own in rows.groupby(["weights", "dwr"], sort=False):
            title = f"Accuracy of all masks: {statistics.setting_text('weights', weights)}"
            title += f", {statistics.setting_text('dwr', dwr)}"
            draw = functools.partial(figures.heat_map, own)
            found.append(Drawing("accuracy-of-all-masks", title, caption, draw))
    return found


def _instability_charts(group: Group) -> list[Picture]:
    files = [run.folder / LINES_FILE for run in group.runs]
    lines = figures.interpolations(read_table(file) for file in files if file.is_file())
    if not lines:
        return []
    caption = (
        "Above: how much the error rises between two trainings that have these steps in common. "
        "Each dot is a seed. Below: mean error along the line between the two."
    )
    draw = functools.partial(analyses.plot_instability, lines)
    return [Drawing("instability", "Instability", caption, draw)]


# By command, for every experiment of `catalogue`.
VIEWS = {
    "run": View(
        _search_sheets, _search_charts, tables.overviews_of_searches, conclusions.of_search
    ),
    "supermask": View(
        lambda group: [tables.best_sheet(group.rows)],
        _mask_charts,
        tables.overviews_of_masks,
        conclusions.of_masks,
    ),
    "instability": View(
        lambda group: [tables.instability_sheet(group.rows)],
        _instability_charts,
        lambda groups: [],
        conclusions.of_instability,
    ),
}


def conclusion_of(group: Group) -> str:
    """Returns what the results of a group show, in a sentence or two."""
    return view_of(group).conclusion(group.rows)


def comparison_of(groups: Sequence[Group]) -> str:
    """Returns which of several configurations is best, in a sentence."""
    return conclusions.of_comparison([g for g in groups if g.kind.command == "run"])


def comparisons(groups: Sequence[Group]) -> list[Chart]:
    """Returns figures with the tickets of all groups, one for each data set and network."""
    together: dict[str, list[figures.Line]] = {}
    for group in groups:
        if group.kind.command == "run" and (group.rows["arm"] == "ticket").any():
            names = (group.config.get("data"), group.config.get("network"))
            line = dataclasses.replace(figures.line_of_arm(group.rows, "ticket"), label=group.label)
            together.setdefault(", ".join(map(str, names)), []).append(line)
    return [
        Chart(
            "tickets-compared",
            f"Tickets compared: {names}",
            figures.describe_spread(lines),
            figures.with_looks(lines),
        )
        for names, lines in together.items()
        if len(lines) > 1
    ]


def mask_charts(all_tickets: Sequence[GroupTickets]) -> list[Drawing]:
    """Returns figures of the masks of tickets: weights by layer, signs and overlap."""
    charts = []
    shares = ticket_masks.layer_shares(all_tickets)
    signs = ticket_masks.same_signs(all_tickets)
    if shares:
        caption = "Of the last tickets. A layer without weights has no dot."
        draw = functools.partial(figures.layers_figure, shares)
        charts.append(Drawing("weights-by-layer", "Weights remaining in each layer", caption, draw))
    if signs:
        caption = "Share of the kept weights of the last tickets that ended with their first sign."
        draw = functools.partial(analyses.plot_by_layer, signs, "share with the first sign")
        charts.append(Drawing("signs-by-layer", "Signs of the kept weights", caption, draw))
    for overlap, seeds in ticket_masks.between(all_tickets):
        caption = (
            "Weights that both masks keep, divided by those that at least one keeps: 1 for equal "
            "masks. Above the diagonal: random masks with as many weights in each layer. Of the "
            f"last tickets at the same seed, {seeds} seed{'s' if seeds > 1 else ''}."
        )
        draw = functools.partial(analyses.plot_overlap, overlap)
        charts.append(Drawing("overlap-of-masks", "How much masks have in common", caption, draw))
    return charts


def portraits_of(of_group: GroupTickets) -> list[Drawing]:
    """Returns pictures of the first ticket of a group: pixels it reads, kernels and masks."""
    if not of_group.tickets:
        return []
    ticket = of_group.tickets[0]
    portrait, whose = ticket.portrait, f"of the last ticket, seed {ticket.seed}"
    found = []
    if portrait.readers is not None:
        draw = functools.partial(portraits.pixels_figure, portrait)
        title = f"Pixels that are read, {whose}"
        found.append(Drawing("pixels", title, portraits.describe_pixels(portrait), draw))
    if portrait.kernels is not None:
        draw = functools.partial(portraits.kernels_figure, portrait)
        caption = (
            f"The first {len(portrait.kernels)}, summed over their input channels. Blue: positive, "
            "orange: negative, empty: pruned."
        )
        found.append(Drawing("kernels", f"Kernels of the first layer, {whose}", caption, draw))
    draw = functools.partial(portraits.masks_figure, portrait)
    found.append(Drawing("masks", f"Masks {whose}", portraits.describe_masks(portrait), draw))
    return found


def named(all_tickets: Sequence[GroupTickets]) -> dict[str, Picture]:
    """Returns all figures of a report by the names of their files.

    A name consists of the number of the figure, what it shows, and the label of its group.
    """
    groups = [of_group.group for of_group in all_tickets]
    shared: list[Picture] = [*comparisons(groups), *mask_charts(all_tickets)]
    found = [(picture, "") for picture in shared]
    for of_group in all_tickets:
        own: list[Picture] = [*view_of(of_group.group).charts(of_group.group)]
        own += portraits_of(of_group)
        found += [(picture, of_group.group.label) for picture in own]
    digits = len(str(len(found)))
    names = {}
    for number, (picture, label) in enumerate(found, 1):
        words = re.sub(r"[^a-z0-9]+", "-", f"{picture.name} {label}".lower())[:60].strip("-")
        names[f"picture-{number:0{digits}}-{words}.png"] = picture
    return names


def titled(chart: Picture) -> Figure:
    """Returns a figure for a file, including its title and caption."""
    figure = chart.figure((8, 4.6))
    width = int(figure.get_figwidth() * 13)
    lines = [textwrap.fill(text, width) for text in (chart.title, chart.caption) if text]
    figure.set_figheight(figure.get_figheight() + 0.17 * sum(t.count("\n") + 1 for t in lines))
    figure.suptitle("\n".join(lines), fontsize=9)
    return figure


def title_of(groups: Sequence[Group]) -> str:
    """Returns the title of a report: data sets and networks, or their number."""
    names = dict.fromkeys(
        ", ".join(str(group.config[key]) for key in ("data", "network") if group.config.get(key))
        for group in groups
    )
    return " and ".join(filter(None, names)) if len(names) <= 2 else f"{len(groups)} configurations"
