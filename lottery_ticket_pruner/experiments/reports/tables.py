"""Tables of results as text, for the terminal, the web page and the Markdown file."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import rich.box
from rich.markup import escape
from rich.table import Table

from lottery_ticket_pruner.experiments.reports.run_folders import Group
from lottery_ticket_pruner.experiments.reports.statistics import (
    ALL_EQUAL,
    CONFIDENCE,
    accuracy_text,
    are_equal,
    arm_label,
    arms_of,
    dense_accuracies,
    factors_of,
    grouped,
    interval,
    is_at_least,
    levels_of,
    place_of,
    spread,
    text_of,
)
from lottery_ticket_pruner.wording import signed

_TERMINAL = 80


_NAME = 12  # Characters of a name that fit on a line at least.


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table as text, which is the same in the terminal, the web page and the Markdown file."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    # Number of columns from the left that contain names instead of numbers.
    names: int = 0
    note: str = ""

    def table(self) -> Table:
        """Returns the table for the terminal. Wide tables get less padding."""
        columns = zip(self.headings, *self.lines, strict=True)
        # A blank on both sides of each column, a blank between columns and at both edges.
        close = 1 + sum(3 + max(map(len, column)) for column in columns) > _TERMINAL
        table = Table(
            box=rich.box.SIMPLE,
            title=escape(self.title),
            caption=escape(self.note) or None,
            padding=0 if close else (0, 1),
        )
        for number, heading in enumerate(self.headings):
            is_name = number < self.names
            table.add_column(
                escape(heading.replace(" ", "\n") if close and not is_name else heading),
                justify="left" if is_name else "right",
                width=self._name_width(number) if close and is_name else None,
                no_wrap=not is_name,
                overflow="fold" if is_name else "ellipsis",
            )
        for line in self.lines:
            # Names are kept, because they may have any value.
            numbers = list(map(_narrow, line[self.names :])) if close else line[self.names :]
            table.add_row(*map(escape, (*line[: self.names], *numbers)))
        return table

    def _name_width(self, number: int) -> int:
        """Returns the width of a column of names in a wide table: what the numbers leave.

        Names get a least width all the same. Numbers that do not fit then end in an ellipsis.
        """
        columns = list(zip(self.headings, *self.lines, strict=True))
        words = [
            [*heading.split(" "), *"\n".join(map(_narrow, cells)).split("\n")]
            for heading, *cells in columns[self.names :]
        ]
        taken = sum(1 + max(map(len, each)) for each in words)
        free = (_TERMINAL - 2 - taken) // self.names
        return min(max(map(len, columns[number])), max(_NAME, free))

    def markdown(self) -> str:
        """Returns the table in Markdown, with its title above and its note below."""
        rule = [":--" if n < self.names else "--:" for n in range(len(self.headings))]
        lines = [
            [cell.replace("|", r"\|") for cell in line] for line in (self.headings, *self.lines)
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        return "\n\n".join(filter(None, (self.title, table, self.note)))


def _narrow(number: str) -> str:
    """Returns a cell of numbers as it is in wide tables."""
    return number.replace(" ± ", "±").replace(" at ", "\nat ")


def summary_table(rows: Sequence[dict[str, Any]] | pd.DataFrame) -> Table:
    """Returns the table of `accuracy_sheet` for the terminal."""
    return accuracy_sheet(pd.DataFrame(rows)).table()


def accuracy_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the accuracy of every arm per round: mean and standard deviation over replicates.

    `lottery-ticket run` prints this table, which must fit 80 columns. The column of early stops
    contains steps of the ticket, or of the dense run in the first line.
    """
    arms = arms_of(rows) or ["ticket"]
    counts = rows.groupby(["round", "arm"]).size()
    lines = []
    for number, of_round in rows.groupby("round"):
        main = of_round[of_round["arm"].isin(["dense", "ticket"])]
        shown = ["dense"] if not number else arms
        cells = [
            accuracy_text(of_round.loc[of_round["arm"] == arm, "test_accuracy"]) for arm in shown
        ]
        early_stop = main["early_stop_step"].mean() if "early_stop_step" in main else np.nan
        lines.append(
            (
                str(number) if number else "dense",
                f"{1 - of_round['sparsity'].mean():.2%}",
                _channels_left(of_round),
                *cells,
                *[""] * (len(arms) - len(cells)),
                "" if np.isnan(early_stop) else f"{early_stop:.0f}",
            )
        )
    title = "test accuracy, %"
    if counts.max() > 1:
        several = f"{counts.max()}" if counts.min() == counts.max() else f"up to {counts.max()}"
        title += f": mean ± standard deviation of {several} replicates"
    headings = ("round", "weights", "channels", *map(arm_label, arms), "early stop")
    note = "Early stop: the step with the lowest validation loss, of the dense run or the ticket."
    own = [accuracies for _, accuracies in rows.groupby(["round", "arm"])["test_accuracy"]]
    if any(map(are_equal, own)):
        note += " ± 0.00: all replicates are equal, which does not make their mean certain."
    return _with_channels(Sheet(title, headings, tuple(lines), note=note))


