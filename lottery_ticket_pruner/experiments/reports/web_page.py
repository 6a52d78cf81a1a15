"""The web page of a report, in a single file."""

import base64
import importlib.resources
import io
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

import lottery_ticket_pruner
from lottery_ticket_pruner.experiments.reports import (
    contents,
    figures,
    run_folders,
    ticket_masks,
)
from lottery_ticket_pruner.experiments.reports.contents import Chart, Drawing
from lottery_ticket_pruner.experiments.reports.run_folders import Group
from lottery_ticket_pruner.experiments.reports.ticket_masks import GroupTickets


def render(all_tickets: Sequence[GroupTickets]) -> str:
    """Renders the page as HTML that needs no other file: styles and figures are included.

    Args:
        all_tickets: Groups with their tickets, from `ticket_masks.read_tickets`.
    """
    numbers = iter(range(1, 10**6))

    def drawn(chart: Chart | Drawing) -> dict[str, Any]:
        image = svg(chart.figure(), f"p{next(numbers)}", f"{chart.title}. {chart.caption}")
        return {"title": chart.title, "caption": chart.caption, "svg": image}

    groups = [of_group.group for of_group in all_tickets]
    comparisons = [drawn(chart) for chart in contents.comparisons(groups)]
    mask_charts = [drawn(chart) for chart in contents.mask_charts(all_tickets)]
    sections = []
    for of_group in all_tickets:
        group = of_group.group
        sections.append(
            {
                "title": of_group.label,
                "runs": [run.folder for run in group.runs],
                "seeds": sorted({int(seed) for seed in group.rows["seed"]}),
                "charts": [drawn(chart) for chart in contents.view_of(group).charts(group)],
                "sheets": contents.view_of(group).sheets(group),
                "layers": of_group.layers,
                "tickets": len(of_group.tickets),
                "unreadable": of_group.unreadable,
                "images": _images(group),
            }
        )
    options = list(dict.fromkeys(option for group in groups for option in group.config))
    varied = run_folders.varied_options([group.config for group in groups])
    return filled(
        "page.html",
        title=contents.title_of(groups),
        groups=groups,
        overviews=contents.overviews(groups),
        comparisons=comparisons,
        mask_sheets=ticket_masks.comparisons(all_tickets),
        mask_charts=mask_charts,
        sections=sections,
        varied=varied,
        common=[option for option in options if option not in varied],
    )


def filled(template: str, **values: Any) -> str:
    """Returns a page from a template next to this module, with the styles of all pages.

    Args:
        template: Name of the file.
        **values: Values of its variables.
    """
    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(_template),
    )
    environment.filters["value"] = run_folders.as_text
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    return environment.get_template(template).render(
        palette=list(zip(figures.PALETTE, _DARK_PALETTE, strict=True)),
        version=lottery_ticket_pruner.__version__,
        **values,
    )


def _template(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


# The colors for a dark page.
_DARK_PALETTE = (
    "#56A8E8",
    "#F28A4B",
    "#35C79A",
    "#E3A3CB",
    "#F2B84B",
    "#8FD0F5",
    "#C2A27A",
    "#A8A8A8",
)

_INK, _GRID, _MUTED = "#000000", "#b0b0b0", "#737373"


def svg(figure: Figure, prefix: str, label: str) -> str:
    """Returns a figure as an SVG element that uses the colors and font of the page.

    Args:
        figure: The figure.
        prefix: Prefix of its identifiers, to distinguish them from those of other figures.
        label: Alternative text.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    colors = {_INK: "ink", _GRID: "grid", _MUTED: "muted"}
    colors |= {color.lower(): f"c{number}" for number, color in enumerate(figures.PALETTE)}
    for color, name in colors.items():
        text = text.replace(color, f"var(--{name})")
    escaped = str(jinja2.filters.escape(label))
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _images(group: Group) -> list[tuple[str, str]]:
    """Returns images saved by runs, as pairs of name and data URL."""
    if contents.view_of(group).draws_again:  # Over all replicates.
        return []
    return [
        (
            f"{run.folder.name}/{path.name}",
            f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}",
        )
        for run in group.runs
        for path in sorted(run.folder.glob("*.png"))
    ]
