"""Figures of test accuracy against weights left, sparsity or epochs."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from lottery_ticket_pruner.experiments.reports.statistics import (
    arm_label,
    arms_of,
    dense_accuracies,
    describe_bands,
    factors_of,
    grouped,
    interval,
    levels_of,
    place_of,
    text_of,
)

# Palette of Okabe & Ito, which readers with any color vision can tell apart. Its yellow, which has
# too little contrast on a white page, is replaced.
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

_TICKS = (100, 50, 20, 10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01)


@dataclasses.dataclass(frozen=True)
class Line:
    """A line of a figure: its positions, and the accuracies of the replicates at each of them."""

    label: str
    x: tuple[float, ...]
    samples: tuple[tuple[float, ...], ...]
    color: str = PALETTE[0]
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
    free = iter(zip(PALETTE[5:], _MARKERS[5:], strict=True))
    for arm in arms_of(rows):
        color, marker = _LOOKS.get(arm) or next(free, (PALETTE[-1], "."))
        lines.append(line_of_arm(rows, arm, color=color, marker=marker))
    return lines


def with_looks(lines: Sequence[Line]) -> list[Line]:
    """Returns the lines with distinct colors and markers, and from the ninth on with dashes."""
    return [
        dataclasses.replace(
            line,
            color=PALETTE[number % len(PALETTE)],
            marker=_MARKERS[number % len(_MARKERS)],
            style=_STYLES[number // len(PALETTE) % len(_STYLES)],
        )
        for number, line in enumerate(lines)
    ]


def charts(rows: pd.DataFrame) -> list[tuple[str, list[Line], str]]:
    """Returns title, lines and axis label of the figures for rows without rounds.

    The option with the most values becomes the lines. Each combination of the others gets a figure.
    """
    place = place_of(rows)
    factors = sorted(factors_of(rows), key=lambda name: -rows[name].nunique())
    found = []
    for values, of_chart in grouped(rows, factors[1:]):
        names = zip(factors[1:], values, strict=True)
        title = ", ".join(f"{name} {value}" for name, value in names)
        lines = []
        for label, own in grouped(of_chart, factors[:1]):
            levels = levels_of(own, place)
            x = [100 * (1 - at) if place == "sparsity" else at for at, _ in levels]
            samples = tuple(tuple(of_level["test_accuracy"]) for _, of_level in levels)
            lines.append(Line(" ".join(map(text_of, label)) or "accuracy", tuple(x), samples))
        found.append((title, with_looks(lines), "weights left" if place == "sparsity" else place))
    return found


def accuracy_figure(rows: Sequence[dict[str, Any]] | pd.DataFrame, title: str) -> Figure:
    """Plots the test accuracy of every arm against weights left, for a file.

    Lines connect the means. Bands show their confidence intervals (see `interval`).
    """
    rows = pd.DataFrame(rows)
    lines = arm_lines(rows)
    figure = line_figure(lines, dense=dense_accuracies(rows), figsize=(8, 4.6))
    bands = describe_bands(len(sample) for line in lines for sample in line.samples)
    figure.axes[0].set_title("\n".join(filter(None, (title, bands))), fontsize=10)
    return figure


def line_figure(
    lines: Sequence[Line],
    *,
    dense: Sequence[float] = (),
    x_label: str = "weights left",
    figsize: tuple[float, float] = (6, 4),
) -> Figure:
    """Plots test accuracy against weights left (in percent), or against another quantity.

    The vertical axis is logarithmic in the error, so that 98 and 99 % can be told apart while a
    collapsing arm is still visible. Weights left are also logarithmic, and decrease to the right.
    """
    figure = Figure(figsize=figsize, layout="constrained")
    axes = figure.subplots()
    means, edges = [], []
    if dense:
        means.append(_error(float(np.mean(dense))))
        style = {"color": "0.45", "linewidth": 1.2, "linestyle": (0, (5, 3))}
        label = f"dense, {100 * np.mean(dense):.2f} %"
        axes.axhline(means[0], label=label, zorder=1, **style)
    for line in lines:
        means += [_error(float(np.mean(sample))) for sample in line.samples]
        bands = [interval(sample) for sample in line.samples]
        low, high = ([_error(band[side]) for band in bands] for side in (0, 1))
        edges += [*low, *high]
        axes.plot(
            line.x,
            means[-len(line.x) :],
            label=line.label,
            color=line.color,
            marker=line.marker,
            markersize=4.5,
            linewidth=1.6,
            linestyle=line.style,
        )
        axes.fill_between(line.x, low, high, color=line.color, alpha=0.14, linewidth=0)
        if len(line.x) == 1:  # a band without width
            axes.vlines(line.x, low, high, color=line.color, alpha=0.4, linewidth=3)
    _accuracy_axis(axes, means, edges)
    if x_label == "weights left":
        weights_axis(axes, [left for line in lines for left in line.x])
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(x_label)
    axes.set_ylabel("test accuracy")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    add_legend(figure, axes)
    return figure


def _accuracy_axis(axes: Axes, means: Sequence[float], edges: Sequence[float]) -> None:
    # A band may reach far beyond its mean, even above 100 %, so the means determine the limits.
    top = 0.85 * max(min([*edges, *means]), 0.4 * min(means))
    bottom = 1.1 * min(max([*edges, *means]), 2.5 * max(means))
    axes.set_yscale("log")
    axes.set_ylim(min(bottom, 110), top)
    _ticks(axes.yaxis, top, bottom, lambda error: f"{100 - error:.6g} %")


def weights_axis(axes: Axes, left: Sequence[float]) -> None:
    """Makes the horizontal axis one of percent of weights left, logarithmic and decreasing."""
    least = max(min(left, default=100), 0.01)
    axes.set_xscale("log")
    axes.set_xlim(105, 0.9 * least)
    _ticks(axes.xaxis, 0.9 * least, 105, lambda left: f"{left:.6g} %")


def _ticks(axis: Axis, low: float, high: float, text: Callable[[float], str]) -> None:
    """Sets ticks at round numbers, at least three of them if the range is narrow."""
    ticks = [tick for tick in _TICKS if low <= tick <= min(high, 100)]
    if len(ticks) < 3:
        even = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high)
        ticks = [tick for tick in even if low <= tick <= min(high, 100)]
    axis.set_ticks(ticks)
    axis.set_ticks([], minor=True)
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def add_legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the axes, where it hides no band. The figure grows to make room."""
    labels = axes.get_legend_handles_labels()[1]
    longest = max(map(len, labels), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() * 12 // (longest + 7))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=columns)


def _error(accuracy: float) -> float:
    """Returns the error in percent, at least 0.01, because the axis is logarithmic."""
    return max(100 * (1 - accuracy), 0.01)
