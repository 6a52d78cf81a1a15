"""Figures of test accuracy against weights left, sparsity or epochs."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lottery_ticket_pruner import analyses, pictures
from lottery_ticket_pruner.experiments.reports.statistics import (
    accuracy_text,
    arm_label,
    arms_of,
    dense_accuracies,
    describe_bands,
    factors_of,
    grouped,
    interval,
    levels_of,
    place_of,
    setting_text,
    text_of,
)

_STYLES = ("-", "--", ":", "-.")

_ARMS = ("ticket", "random_reinit", "random_mask", "reshuffled_mask", "reinit_same_sign")
_LOOKS = {arm: pictures.look(number) for number, arm in enumerate(_ARMS)}

# Bands of more lines than these would hide each other.
_MOST_BANDS = len(pictures.PALETTE)

# Characters of a line that fit above a figure in a file.
_TITLE = 100

# Label of the axis of what is left of the weights, which `weights_axis` draws.
WEIGHTS = "weights remaining (log scale)"

_TICKS = (100, *(digit * 10.0**power for power in (1, 0, -1, -2) for digit in (5, 3, 2, 1)))
# Of these, the ones that leave room for their labels on a long axis.
_FEWER = (100, *(digit * 10.0**power for power in (1, 0, -1, -2) for digit in (5, 2, 1)))
_LONG = 20  # The largest number over the least.


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure: its positions, and the accuracies of the replicates at each of them."""

    label: str
    x: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...]
    color: str = pictures.PALETTE[0]
    marker: str = "o"
    style: str = "-"


def line_of_arm(rows: pd.DataFrame, arm: str, **look: str) -> Line:
    """Returns the accuracies of an arm by percent of weights left, in the order of its rounds."""
    own = rows[rows["arm"] == arm].groupby("round")
    left = tuple(100 * (1 - own["sparsity"].mean()))
    return Line(arm_label(arm), left, tuple(map(tuple, own["test_accuracy"].apply(list))), **look)


def arm_lines(rows: pd.DataFrame) -> list[Line]:
    """Returns a line for every arm except the dense one. Each arm looks the same in all figures."""
    lines = []
    free = iter([pictures.look(number) for number in range(len(_ARMS), len(pictures.PALETTE))])
    for arm in arms_of(rows):
        color, marker = _LOOKS.get(arm) or next(free, (pictures.PALETTE[-1], "."))
        lines.append(line_of_arm(rows, arm, color=color, marker=marker))
    return lines


