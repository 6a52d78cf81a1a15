"""Tables of results, and the lines of their pictures."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import rich.box
import scipy.stats
from rich.table import Table

from lottery_ticket_pruner.experiments.results import Group

LABELS = {
    "dense": "dense",
    "ticket": "ticket",
    "random_reinit": "random reinit",
    "reinit_same_sign": "reinit same signs",
    "random_mask": "random mask",
    "reshuffled_mask": "reshuffled mask",
}
# Okabe & Ito's palette, which readers with any colour vision tell apart; its yellow is replaced,
# which does not stand out from a white page.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#8C6D46",
    "#7F7F7F",
)
_MARKERS = "os^vDPX*"
_STYLES = ("-", "--", ":", "-.")
_LOOKS = {
    "ticket": (PALETTE[0], "o"),
    "random_reinit": (PALETTE[1], "s"),
    "random_mask": (PALETTE[2], "^"),
    "reshuffled_mask": (PALETTE[3], "v"),
    "reinit_same_sign": (PALETTE[4], "D"),
}
_CONFIDENCE = 0.95
_TERMINAL = 80


# --- Statistics -----------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The confidence interval (95 %) of the mean by Student's t, from three values on.

    Of two values it is the lower and the higher, of one that value twice.
    """
    if len(values) < 3:
        return min(values), max(values)
    mean, error = np.mean(values), scipy.stats.sem(values)
    half = error * scipy.stats.t.ppf(0.5 + _CONFIDENCE / 2, len(values) - 1)
    return float(mean - half), float(mean + half)


def describe_bands(counts: Iterable[int]) -> str:
    """Describes the bands of a picture, given the number of replicates behind each point."""
    numbers = sorted(set(counts))
    texts = []
    if several := [n for n in numbers if n >= 3]:
        shown = f"{several[0]} to {several[-1]}" if len(several) > 1 else several[0]
        texts.append(
            f"{_CONFIDENCE:.0%} confidence intervals of the mean by Student's t, "
            f"{shown} replicates".replace("%", " %")
        )
    if 2 in numbers:
        texts.append("lowest to highest of 2 replicates")
    return f"Bands: {'; '.join(texts)}" if texts else ""


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a picture: where its points are, and the accuracies of the replicates at each."""

    label: str
    x: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...]
    colour: str = PALETTE[0]
    marker: str = "o"
    style: str = "-"


def arms_of(rows: pd.DataFrame) -> list[str]:
    """The arms that occur next to the dense run: the ticket first, unknown ones last."""
    present = dict.fromkeys(rows["arm"])
    known = [arm for arm in LABELS if arm in present]
    return [arm for arm in (*known, *(a for a in present if a not in LABELS)) if arm != "dense"]


def arm_label(arm: str) -> str:
    """The name of an arm as readers see it."""
    return LABELS.get(arm, arm.replace("_", " "))


def line_of_arm(rows: pd.DataFrame, arm: str, **look: str) -> Line:
    """Accuracies of one arm by percent of weights left, in the order of its rounds."""
    own = rows[rows["arm"] == arm].groupby("round")
    left = tuple(100 * (1 - own["sparsity"].mean()))
    return Line(arm_label(arm), left, tuple(map(tuple, own["test_accuracy"].apply(list))), **look)


def dense_accuracies(rows: pd.DataFrame) -> list[float]:
    """Test accuracies of the dense runs, one per replicate; empty where none was run."""
    return rows.loc[rows["arm"] == "dense", "test_accuracy"].tolist()


# --- Tables ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Sheet:
    """A table as text: the terminal, the page and the Markdown file show the same one."""

    title: str
    headings: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    # How many columns from the left are names, not numbers.
    names: int = 0
    note: str = ""

    def table(self) -> Table:
        """The table for the terminal; wide ones are set closer."""
        columns = zip(self.headings, *self.lines, strict=True)
        close = sum(2 + max(map(len, column)) for column in columns) > _TERMINAL
        table = Table(
            box=rich.box.SIMPLE,
            title=self.title,
            caption=self.note or None,
            padding=0 if close else (0, 1),
        )
        for number, heading in enumerate(self.headings):
            is_name = number < self.names
            table.add_column(
                heading.replace(" ", "\n") if close and not is_name else heading,
                justify="left" if is_name else "right",
                no_wrap=not is_name,
                overflow="fold" if is_name else "ellipsis",
            )
        for line in self.lines:
            # Names stay: they may hold anything.
            numbers = line[self.names :]
            if close:
                numbers = [n.replace(" ± ", "±").replace(" at ", "\nat ") for n in numbers]
            table.add_row(*line[: self.names], *numbers)
        return table

    def markdown(self) -> str:
        """The table in Markdown, its title above it and its note below."""
        rule = [":--" if n < self.names else "--:" for n in range(len(self.headings))]
        lines = [
            [cell.replace("|", r"\|") for cell in line] for line in (self.headings, *self.lines)
        ]
        table = "\n".join(f"| {' | '.join(line)} |" for line in (lines[0], rule, *lines[1:]))
        return "\n\n".join(filter(None, (self.title, table, self.note)))


def summary_table(rows: Sequence[dict[str, Any]] | pd.DataFrame) -> Table:
    """The table of `accuracy_sheet` for the terminal."""
    return accuracy_sheet(pd.DataFrame(rows)).table()


def accuracy_sheet(rows: pd.DataFrame) -> Sheet:
    """Accuracy of every arm per round: the mean over replicates, and their deviation.

    The column of early stops is the ticket's (in the first line the dense run's), in steps.
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
                *cells,
                *[""] * (len(arms) - len(cells)),
                "" if np.isnan(early_stop) else f"{early_stop:.0f}",
            )
        )
    title = "test accuracy, %"
    if counts.max() > 1:
        several = f"{counts.max()}" if counts.min() == counts.max() else f"up to {counts.max()}"
        title += f": mean ± standard deviation of {several} replicates"
    headings = ("round", "weights", *map(arm_label, arms), "early stop")
    return Sheet(title, headings, tuple(lines))


