"""The contents of a report: the tables and figures for each group of results."""

import dataclasses
import functools
from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from lottery_ticket_pruner import analyses
from lottery_ticket_pruner.experiments.reports import figures, statistics, tables, ticket_masks
from lottery_ticket_pruner.experiments.reports.run_folders import Group
from lottery_ticket_pruner.experiments.reports.ticket_masks import GroupTickets


@dataclasses.dataclass(frozen=True)
class Chart:
    """A figure of accuracies, with its title and caption."""

    title: str
    caption: str
    lines: Sequence[figures.Line]
    x_label: str = "weights left"
    dense: Sequence[float] = ()

    def figure(self, figsize: tuple[float, float] = (4.8, 3.4)) -> Figure:
        """Returns the figure without its title and caption."""
        return figures.line_figure(
            self.lines, dense=self.dense, x_label=self.x_label, figsize=figsize
        )


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A figure drawn by a function, with its title and caption."""

    title: str
    caption: str
    draw: Callable[[], Figure]

    def figure(self, figsize: tuple[float, float] | None = None) -> Figure:
        """Returns the figure without its title and caption, by default in the size that fits it."""
        return self.draw()


@dataclasses.dataclass(frozen=True)
class View:
    """The parts of a report for the results of one kind of experiment.

    Attributes:
        sheets: Returns the tables for a group of runs.
        charts: Returns the figures for a group of runs.
        overviews: Returns the tables that compare groups of runs.
        draws_again: Whether the figures replace those that the runs saved.
    """

    sheets: Callable[[Group], list[tables.Sheet]]
    charts: Callable[[Group], list[Chart]]
    overviews: Callable[[Sequence[Group]], list[tables.Sheet]]
    draws_again: bool = False


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


def _search_charts(group: Group) -> list[Chart]:
    lines = figures.arm_lines(group.rows)
    dense = statistics.dense_accuracies(group.rows)
    title = group.label or group.title
    return [Chart(title, _bands(lines), lines, dense=dense)] if lines else []


def _mask_charts(group: Group) -> list[Chart]:
    title = group.label or group.title
    return [
        Chart(", ".join(filter(None, (title, name))), _bands(lines), lines, x_label)
        for name, lines, x_label in figures.charts(group.rows)
    ]


# By command, for every experiment of `catalogue`.
VIEWS = {
    "run": View(_search_sheets, _search_charts, tables.overviews_of_searches, draws_again=True),
    "supermask": View(
        lambda group: [tables.best_sheet(group.rows)], _mask_charts, tables.overviews_of_masks
    ),
    "instability": View(
        lambda group: [tables.instability_sheet(group.rows)],
        lambda group: [],  # The run's own figure shows it.
        lambda groups: [],
    ),
}


def comparisons(groups: Sequence[Group]) -> list[Chart]:
    """Returns figures with the tickets of all groups, one for each data set and network."""
    together: dict[str, list[figures.Line]] = {}
    for group in groups:
        if group.kind.command == "run" and (group.rows["arm"] == "ticket").any():
            names = (group.config.get("data"), group.config.get("network"))
            line = dataclasses.replace(figures.line_of_arm(group.rows, "ticket"), label=group.label)
            together.setdefault(", ".join(map(str, names)), []).append(line)
    return [
        Chart(f"Tickets compared: {names}", _bands(lines), figures.with_looks(lines))
        for names, lines in together.items()
        if len(lines) > 1
    ]


def mask_charts(all_tickets: Sequence[GroupTickets]) -> list[Drawing]:
    """Returns figures of the masks of tickets: sparsity by layer, signs and overlap."""
    charts = []
    sparsities = ticket_masks.layer_sparsities(all_tickets)
    signs = ticket_masks.same_signs(all_tickets)
    if sparsities:
        draw = functools.partial(analyses.plot_layer_sparsity, sparsities)
        charts.append(Drawing("Pruned weights of each layer", "Of the last tickets", draw))
    if signs:
        label = "share with the sign they started with"
        draw = functools.partial(analyses.plot_by_layer, signs, label)
        charts.append(Drawing("Signs of the kept weights", "Of the last tickets", draw))
    for overlap, seeds in ticket_masks.between(all_tickets):
        caption = f"Of the last tickets at the same seed, {seeds} seed{'s' if seeds > 1 else ''}"
        draw = functools.partial(analyses.plot_overlap, overlap)
        charts.append(Drawing("Kept by both masks over kept by either", caption, draw))
    return charts


def _bands(lines: Sequence[figures.Line]) -> str:
    return statistics.describe_bands(len(sample) for line in lines for sample in line.samples)


def titled(chart: Chart | Drawing) -> Figure:
    """Returns a figure for a file, including its title and caption."""
    figure = chart.figure((8, 4.6))
    figure.suptitle("\n".join(filter(None, (chart.title, chart.caption))), fontsize=10)
    return figure


def title_of(groups: Sequence[Group]) -> str:
    """Returns the title of a report: data sets and networks, or their number."""
    names = dict.fromkeys(
        ", ".join(str(group.config[key]) for key in ("data", "network") if group.config.get(key))
        for group in groups
    )
    return " and ".join(filter(None, names)) if len(names) <= 2 else f"{len(groups)} configurations"
