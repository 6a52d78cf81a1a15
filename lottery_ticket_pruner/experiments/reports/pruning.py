"""The page and the model card of a model that was pruned to a tolerance."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

import masked_layers as ml
from lottery_ticket_pruner import pictures
from lottery_ticket_pruner.compression import Findings, verdict_of
from lottery_ticket_pruner.experiments.reports import web_page
from lottery_ticket_pruner.experiments.reports.figures import WEIGHTS, weights_axis
from lottery_ticket_pruner.experiments.reports.tables import Sheet
from lottery_ticket_pruner.tolerances import is_within

_SHOWN = 10  # Indices of examples in a line.
# Multiples of the tolerance that are shown below the least that is accepted.
_SHOWN_BEYOND = 4


@dataclasses.dataclass(frozen=True)
class Facts:
    """Facts that a report shows besides the result.

    Attributes:
        name: Name of the model.
        data: Name of the data.
        counts: Number of examples of each part.
        dense_sizes: Number of entries of each kernel of the dense model by path.
        kept_sizes: Number of kept entries of each kernel of the result by path.
        served: Bytes of the pruned and of the dense model as served, or None if there is no folder.
        latencies: Milliseconds of a call of the pruned and of the dense model as served, with one
            example, or None if they were not measured.
        labels: Class of each test example, or None.
        options: All options of the command.
    """

    name: str
    data: str
    counts: Mapping[str, int]
    dense_sizes: Mapping[str, int]
    kept_sizes: Mapping[str, int]
    served: tuple[int, int] | None
    latencies: tuple[float, float] | None
    labels: Sequence[int] | None
    options: Mapping[str, Any]


def kernel_sizes(model: keras.Model) -> dict[str, int]:
    """Returns the number of entries that each kernel of a model has or, with a mask, keeps."""
    return {
        ref.path: int(np.prod(ref.variable.shape))
        if ref.mask is None
        else int(ref.mask.to_numpy().sum())
        for ref in ml.weight_refs(model)
    }


def sheets(result: Findings, facts: Facts) -> list[Sheet]:
    """Returns the tables of a report: attempts, test, layers, and classes if there are any."""
    return [
        _summary(result, facts),
        _attempts(result),
        _layers(facts),
        *([] if facts.labels is None else _classes(result, np.array(facts.labels))),
    ]


def page(result: Findings, facts: Facts) -> str:
    """Returns the report as a web page in a single file."""
    caption = "Each point is a model that was tried, an open one was not accepted."
    if result.tolerance is not None:
        caption += " The dashed line is the least that is accepted."
    if hidden := below_axis(result):
        which = "A much worse model is" if hidden == 1 else f"{hidden} much worse models are"
        caption += f" {which} below the axis."
    drawn = f"Validation {result.test.metric} against weights remaining"
    image = web_page.svg(_with_values(curve(result), result), "p1", drawn)
    title = f"{facts.name}, {facts.data}"
    return web_page.filled(
        "models.html",
        kind="Pruned",
        title=title,
        conclusion=result.conclusion,
        cautions=result.cautions,
        notes=[note for note in result.notes if note not in result.cautions],
        sheets=sheets(result, facts),
        charts=[
            {
                "title": drawn,
                "caption": caption,
                "svg": image,
            },
            *_scan_charts(result, facts),
        ],
        options=facts.options,
        anchors={},
        sections=[],
    )


def curve(result: Findings) -> Figure:
    """Plots the validation metric of all models that were tried against the weights left.

    Models that are worse than the tolerance by a multiple of it are below the axis, because the
    others could not be told apart otherwise.
    """
    figure, axes = pictures.new_figure(4.8, 3.4)
    rows = [row for row in result.rows if row["validation"] is not None]
    for number, method in enumerate(dict.fromkeys(row["method"] for row in rows[1:])):
        own = [row for row in rows if row["method"] == method]
        points = sorted([_beginning(method, rows), *own], key=lambda row: row["sparsity"])
        x, y = ([row[name] for row in points] for name in ("sparsity", "validation"))
        color, marker = pictures.look(number)
        left = [100 * (1 - share) for share in x]
        name = method.replace("_", " ")
        axes.plot(left, y, color=color, linewidth=1.4)
        axes.plot([], [], color=color, marker=marker, linewidth=1.4, label=name)  # In the legend.
        for accepted, face in ((True, color), (False, "none")):
            chosen = [row for row in own if (verdict_of(row) == "accepted") == accepted]
            axes.scatter(
                [100 * (1 - row["sparsity"]) for row in chosen],
                [row["validation"] for row in chosen],
                edgecolors=color,
                facecolors=face,
                marker=marker,
                zorder=3,
            )
    if result.tolerance is not None:
        axes.axhline(_least(result), color=pictures.MUTED, linestyle=(0, (5, 3)), linewidth=1.2)
    if below_axis(result):
        end = "bottom" if result.higher_is_better else "top"
        axes.set_ylim(**{end: _lowest_shown(result)})
    weights_axis(axes, [100 * (1 - row["sparsity"]) for row in rows])
    axes.set_xlabel(WEIGHTS)
    axes.set_ylabel(f"validation {result.test.metric}")
    pictures.open_up(axes)
    if len(rows) > 1:
        pictures.add_legend(figure, axes)
    return figure


def _with_values(figure: Figure, result: Findings) -> Figure:
    """Adds what was tried to the figure of `curve`, as texts for a pointer."""
    lowest = _lowest_shown(result) if below_axis(result) else None
    for row in result.rows:
        value = row["validation"]
        if value is not None and (lowest is None or not _is_worse(result, value, lowest)):
            left = 100 * (1 - row["sparsity"])
            text = f"{row['method'].replace('_', ' ')}, {left:.4g} % of the weights: {value:.4f}"
            text += f", {verdict}" if (verdict := verdict_of(row)) else ""
            pictures.add_target(figure.axes[0], left, value, text)
    return figure


def below_axis(result: Findings) -> int:
    """Returns the number of models that `curve` cannot show, because they are much worse."""
    lowest = _lowest_shown(result)
    if lowest is None:
        return 0
    values = [row["validation"] for row in result.rows if row["validation"] is not None]
    return sum(_is_worse(result, value, lowest) for value in values)


def _is_worse(result: Findings, value: float, than: float) -> bool:
    return value < than if result.higher_is_better else value > than


def _least(result: Findings) -> float:
    """Returns the value of the metric that is just accepted."""
    sign = 1 if result.higher_is_better else -1
    return float(result.rows[0]["validation"] - sign * (result.tolerance or 0.0))


def _lowest_shown(result: Findings) -> float | None:
    """Returns the value at the end of the axis if models are beyond it, or None."""
    if not result.tolerance or result.tolerance < 0:
        return None
    sign = 1 if result.higher_is_better else -1
    return _least(result) - sign * _SHOWN_BEYOND * result.tolerance


def _beginning(method: str, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Returns the row of the model that a method began with."""
    if method not in ("iterative", "channels"):
        return rows[0]
    first = next(number for number, row in enumerate(rows) if row["method"] == method)
    return max((row for row in rows[:first] if row["accepted"]), key=lambda row: row["sparsity"])