def difference_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the ticket's lead over the dense run and controls, in points of test accuracy.

    Differences are taken within a seed, so that what all arms of a seed share drops out.
    """
    by_seed = rows.pivot_table("test_accuracy", ["round", "seed"], "arm").reset_index("round")
    dense = by_seed.loc[by_seed["round"] == 0, "dense"] if "dense" in by_seed else None
    controls = [arm for arm in arms_of(rows) if arm != "ticket"]
    counts: set[int] = set()

    def cell(ticket: pd.Series, other: pd.Series) -> str:
        points = (100 * (ticket - other)).dropna().tolist()
        if not points:
            return ""
        counts.add(len(points))
        half = f" ± {interval(points)[1] - np.mean(points):.2f}" if len(points) > 2 else ""
        return f"{np.mean(points):+.2f}{half}"

    lines = []
    for number, of_round in by_seed[by_seed["round"] > 0].groupby("round"):
        ticket = of_round["ticket"]
        left = 1 - rows.loc[(rows["round"] == number), "sparsity"].mean()
        versus = [] if dense is None else [cell(ticket, dense)]
        versus += [cell(ticket, of_round[arm]) for arm in controls]
        lines.append((str(number), f"{left:.2%}", *versus))
    title = "the ticket's test accuracy minus that of others, points"
    if max(counts, default=0) > 2:
        title += f": mean ± half of the {_CONFIDENCE:.0%} interval by Student's t, paired by seed"
    others = ([] if dense is None else ["dense"]) + [arm_label(arm) for arm in controls]
    return Sheet(title, ("round", "weights", *(f"minus {name}" for name in others)), tuple(lines))


def overview_sheet(groups: Sequence[Group]) -> Sheet:
    """A line for every group: where its last round ended, and how far its tickets hold up.

    Of a group that is not finished it has the seeds that got furthest.
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
                accuracy_text(dense_accuracies(same)),
                accuracy_text(ticket),
                accuracy_text(max(arms.values(), key=np.mean, default=[])),
                _holds_down_to(group.rows),
            )
        )
    headings = ("", "seeds", "weights", "dense", "ticket", "best control", "matches dense to")
    return filled(
        Sheet(
            "test accuracy of the dense network and at the last round, %",
            headings,
            tuple(lines),
            names=1,
            note="The last column has the fewest weights with which the ticket's mean is not below "
            "that of the dense network.",
        )
    )