def with_looks(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines with distinct colors and markers, and from the ninth on with dashes."""
    found = []
    for number, line in enumerate(lines):
        color, marker = pictures.look(number)
        style = _STYLES[number // len(pictures.PALETTE) % len(_STYLES)]
        found.append(dataclasses.replace(line, color=color, marker=marker, style=style))
    return found


def describe_spread(lines: Sequence[Line]) -> str:
    """Describes the bands of a figure with these lines, or says that it has none."""
    samples = [sample for line in lines for sample in line.samples]
    counts = list(map(len, samples))
    if len(lines) <= _MOST_BANDS or max(counts) < 2:
        without = any(interval(sample) is None for sample in samples)
        return describe_bands(counts) + ("; none where all are equal" if without else "")
    shown = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else f"{max(counts)}"
    return f"Means of {shown} replicates; {len(lines)} bands would hide each other"


def titled(title: str, lines: Sequence[Line]) -> str:
    """Returns the title of a figure with these lines, above what its bands are."""
    return "\n".join(filter(None, (title, textwrap.fill(describe_spread(lines), _TITLE))))


def charts(rows: pd.DataFrame) -> list[tuple[str, list[Line], str]]:
    """Returns title, lines and axis label of the figures for rows without rounds.

    The option with the most values becomes the lines. Each combination of the others gets a figure.
    """
    place = place_of(rows)
    factors = sorted(factors_of(rows), key=lambda name: -rows[name].nunique())
    found = []
    for values, of_chart in grouped(rows, factors[1:]):
        title = ", ".join(map(setting_text, factors[1:], values))
        lines = []
        for label, own in grouped(of_chart, factors[:1]):
            levels = levels_of(own, place)
            x = [100 * (1 - at) if place == "sparsity" else at for at, _ in levels]
            samples = tuple(tuple(of_level["test_accuracy"]) for _, of_level in levels)
            lines.append(Line(" ".join(map(text_of, label)) or "accuracy", tuple(x), samples))
        found.append((title, with_looks(lines), WEIGHTS if place == "sparsity" else place))
    return found


def layers_figure(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """Plots the weights remaining in each layer, on a logarithmic axis.

    Args:
        shares: Shares of kept weights by path, by the name of their series. A single series gets
            no legend.
    """
    paths = list(dict.fromkeys(path for of_series in shares.values() for path in of_series))
    series = {
        name if len(shares) > 1 else "": [of_series.get(path) or np.nan for path in paths]
        for name, of_series in shares.items()
    }
    figure = pictures.dots(paths, series, WEIGHTS)
    axes = figure.axes[0]
    least = np.nanmin([*np.ravel(list(series.values())), 1.0])
    axes.set_xlim(1.12, 0.85 * least)
    axes.set_xscale("log")
    _ticks(axes.xaxis, 0.85 * 100 * least, 112, lambda left: f"{left:.6g} %", scale=0.01)
    return figure


def heat_map(rows: pd.DataFrame) -> Figure:
    """Plots the mean accuracy of untrained masks by criterion and sparsity, per weights and dwr.

    Args:
        rows: Columns `criterion`, `sparsity`, `weights`, `dwr` and `test_accuracy` of every mask.
    """
    settings = list(rows.groupby(["weights", "dwr"], sort=False))
    names, sparsities = rows["criterion"].unique(), sorted(rows["sparsity"].unique())
    size = (2.2 + 0.4 * len(sparsities), 0.6 + len(settings) * (0.5 + 0.27 * len(names)))
    figure, panels = pictures.new_figure(*size, rows=len(settings))
    for axes, ((weights, dwr), own) in zip(np.ravel(panels), settings, strict=True):
        means = own.pivot_table("test_accuracy", "criterion", "sparsity", aggfunc="mean")
        means = means.reindex(index=names, columns=sparsities).to_numpy()
        pictures.fill_matrix(axes, means, np.vectorize("{:.0f}".format)(100 * means))
        axes.set_yticks(range(len(names)), names)
        axes.set_xticks(range(len(sparsities)), [f"{100 * (1 - s):.4g}" for s in sparsities])
        axes.set_title(f"{weights}{', rescaled' if dwr else ''}".replace("_", " "), fontsize=10)
    axes.set_xlabel("weights remaining, %")
    return figure


def interpolations(lines: Iterable[pd.DataFrame]) -> dict[int, list[analyses.Interpolation]]:
    """Returns the lines between two trainings by the step that they have in common.

    Args:
        lines: The tables of metrics along the lines, one for each run.
    """
    found: dict[int, list[analyses.Interpolation]] = {}
    for table in lines:
        for (point, _), line in table.groupby(["rewind_to", "replicate"]):
            metrics = {name: line[name].to_numpy() for name in ("loss", "accuracy")}
            whole = analyses.Interpolation(line["share"].to_numpy(), metrics, "accuracy")
            found.setdefault(point, []).append(whole)
    return found


def accuracy_figure(rows: Sequence[dict[str, Any]] | pd.DataFrame, title: str) -> Figure:
    """Plots the test accuracy of every arm against weights left, for a file.

    Lines connect the means. Bands show their confidence intervals (see `interval`).
    """
    rows = pd.DataFrame(rows)
    lines = arm_lines(rows)
    figure = line_figure(lines, dense=dense_accuracies(rows), figsize=(8, 4.6))
    figure.axes[0].set_title(titled(title, lines), fontsize=10)
    return figure


def line_figure(
    lines: Sequence[Line],
    *,
    dense: Sequence[float] = (),
    x_label: str = WEIGHTS,
    figsize: tuple[float, float] = (6, 4),
) -> Figure:
    """Plots test accuracy against weights remaining (in percent), or against another quantity.

    The vertical axis is logarithmic in the error, so that 98 and 99 % can be told apart while a
    collapsing arm is still visible. Weights remaining are also logarithmic, and decrease to the
    right. With an error of zero, which has no logarithm, the axis is linear below the least error.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots()
    means = [_error(sample) for line in lines for sample in line.samples]
    band = _band if len(lines) <= _MOST_BANDS else _no_band
    bands = [[band(sample) for sample in line.samples] for line in lines]
    edges = [edge for of_line in bands for band in of_line for edge in band if np.isfinite(edge)]
    if dense:
        means.append(_error(dense))
        style = {"color": pictures.MUTED, "linewidth": 1.2, "linestyle": (0, (5, 3))}
        label = f"dense, {100 * np.mean(dense):.2f} %"
        axes.axhline(means[-1], label=label, zorder=1, **style)
    kind = _accuracy_axis(axes, means, edges)
    # Beyond the axis. Zero has no logarithm.
    floor = 0.3 * min(means, default=0) if axes.get_yscale() == "log" else -np.inf
    for line, of_line in zip(lines, bands, strict=True):
        low, high = (np.maximum(ends, floor) for ends in zip(*of_line, strict=True))
        axes.plot(
            line.x,
            [_error(sample) for sample in line.samples],
            label=line.label,
            color=line.color,
            marker=line.marker,
            markersize=4.5,
            linewidth=1.6,
            linestyle=line.style,
        )
        axes.fill_between(line.x, low, high, color=line.color, alpha=0.14, linewidth=0)
        if (alone := _are_alone(np.isfinite(low))).any():
            ends = (np.compress(alone, part) for part in (line.x, low, high))
            axes.vlines(*ends, color=line.color, alpha=0.4, linewidth=3)
    if x_label == WEIGHTS:
        weights_axis(axes, [left for line in lines for left in line.x])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel(f"test accuracy{kind}")
    pictures.open_up(axes)
    pictures.add_legend(figure, axes)
    return figure


def add_values(axes: Axes, lines: Sequence[Line], x_label: str = WEIGHTS) -> None:
    """Adds the values of lines as texts for a pointer."""
    for line in lines:
        for x, sample in zip(line.x, line.samples, strict=True):
            place = f"{x:.4g} % of the weights" if x_label == WEIGHTS else f"{x_label} {x:g}"
            text = f"{line.label}, {place}: {accuracy_text(sample)} %"
            pictures.add_target(axes, x, _error(sample), text)


def _accuracy_axis(axes: Axes, means: Sequence[float], edges: Sequence[float]) -> str:
    """Makes the vertical axis one of accuracies by their errors. Returns what its label says."""
    # A band may reach far beyond its mean, even above 100 %, so the means determine the limits.
    errors = [mean for mean in means if mean]
    if not errors:
        axes.set_ylim(1, -0.05)
        axes.set_yticks([0, 0.5, 1], ["100 %", "99.5 %", "99 %"])
        return ""
    bottom = 1.1 * min(max([*edges, *means]), 2.5 * max(means))
    if len(errors) == len(means):
        top = 0.85 * max(min([*edges, *means]), 0.4 * min(means))
        axes.set_yscale("log")
        ends: tuple[float, ...] = ()
    else:
        least = 0.5 * min(errors)
        axes.set_yscale("symlog", linthresh=least, linscale=0.4)
        top, ends = -0.1 * least, (0,)
    axes.set_ylim(min(bottom, 110), top)
    _ticks(axes.yaxis, max(top, 0.5 * min(errors)), bottom, lambda e: f"{100 - e:.6g} %", ends)
    return " (log scale of the error)"


def weights_axis(axes: Axes, left: Sequence[float]) -> None:
    """Makes the horizontal axis one of percent of weights left, logarithmic and decreasing."""
    least = max(min(left, default=100), 0.01)
    axes.set_xlim(105, 0.9 * least)
    axes.set_xscale("log")
    _ticks(axes.xaxis, 0.9 * least, 105, lambda left: f"{left:.6g} %")


def _ticks(
    axis: Axis,
    low: float,
    high: float,
    text: Callable[[float], str],
    ends: Sequence[float] = (),
    scale: float = 1,
) -> None:
    """Sets ticks at round numbers, at least three of them if the range is narrow, and at ends.

    Args:
        axis: The axis.
        low: The least number.
        high: The largest one.
        text: Returns the label of a number.
        ends: Further ticks.
        scale: Position of the number 1 on the axis.
    """
    choice = _FEWER if high >= _LONG * low else _TICKS
    ticks = [tick for tick in choice if low <= tick <= min(high, 100)]
    if len(ticks) < 3:
        even = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [tick for tick in even if low <= tick <= min(high, 100)]
    axis.set_ticks([scale * tick for tick in (*ticks, *ends)])
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value / scale)))


def _error(accuracies: Sequence[float]) -> float:
    """Returns the error of the mean in percent, exactly zero where only rounding differs."""
    error = 100 * (1 - float(np.mean(accuracies)))
    return error if error > 1e-9 else 0.0


def _band(accuracies: Sequence[float]) -> tuple[float, float]:
    """Returns the errors at both ends of the interval in percent, NaN if there is none."""
    found = interval(accuracies)
    if found is None:
        return np.nan, np.nan
    return 100 * (1 - found[0]), 100 * (1 - found[1])


def _are_alone(have_band: np.ndarray) -> np.ndarray:
    """Returns which points with a band have no neighbor with one, to which it could reach."""
    padded = np.pad(have_band, 1)
    return have_band & ~padded[:-2] & ~padded[2:]


def _no_band(accuracies: Sequence[float]) -> tuple[float, float]:
    return _error(accuracies), _error(accuracies)
