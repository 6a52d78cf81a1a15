"""The web page of a report, in a single file."""

import importlib.resources
import io
import itertools
import os
import re
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
from matplotlib.figure import Figure

import lottery_ticket_pruner
from lottery_ticket_pruner import pictures
from lottery_ticket_pruner.experiments.reports import (
    contents,
    run_folders,
    ticket_masks,
)
from lottery_ticket_pruner.experiments.reports.contents import Picture
from lottery_ticket_pruner.experiments.reports.ticket_masks import GroupTickets


def render(all_tickets: Sequence[GroupTickets], out: Path | None = None) -> str:
    """Renders the page as HTML that needs no other file: styles and figures are included.

    Args:
        all_tickets: Groups with their tickets, from `ticket_masks.read_tickets`.
        out: Folder of the page, from which it links to the folders of runs. None for no links.
    """
    numbers = itertools.count(1)

    def drawn(chart: Picture) -> dict[str, Any]:
        image = svg(chart.figure(), f"p{next(numbers)}", f"{chart.title}. {chart.caption}")
        return {"title": chart.title, "caption": chart.caption, "svg": image}

    groups = [of_group.group for of_group in all_tickets]
    sections = []
    for number, of_group in enumerate(all_tickets, 1):
        group = of_group.group
        pictures_of = [*contents.view_of(group).charts(group), *contents.portraits_of(of_group)]
        sections.append(
            {
                "title": of_group.label,
                "anchor": f"configuration-{number}",
                "conclusion": contents.conclusion_of(group),
                "runs": [(run.folder, _link(run.folder, out)) for run in group.runs],
                "seeds": sorted({int(seed) for seed in group.rows["seed"]}),
                "charts": [drawn(chart) for chart in pictures_of],
                "sheets": contents.view_of(group).sheets(group),
                "layers": of_group.layers,
                "tickets": len(of_group.tickets),
                "unreadable": of_group.unreadable,
            }
        )
    options = list(dict.fromkeys(option for group in groups for option in group.config))
    varied = run_folders.varied_options([group.config for group in groups])
    return filled(
        "page.html",
        title=contents.title_of(groups),
        groups=groups,
        conclusion=contents.comparison_of(groups),
        overviews=contents.overviews(groups),
        comparisons=list(map(drawn, contents.comparisons(groups))),
        mask_sheets=ticket_masks.comparisons(all_tickets),
        mask_charts=list(map(drawn, contents.mask_charts(all_tickets))),
        sections=sections,
        anchors={section["title"]: section["anchor"] for section in sections},
        varied=varied,
        common=[option for option in options if option not in varied],
    )


def _link(folder: Path, out: Path | None) -> str:
    """Returns the address of a folder as seen from the page. Empty without one."""
    if out is None:
        return ""
    try:
        relative = os.path.relpath(folder, out)
    except ValueError:  # On another drive of Windows.
        return ""
    return urllib.parse.quote(f"{Path(relative).as_posix()}/")


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
    environment.filters["value_of"] = lambda value, option: run_folders.option_text(option, value)
    environment.filters["unbroken"] = unbroken
    environment.filters["options"] = _with_whole_options
    environment.filters["deviation"] = lambda cell: str(cell).replace("± ", "±\N{NO-BREAK SPACE}")
    environment.filters["words"] = lambda name: str(name).replace("_", " ")
    return environment.get_template(template).render(
        palette=list(zip(pictures.PALETTE, pictures.DARK_PALETTE, strict=True)),
        version=lottery_ticket_pruner.__version__,
        **values,
    )


def unbroken(text: str) -> str:
    """Returns a text in which no line breaks between a number and its unit."""
    return re.sub(r"(?<=\d) (?=%|±|points?\b)|(?<=±) (?=\d)", "\N{NO-BREAK SPACE}", text)


def _with_whole_options(text: str) -> str:
    """Returns a text as HTML in which no line breaks within an option such as `--macs`."""
    escaped = str(jinja2.filters.escape(text))
    return re.sub(r"--[a-z][a-z-]*", r'<span class="whole">\g<0></span>', escaped)


def _template(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def svg(figure: Figure, prefix: str, label: str) -> str:
    """Returns a figure as an SVG element that uses the colors and font of the page.

    Args:
        figure: The figure.
        prefix: Prefix of its identifiers, to distinguish them from those of other figures.
        label: Alternative text.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        pictures.show_literally(figure).savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = _with_titles(text)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = text.replace("url(#", f"url(#{prefix}-").replace('href="#', f'href="#{prefix}-')
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 var(--font)", text)
    # Wide figures scroll where their texts would be too small, and narrow ones do not grow.
    width = 72 * figure.get_figwidth()
    size = f"min-width: {min(0.95 * width, 900):.0f}px; max-width: {1.9 * width:.0f}px"
    size = size if width > 400 else f"max-width: {1.9 * width:.0f}px"
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="{size}"', text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    colors = {pictures.INK: "ink", pictures.GRID: "grid", pictures.MUTED: "muted"}
    colors |= {color.lower(): f"c{number}" for number, color in enumerate(pictures.PALETTE)}
    for color, name in colors.items():
        text = text.replace(color, f"var(--{name})")
    escaped = str(jinja2.filters.escape(label))
    return text.replace("<svg", f'<svg role="img" aria-label="{escaped}"', 1)


def _with_titles(text: str) -> str:
    """Turns texts for a pointer (`pictures.tell`) into titles, which browsers show."""
    numbers = iter(range(text.count(pictures.TOLD)))
    return re.sub(
        rf'<g id="{pictures.TOLD}([^"]*)">',
        lambda told: f'<g class="told" id="told-{next(numbers)}"><title>{told[1]}</title>',
        text,
    )
