"""The look of all pictures: colors, open axes, legends, dots, matrices and texts for a pointer.

matplotlib, of the `cli` extra, is imported by the functions, so that the library does without it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The first five are of the palette of Okabe & Ito. All pairs differ for readers who see no red or
# no green; the tests simulate both. Web pages replace them by those of DARK_PALETTE at night.
PALETTE = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#4DB8F0",
    "#6B1F1F",
    "#3B1A6E",
)
DARK_PALETTE = (
    "#4D94E8",
    "#EE7733",
    "#2FC08F",
    "#DB8AC4",
    "#FAD85C",
    "#C8F4F4",
    "#B24A44",
    "#7A5CF0",
)

MARKERS = "os^vDPX*"

# Colors of lines that are not results, and of texts. Web pages replace them as well.
INK, GRID, MUTED = "#000000", "#b0b0b0", "#737373"

# Start of the identifiers of artists with a text for a pointer, see `tell`.
TOLD = "told:"

_LONGEST = 28  # Characters of a label on one line.


def look(number: int) -> tuple[str, str]:
    """Returns the color and the marker of the series with this number."""
    return PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]


def new_figure(width: float, height: float, rows: int = 1) -> tuple[Figure, Any]:
    """Returns an empty figure and its axes, an array of them if there are several rows."""
    from matplotlib.figure import Figure  # Not pyplot, because a library must not open windows.

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows)


def open_up(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    """Removes the frame of axes and adds a faint grid."""
    axes.grid(axis=grid, color=GRID, alpha=0.4, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def add_legend(figure: Figure, axes: Axes) -> None:
    """Adds a legend below the axes, where it hides nothing. The figure grows to make room."""
    labels = axes.get_legend_handles_labels()[1]
    longest = max(map(len, labels), default=0)
    columns = max(1, min(4, int(figure.get_figwidth() * 12 // (longest + 7))))
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(labels) // columns))
    figure.legend(loc="outside lower left", frameon=False, fontsize=9, ncols=columns)


def show_literally(figure: Figure) -> Figure:
    """Makes a figure show its texts as they are, and returns it.

    matplotlib would take what is between two `$` of a name for a formula. Users' figures are made
    so before they are returned, and those of reports when they are written, with all their titles.
    """
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    return figure


def tell(artist: Artist, text: str) -> None:
    """Gives an artist a text that web pages show under the pointer."""
    artist.set_gid(TOLD + text)


def add_target(axes: Axes, x: float, y: float, text: str) -> None:
    """Adds an invisible point that is large enough to be hit by a pointer, with its text."""
    (point,) = axes.plot([x], [y], "o", markersize=11, color=INK, alpha=0.0, label="_target")
    tell(point, text)


def dots(rows: Sequence[str], series: Mapping[str, Sequence[float]], label: str) -> Figure:
    """Plots a share for each row and series as a dot, on lines that are labeled with the rows."""
    height = 0.8 + len(rows) * max(0.26, 0.1 + 0.09 * len(series))
    figure, axes = new_figure(4.8, height)
    # Two of a row are nearer to each other than to those of the next row.
    end = min(0.28, 0.14 * (len(series) - 1))
    offsets = np.linspace(-end, end, len(series))
    for (number, (name, values)), offset in zip(enumerate(series.items()), offsets, strict=True):
        color, marker = look(number)
        at = np.arange(len(rows)) + offset
        axes.plot(values, at, marker, color=color, markersize=5.5, label=name)
        for row, value, y in zip(rows, values, at, strict=True):
            if np.isfinite(value):
                add_target(axes, value, y, f"{name}, {row}: {value:.2%}".removeprefix(", "))
    axes.set_yticks(np.arange(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.03, 1.03)
    axes.set_xticks(np.linspace(0, 1, 6), [f"{percent} %" for percent in range(0, 101, 20)])
    axes.set_xlabel(label)
    open_up(axes)
    if len(series) > 1:
        add_legend(figure, axes)
    return show_literally(figure)


def matrix(
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    texts: np.ndarray,
    *,
    cell: tuple[float, float] = (0.52, 0.52),
) -> tuple[Figure, Any]:
    """Plots shares as cells, the darker the larger, with a text in each.

    Args:
        values: The shares, of shape (rows, columns). NaN for an empty cell.
        rows: Names of the rows.
        columns: Names of the columns.
        texts: Texts of the same shape.
        cell: Width and height of a cell in inches.
    """
    names = [wrapped(name) for name in rows]
    longest = max((len(line) for name in names for line in name.split("\n")), default=0)
    across = max(cell[0] * len(columns), 1.5)  # A title of two lines has room.
    width, height = across + 0.085 * longest + 0.5, 0.75 + cell[1] * len(rows)
    figure, axes = new_figure(width, height)
    fill_matrix(axes, values, texts)
    axes.set_xticks(np.arange(len(columns)), columns)
    axes.set_yticks(np.arange(len(rows)), names)
    return show_literally(figure), axes


def fill_matrix(axes: Axes, values: np.ndarray, texts: np.ndarray) -> None:
    """Draws the cells of `matrix` and their texts."""
    from matplotlib.patches import Rectangle

    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            # The page shines through, so that the text is readable on light and on dark ones.
            place = {"alpha": 0.04 + 0.5 * float(value), "linewidth": 0}
            axes.add_patch(Rectangle((j - 0.48, i - 0.48), 0.96, 0.96, color=PALETTE[0], **place))
        axes.text(j, i, str(texts[i, j]), ha="center", va="center", fontsize=8.5)
    axes.set_xlim(-0.5, values.shape[1] - 0.5)
    axes.set_ylim(values.shape[0] - 0.5, -0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def wrapped(name: str) -> str:
    """Returns a name on several lines if it is long."""
    return "\n".join(textwrap.wrap(name, _LONGEST)) or name


def shades(count: int) -> list[tuple[float, ...]]:
    """Returns colors from dark to light, for series that have an order. All differ from a page."""
    import matplotlib as mpl

    return [mpl.colormaps["viridis"](share) for share in np.linspace(0.22, 0.88, count)]
