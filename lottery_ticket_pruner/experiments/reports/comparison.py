"""The page of a comparison of models."""

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from lottery_ticket_pruner import pictures
from lottery_ticket_pruner.compression import ModelComparison
from lottery_ticket_pruner.experiments.reports import web_page
from lottery_ticket_pruner.experiments.reports.tables import Sheet
from lottery_ticket_pruner.wording import signed


def page(found: ModelComparison, options: Mapping[str, Any]) -> str:
    """Returns a comparison as a web page in a single file.

    Args:
        found: The comparison.
        options: Options to show below it.
    """
    headings, *lines = found.cells()
    unit = ", in points" if found.in_points else ""
    note = f"{found.examples} test examples. Differences are those from the first model{unit}."
    sheet = Sheet("Models compared", headings, tuple(lines), 1, note)
    charts = []
    if any(row["low"] is not None for row in found.rows):
        title = f"Difference of the {found.metric} from {found.rows[0]['model']}"
        caption = "With 95 % intervals over samples of test examples."
        image = web_page.svg(differences(found), "p1", title)
        charts = [{"title": title, "caption": caption, "svg": image}]
    return web_page.filled(
        "models.html",
        kind="Compared",
        title=", ".join(row["model"] for row in found.rows),
        conclusion=conclusion(found),
        cautions=found.notes,
        notes=(),
        sheets=[sheet],
        charts=charts,
        options=options,
        anchors={},
        sections=[],
    )


def conclusion(found: ModelComparison) -> str:
    """Returns which models differ from the first one, in a sentence."""
    sides: dict[str, list[str]] = {"above": [], "below": [], "around": []}
    for row in found.rows[1:]:
        if row["low"] is not None:
            side = "above" if row["low"] > 0 else "below" if row["high"] < 0 else "around"
            sides[side].append(row["model"])
    texts = [
        f"{side} zero for {', '.join(models)}"
        if side != "around"
        else f"on both sides of zero for {', '.join(models)}"
        for side, models in sides.items()
        if models
    ]
    if not texts:
        return ""
    first = found.rows[0]["model"]
    return f"The 95 % interval of the difference of the {found.metric} from {first} is " + (
        f"{'; '.join(texts)}."
    )


def differences(found: ModelComparison) -> Figure:
    """Plots the difference of each model from the first one, with its interval.

    Differences of accuracies are in points, as in the table.
    """
    rows = [row for row in found.rows if row["low"] is not None]
    scale, form, unit = (100, ".2f", " points") if found.in_points else (1, ".4f", "")
    figure, axes = pictures.new_figure(4.8, 0.9 + 0.34 * len(rows))
    axes.axvline(0, color=pictures.MUTED, linewidth=1.2, linestyle=(0, (5, 3)))
    for place, row in enumerate(rows):
        middle, low, high = (scale * row[name] for name in ("difference", "low", "high"))
        axes.plot([low, high], [place] * 2, color=pictures.PALETTE[0], linewidth=2)
        axes.plot(middle, place, "o", color=pictures.PALETTE[0])
        middle_text, *ends = (signed(value, form) for value in (middle, low, high))
        text = f"{row['model']}: {middle_text}{unit} ({' to '.join(ends)})"
        pictures.add_target(axes, middle, place, text)
    axes.set_yticks(range(len(rows)), [pictures.wrapped(row["model"]) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel(f"difference of the {found.metric}{',' * found.in_points}{unit}")
    pictures.open_up(axes, "x")
    return figure