def _scan_charts(result: Findings, facts: Facts) -> list[dict[str, str]]:
    """Returns the chart of a scan of the layers, or nothing if there was none."""
    if not result.scan:
        return []
    title = "How much each kernel may lose alone"
    caption = (
        "Bars: the largest share of a kernel that was pruned alone, without training, with a drop "
        f"of at most {result.test.told.limit(result.tolerance or 0.0)} on validation data. "
        "Circles: what it lost in the result."
    )
    return [
        {
            "title": title,
            "caption": caption,
            "svg": web_page.svg(sensitivity(result, facts), "p2", title),
        }
    ]


def may_lose(scan: Sequence[Mapping[str, Any]], limit: float, dense: float) -> dict[str, float]:
    """Returns the largest sparsity of each weight alone up to which no drop is above a limit.

    Args:
        scan: The drops of weights that were pruned alone.
        limit: The largest acceptable drop.
        dense: The value of the dense model.
    """
    found: dict[str, float] = {}
    ended = set()
    for row in scan:  # From the densest on.
        found.setdefault(row["path"], 0.0)
        if not is_within(row["drop"], limit, dense):
            ended.add(row["path"])
        elif row["path"] not in ended:
            found[row["path"]] = 1 - row["density"]
    return found


def sensitivity(result: Findings, facts: Facts) -> Figure:
    """Plots how much each kernel may lose alone, and what it lost in the result."""
    dense = result.rows[0]["validation"]
    alone = may_lose(result.scan, result.tolerance or 0.0, dense)
    figure, axes = pictures.new_figure(4.8, 0.9 + 0.26 * len(alone))
    places = range(len(alone))
    axes.barh(places, list(alone.values()), color=pictures.PALETTE[0], alpha=0.4, height=0.6)
    lost = [1 - facts.kept_sizes.get(path, 0) / facts.dense_sizes[path] for path in alone]
    circles = {"edgecolors": pictures.PALETTE[1], "facecolors": "none", "linewidths": 2}
    axes.scatter(lost, places, zorder=3, **circles)
    axes.set_yticks(places, list(alone))
    axes.invert_yaxis()
    axes.set_xlim(0, 1.02)
    axes.set_xlabel("share pruned")
    axes.xaxis.set_major_formatter(PercentFormatter(1.0))
    pictures.open_up(axes, "x")
    for place, (path, share) in enumerate(alone.items()):
        text = f"{path}: may lose {share:.1%} alone, lost {lost[place]:.1%}"
        pictures.add_target(axes, lost[place], place, text)
    return figure