def tickets_sheet(groups: Sequence[Group]) -> Sheet:
    """The accuracy of the tickets of every group, round by round: six rounds if there are more."""
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


def overviews(groups: Sequence[Group]) -> list[Sheet]:
    """The tables that put groups side by side."""
    sheets = []
    searches = [group for group in groups if group.has_rounds]
    if searches:
        sheets.append(overview_sheet(searches))
    found = [group for group in searches if (group.rows["arm"] == "ticket").any()]
    if len(found) > 1:
        sheets.append(tickets_sheet(found))
    others = [group for group in groups if group.has_masks]
    if len(others) > 1:
        named = [group.rows.assign(configuration=group.label or group.title) for group in others]
        rows = pd.concat(named, ignore_index=True)
        sheets.append(best_sheet(rows[["configuration", *rows.columns.drop("configuration")]]))
    return sheets


def filled(sheet: Sheet) -> Sheet:
    """The same table without the columns that are empty in every line."""
    keep = [n for n in range(len(sheet.headings)) if any(line[n] for line in sheet.lines)]
    return dataclasses.replace(
        sheet,
        headings=tuple(sheet.headings[n] for n in keep),
        lines=tuple(tuple(line[n] for n in keep) for line in sheet.lines),
    )


def _holds_down_to(rows: pd.DataFrame) -> str:
    """The fewest weights left with which the ticket's mean is not below the dense one.

    Both means are over the seeds that have come as far as that.
    """
    dense = rows[rows["arm"] == "dense"].set_index("seed")["test_accuracy"]
    tickets = rows[(rows["arm"] == "ticket") & rows["seed"].isin(dense.index)]
    if tickets.empty:
        return ""
    gain = tickets["test_accuracy"] - dense.loc[tickets["seed"]].to_numpy()
    rounds = tickets.assign(gain=gain).groupby("round")[["sparsity", "gain"]].mean()
    matching = rounds[rounds["gain"] >= -1e-9]
    return f"{1 - matching['sparsity'].max():.2%}" if len(matching) else "never"


def accuracy_text(accuracies: Sequence[float]) -> str:
    """The mean in percent and, of several, the standard deviation."""
    return _spread(100 * np.asarray(accuracies, float), "{:.2f}")


def _spread(values: Sequence[float], style: str) -> str:
    if not len(values):
        return ""
    mean = style.format(np.mean(values))
    return mean if len(values) == 1 else f"{mean} ± {style.format(np.std(values, ddof=1))}"


# --- Results of other commands --------------------------------------------------------------------

# Columns that are measured, not chosen, as all others with numbers in them are taken to be.
_CHOICES = ("criterion", "dwr", "kind", "weights")


def factors_of(rows: pd.DataFrame) -> list[str]:
    """The columns of choices in rows that are not those of rounds: texts, truths, known names."""
    numeric = pd.api.types.is_numeric_dtype
    return [
        name
        for name, column in rows.items()
        if name in _CHOICES or not numeric(column) or pd.api.types.is_bool_dtype(column)
    ]


def best_sheet(rows: pd.DataFrame) -> Sheet:
    """For every combination of choices the best mean accuracy, and where it was reached.

    Criteria have a line each, with what else was chosen for them in columns.
    """
    factors, place = factors_of(rows), place_of(rows)
    where = "weights left" if place == "sparsity" else place
    down = factors[: factors.index("criterion") + 1] if "criterion" in factors else factors
    across = factors[len(down) :]
    title = f"best test accuracy, %{f', at {where}' if across else ''}"
    replicates = rows["seed"].nunique()
    if replicates > 1:
        title += f": mean ± standard deviation of {replicates} replicates"
    if not across:
        lines = [(*map(_text, values), *_best(own, place)) for values, own in _by(rows, down)]
        return Sheet(title, (*down, "accuracy", where), tuple(lines), names=len(down))
    columns = [values for values, _ in _by(rows, across)]
    lines = []
    for values, of_line in _by(rows, down):
        cells = dict.fromkeys(columns, "")
        for setting, own in _by(of_line, across):
            cells[setting] = " at ".join(_best(own, place))
        lines.append((*map(_text, values), *cells.values()))
    headings = [_setting(across, values) for values in columns]
    return Sheet(title, (*down, *headings), tuple(lines), names=len(down))