def _channels_left(rows: pd.DataFrame) -> str:
    """Returns the mean share of the channels that are left, empty for runs that prune weights."""
    shares = rows["channels"].dropna() if "channels" in rows else ()
    return f"{np.mean(shares):.2%}" if len(shares) else ""


def _with_channels(sheet: Sheet) -> Sheet:
    """Returns the table without its column of channels if that is empty."""
    place = sheet.headings.index("channels")
    if any(line[place] for line in sheet.lines):
        return sheet
    headings, *lines = (
        (*line[:place], *line[place + 1 :]) for line in (sheet.headings, *sheet.lines)
    )
    return dataclasses.replace(sheet, headings=headings, lines=tuple(lines))


def difference_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the ticket's test accuracy minus that of the dense run and the controls, in points.

    Differences are taken within each seed, so that effects shared by all arms of a seed cancel.
    """
    by_seed = rows.pivot_table("test_accuracy", ["round", "seed"], "arm").reset_index("round")
    dense = by_seed.loc[by_seed["round"] == 0, "dense"] if "dense" in by_seed else None
    controls = [arm for arm in arms_of(rows) if arm != "ticket"]
    counts: set[int] = set()

    def cell(ticket: pd.Series, other: pd.Series) -> str:
        gains = (ticket - other).dropna().tolist()
        if not gains:
            return ""
        counts.add(len(gains))
        mean = signed(100 * np.mean(gains), ".2f")
        if len(gains) < 3:
            return mean
        found = interval(gains)
        if found is None:
            return f"{mean} ({len(gains)} equal)"
        return f"{mean} ± {100 * (found[1] - np.mean(gains)):.2f}"

    lines = []
    for number, of_round in by_seed[by_seed["round"] > 0].groupby("round"):
        ticket = of_round["ticket"]
        left = 1 - rows.loc[(rows["round"] == number), "sparsity"].mean()
        versus = [] if dense is None else [cell(ticket, dense)]
        versus += [cell(ticket, of_round[arm]) for arm in controls]
        lines.append((str(number), f"{left:.2%}", *versus))
    title = "the ticket's test accuracy minus that of others, points"
    if max(counts, default=0) > 2:
        title += f": mean ± half of the {CONFIDENCE:.0%} interval by Student's t, paired by seed"
    others = ([] if dense is None else ["dense"]) + [arm_label(arm) for arm in controls]
    headings = ("round", "weights", *(f"minus {name}" for name in others))
    has_equal = any(text.endswith("equal)") for line in lines for text in line)
    note = f"Equal: the difference is {ALL_EQUAL}." if has_equal else ""
    return Sheet(title, headings, tuple(lines), note=note)


def overview_sheet(groups: Sequence[Group]) -> Sheet:
    """Returns a line for every group: results of its last round, and how far tickets match dense.

    For an unfinished group, it contains the seeds that got furthest.
    """
    lines = []
    for group in groups:
        last = group.rows[group.rows["round"] == group.rows["round"].max()]
        seeds, everyone = last["seed"].nunique(), group.rows["seed"].nunique()
        same = group.rows[group.rows["seed"].isin(last["seed"])]
        arms = {arm: own["test_accuracy"].tolist() for arm, own in last.groupby("arm")}
        ticket = arms.pop("ticket", [])
        arms.pop("dense", None)
        lines.append(
            (
                group.label or group.title,
                str(seeds) if seeds == everyone else f"{seeds} of {everyone}",
                f"{1 - last['sparsity'].mean():.2%}",
                _channels_left(last),
                accuracy_text(dense_accuracies(same)),
                accuracy_text(ticket),
                accuracy_text(max(arms.values(), key=np.mean, default=[])),
                _holds_down_to(group.rows),
            )
        )
    headings = (
        "",
        "seeds",
        "weights",
        "channels",
        "dense",
        "ticket",
        "best control",
        "matches dense to",
    )
    return filled(
        Sheet(
            "test accuracy of the dense network and at the last round, %",
            headings,
            tuple(lines),
            names=1,
            note="Matches dense to: the fewest weights with which the mean of the tickets is at "
            "least that of the dense network.",
        )
    )


def tickets_sheet(groups: Sequence[Group]) -> Sheet:
    """Returns the accuracy of the tickets of every group by round, for at most six rounds."""
    rows = [group.rows[group.rows["arm"] == "ticket"] for group in groups]
    last = max(own["round"].max() for own in rows)
    shown = np.unique(np.linspace(1, last, 6).round())
    left = [(1 - own.groupby("round")["sparsity"].mean()).map("{:.2%}".format) for own in rows]
    headings = []
    for number in shown:
        texts = {own[number] for own in left if number in own}
        headings.append(texts.pop() if len(texts) == 1 else f"round {number:.0f}")
    lines = [
        (
            group.label or group.title,
            *(accuracy_text(own.loc[own["round"] == n, "test_accuracy"]) for n in shown),
        )
        for group, own in zip(groups, rows, strict=True)
    ]
    title = "test accuracy of the tickets by weights left, %: mean ± standard deviation"
    return Sheet(title, ("", *headings), tuple(lines), names=1)


def overviews_of_searches(searches: Sequence[Group]) -> list[Sheet]:
    """Returns the tables that compare groups of runs of `lottery-ticket run`."""
    found = [group for group in searches if (group.rows["arm"] == "ticket").any()]
    return [overview_sheet(searches), *([tickets_sheet(found)] if len(found) > 1 else [])]


def overviews_of_masks(groups: Sequence[Group]) -> list[Sheet]:
    """Returns the tables that compare groups of runs of `lottery-ticket supermask`."""
    if len(groups) < 2:
        return []
    named = [group.rows.assign(configuration=group.label or group.title) for group in groups]
    rows = pd.concat(named, ignore_index=True)
    return [best_sheet(rows[["configuration", *rows.columns.drop("configuration")]])]


def filled(sheet: Sheet) -> Sheet:
    """Returns the table without empty columns."""
    keep = [n for n in range(len(sheet.headings)) if any(line[n] for line in sheet.lines)]
    return dataclasses.replace(
        sheet,
        headings=tuple(sheet.headings[n] for n in keep),
        lines=tuple(tuple(line[n] for n in keep) for line in sheet.lines),
    )


def _holds_down_to(rows: pd.DataFrame) -> str:
    """Returns the fewest weights left with which the ticket's mean is at least the dense one.

    Both means are over the seeds that have reached this round.
    """
    dense = rows[rows["arm"] == "dense"].set_index("seed")["test_accuracy"]
    tickets = rows[(rows["arm"] == "ticket") & rows["seed"].isin(dense.index)]
    if tickets.empty:
        return ""
    gain = tickets["test_accuracy"] - dense.loc[tickets["seed"]].to_numpy()
    rounds = tickets.assign(gain=gain).groupby("round")[["sparsity", "gain"]].mean()
    matching = rounds[rounds["gain"].map(is_at_least)]
    return f"{1 - matching['sparsity'].max():.2%}" if len(matching) else "never"


def best_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the best mean accuracy of every combination of choices, and where it was reached.

    Each criterion has a line, and the other choices are columns.
    """
    factors, place = factors_of(rows), place_of(rows)
    where = "weights left" if place == "sparsity" else place
    down = factors[: factors.index("criterion") + 1] if "criterion" in factors else factors
    across = factors[len(down) :]
    title = f"best test accuracy, %{f', at {where}' if across else ''}"
    replicates = rows["seed"].nunique()
    if replicates > 1:
        title += f": mean ± standard deviation of {replicates} replicates"
    chosen = any(len(levels_of(own, place)) > 1 for _, own in grouped(rows, factors))
    every = "all sparsities" if place == "sparsity" else "all epochs"
    note = f"Each is the best of {every}, chosen by this accuracy itself." if chosen else ""
    if not across:
        lines = [(*map(text_of, values), *_best(own, place)) for values, own in grouped(rows, down)]
        plain = (*down, "accuracy", where)
        return Sheet(title, plain, tuple(lines), names=len(down), note=note)
    columns = [values for values, _ in grouped(rows, across)]
    lines = []
    for values, of_line in grouped(rows, down):
        cells = dict.fromkeys(columns, "")
        for setting, own in grouped(of_line, across):
            cells[setting] = " at ".join(_best(own, place))
        lines.append((*map(text_of, values), *cells.values()))
    headings = [_setting(across, values) for values in columns]
    return Sheet(title, (*down, *headings), tuple(lines), names=len(down), note=note)