def card(result: Findings, facts: Facts) -> str:
    """Returns a model card in Markdown."""
    parts = ", ".join(f"{count:,} for {name}" for name, count in facts.counts.items())
    options = "\n".join(f"- `{name}`: {value}" for name, value in facts.options.items())
    files = "Files: `model.keras` (Keras, after `import masked_layers`)"
    if facts.served is not None:
        files += " and `served/1` (a SavedModel for TensorFlow Serving, which needs neither)"
    texts = [
        f"# {facts.name}, pruned",
        " ".join([result.conclusion, *result.cautions]),
        f"{files}.",
        "## Results",
        *(sheet.markdown() for sheet in sheets(result, facts)),
        "## Data",
        f"{facts.data}: {parts} examples. The validation data chose the model, the test data was "
        "used once, for the comparison above.",
        "## How it was made",
        *(f"- {note}" for note in result.notes if note not in result.cautions),
        options,
    ]
    return "\n\n".join([*texts, ""])


def _summary(result: Findings, facts: Facts) -> Sheet:
    test = result.test
    weights = sum(facts.dense_sizes.values())
    kept = sum(facts.kept_sizes.values())
    lines = [
        (f"test {test.metric}", f"{test.dense:.4f}", f"{test.pruned:.4f}"),
        ("weights of kernels", f"{weights:,}", f"{kept:,}"),
    ]
    if facts.served is not None:
        pruned, dense = facts.served
        lines.append(("bytes as served", f"{dense:,}", f"{pruned:,}"))
    if facts.latencies is not None:
        after, before = facts.latencies
        lines.append(("milliseconds per call as served, batch 1", f"{before:.3g}", f"{after:.3g}"))
    note = f"Drop: {test.told.text(test.drop)}"
    if test.interval is not None:
        note += f", 95 % interval {test.told.interval(*test.interval)}"
    note += f", {test.examples} test examples ({test.method}). {use_of_zeros(result, facts)}"
    return Sheet("Dense and pruned", ("", "dense", "pruned"), tuple(lines), 1, note.rstrip())


def use_of_zeros(result: Findings, facts: Facts) -> str:
    """Returns what zeros save and do not, if the result has kernels with zeros, or nothing."""
    has_zeros = sum(facts.kept_sizes.values()) < sum(facts.dense_sizes.values())
    if not has_zeros or any(r["method"] == "channels" and r["accepted"] for r in result.rows):
        return ""
    place = "" if facts.served is None else " (served/1)"
    return (
        f"Zeros save bytes where they are exported sparsely{place}, but no time on ordinary dense "
        "kernels: for a faster model, ask for --macs or --latency, which remove channels."
    )


def _attempts(result: Findings) -> Sheet:
    headings, *lines = result.cells()
    return Sheet("Models that were tried", headings, tuple(lines), 2, " ".join(result.remarks))


def _layers(facts: Facts) -> Sheet:
    kept = facts.kept_sizes
    lines = tuple(
        (path, f"{size:,}", f"{kept.get(path, 0):,}", f"{kept.get(path, 0) / size:.2%}")
        for path, size in facts.dense_sizes.items()
        if size
    )
    return Sheet("Kernels", ("weight", "dense", "kept", "left"), lines, 1)


def _classes(result: Findings, labels: np.ndarray) -> list[Sheet]:
    worse, better = (np.array(found, int) for found in (result.test.worse, result.test.better))
    if not len(worse) + len(better):
        return []
    lines = []
    for label in np.unique(labels):
        counts = [int(np.sum(labels[found] == label)) for found in (worse, better)]
        lines.append(
            (
                str(label),
                str(int(np.sum(labels == label))),
                *map(str, counts),
                _places(worse, labels, label),
            )
        )
    headings = ("class", "examples", "became wrong", "became right", "which became wrong")
    note = "Test examples that only one of the two models gets right, by their index."
    return [Sheet("Changes by class", headings, tuple(lines), 1, note)]


def _places(indices: np.ndarray, labels: np.ndarray, label: Any) -> str:
    found: Sequence[int] = indices[labels[indices] == label].tolist()
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return ", ".join(map(str, found[:_SHOWN])) + more