def instability_sheet(rows: pd.DataFrame) -> Sheet:
    """Returns the results of `lottery-ticket instability`, a line per point."""
    lines = []
    for (step, sparsity), own in rows.groupby(["rewind_to", "sparsity"]):
        lines.append(
            (
                f"{step}",
                f"{1 - sparsity:.2%}",
                accuracy_text(own["instability"]),
                _spread(own["loss_barrier"], "{:.3f}"),
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
    at, best = max(_levels(rows, place), key=lambda level: level[1]["test_accuracy"].mean())
    shown = f"{100 * (1 - at):.4g}%" if place == "sparsity" else f"{at:g}"
    return accuracy_text(best["test_accuracy"]), shown


def _levels(rows: pd.DataFrame, place: str) -> list[tuple[float, pd.DataFrame]]:
    """Returns the places of the rows in order, each with the rows of all seeds there.

    They are put together by their turn within their seed: a learned mask finds a sparsity of its
    own for every seed.
    """
    turns = rows.groupby("seed")[place].rank(method="first")
    return [(own[place].mean(), own) for _, own in rows.groupby(turns)]


def _setting(names: Sequence[str], values: Sequence[Any]) -> str:
    """Choices as a heading: truths by their names."""
    texts = [
        name * bool(value) if isinstance(value, bool | np.bool_) else _text(value).replace("_", " ")
        for name, value in zip(names, values, strict=True)
    ]
    return ", ".join(filter(None, texts)) or f"no {names[0]}"


def _text(value: Any) -> str:
    return "" if pd.isna(value) else str(value)


def charts(rows: pd.DataFrame) -> list[tuple[str, list[Line], str]]:
    """Title, lines and label of the level axis of the pictures of rows that have no rounds.

    The choice with the most values gives the lines; every combination of the others a picture.
    """
    place = place_of(rows)
    factors = sorted(factors_of(rows), key=lambda name: -rows[name].nunique())
    found = []
    for values, of_chart in _by(rows, factors[1:]):
        names = zip(factors[1:], values, strict=True)
        title = ", ".join(f"{name} {value}" for name, value in names)
        lines = []
        for label, own in _by(of_chart, factors[:1]):
            levels = _levels(own, place)
            x = [100 * (1 - at) if place == "sparsity" else at for at, _ in levels]
            samples = tuple(tuple(of_level["test_accuracy"]) for _, of_level in levels)
            lines.append(Line(" ".join(map(_text, label)) or "accuracy", tuple(x), samples))
        found.append((title, with_looks(lines), "weights left" if place == "sparsity" else place))
    return found


def place_of(rows: pd.DataFrame) -> str:
    """Returns the column that rows without rounds are ordered by: epochs, else sparsity."""
    return "epoch" if "epoch" in rows else "sparsity"


def _by(rows: pd.DataFrame, columns: list[str]) -> Iterable[tuple[tuple, pd.DataFrame]]:
    return rows.groupby(columns, sort=False, dropna=False) if columns else [((), rows)]


# --- Looks ----------------------------------------------------------------------------------------


def arm_lines(rows: pd.DataFrame) -> list[Line]:
    """A line for every arm but the dense one; an arm looks the same in every picture."""
    lines = []
    free = iter(zip(PALETTE[5:], _MARKERS[5:], strict=True))
    for arm in arms_of(rows):
        colour, marker = _LOOKS.get(arm) or next(free, (PALETTE[-1], "."))
        lines.append(line_of_arm(rows, arm, colour=colour, marker=marker))
    return lines


def with_looks(lines: Sequence[Line]) -> list[Line]:
    """The same lines, told apart by colour and marker, from the ninth on by dashes too."""
    return [
        dataclasses.replace(
            line,
            colour=PALETTE[number % len(PALETTE)],
            marker=_MARKERS[number % len(_MARKERS)],
            style=_STYLES[number // len(PALETTE) % len(_STYLES)],
        )
        for number, line in enumerate(lines)
    ]