def instability_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the results of `lottery-ticket instability`, one line per step."""
    lines = []
    for (step, sparsity), own in rows.groupby(["rewind_to", "sparsity"]):
        lines.append(
            (
                f"{step}",
                f"{1 - sparsity:.2%}",
                accuracy_text(own["instability"]),
                spread(own["loss_barrier"], "{:z.3f}"),
                accuracy_text(own["test_accuracy"]),
                accuracy_text(own["lowest_accuracy"]),
            )
        )
    headings = ("steps", "weights", "instability", "by loss", "ends", "lowest")
    title = "instability, points of test error; test accuracy, %"
    replicates = rows["seed"].nunique()
    if replicates > 1:
        title += f": mean ± standard deviation of {replicates} replicates"
    note = "Below 2 points a network counts as stable (Frankle et al., arXiv 1912.05671)."
    return Sheet(title, headings, tuple(lines), note=note)


def _best(rows: pd.DataFrame, place: str) -> tuple[str, str]:
    at, best = max(levels_of(rows, place), key=lambda level: level[1]["test_accuracy"].mean())
    shown = f"{100 * (1 - at):.4g}%" if place == "sparsity" else f"{at:g}"
    return accuracy_text(best["test_accuracy"]), shown


def _setting(names: Sequence[str], values: Sequence[Any]) -> str:
    """Returns choices as a short heading, without the names of options."""
    texts = [
        "rescaled" * bool(value) if name == "dwr" else text_of(value).replace("_", " ")
        for name, value in zip(names, values, strict=True)
    ]
    return ", ".join(filter(None, texts)) or "not rescaled"
