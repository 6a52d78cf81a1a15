"""The web page and the command that writes it, on made-up results with a real ticket."""

import html.parser
import io
import re
import shutil
import xml.etree.ElementTree

import keras
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("tyro")
pytest.importorskip("jinja2")

from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import report
from lottery_ticket_pruner.commands.report import ReportConfig
from lottery_ticket_pruner.experiments.reports import (
    figures,
    run_folders,
    tables,
    ticket_masks,
    web_page,
)
from made_up_runs import ROWS, write_run

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def ticket(tmp_path_factory):
    """A saved masked model with 3 of 12 and 4 of 6 weights left."""
    model = keras.Sequential(
        [keras.Input((4,)), keras.layers.Dense(3, name="a"), keras.layers.Dense(2, name="b")]
    )
    masked = ml.convert_to_masked(model)
    keep = {"a/kernel": np.arange(12) < 3, "b/kernel": np.arange(6) < 4}
    ml.set_masks(masked, {path: mask.reshape(-1, {"a": 3, "b": 2}[path[0]])
                          for path, mask in keep.items()})  # fmt: skip
    path = tmp_path_factory.mktemp("ticket") / "ticket.keras"
    masked.save(path)
    return path


NOT_GIVEN = {"control_rounds": [], "final_sparsity": None}


@pytest.fixture(scope="module")
def folder(ticket, tmp_path_factory):
    """Two runs that differ in their criterion, whose name must be escaped in HTML."""
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "one", **NOT_GIVEN)
    write_run(folder / "two", **NOT_GIVEN, strategy="<script>alert(1)</script>")
    shutil.copy(ticket, folder / "one")
    (folder / "two" / "ticket.keras").write_bytes(b"no model")
    return folder


@pytest.fixture(scope="module")
def text(folder):
    with pytest.warns(UserWarning, match=r"A ticket is left out\. '.*ticket\.keras' .* cut short"):
        return rendered(folder)


def rendered(*folders):
    groups = run_folders.groups_of(run_folders.find_runs(folders))
    return web_page.render(ticket_masks.read_tickets(groups), folders[0] / "report")


class Reader(html.parser.HTMLParser):
    """Collects elements, and checks that they are closed in their order."""

    void = ("meta", "img", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.open, self.words = [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())


def test_the_page_is_self_contained(text):
    reader = Reader(text)
    tags = [tag for tag, _ in reader.found]
    assert not {"script", "link", "iframe"} & set(tags)
    for tag, attributes in reader.found:
        for name in ("src", "href", "xlink:href"):
            # Links are only followed by a click, and lead to folders next to the page.
            allowed = ("#", "data:", "../") if tag == "a" else ("#", "data:")
            assert attributes.get(name, "#").startswith(allowed), (tag, attributes)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert "prefers-color-scheme: dark" in style
    assert 'name="viewport"' in text


def test_identifiers_are_unique_and_point_somewhere(text):
    identifiers = re.findall(r'\bid="([^"]+)"', text)
    assert len(identifiers) == len(set(identifiers)) > 0
    targets = set(re.findall(r"url\(#([^)]+)\)", text)) | set(re.findall(r'href="#([^"]+)"', text))
    assert targets
    assert targets <= set(identifiers)


def test_the_page_shows_tables_pictures_options_and_layers(text):
    words = " ".join(Reader(text).words)
    for expected in (
        "2 configurations, 2 run folders",
        "Seeds 7, 8",
        "91.00 ±\N{NO-BREAK SPACE}1.41",  # the dense run
        "lowest to highest of 2 replicates",
        "Tickets compared: digits, lenet-300-100",
        "a/kernel 4 \N{MULTIPLICATION SIGN} 3 12 3 25.00%",
        "total 18 7 38.89%",
        "output rate 0.1",
        "controls random_mask",
        "control rounds all",
    ):
        assert expected in words, expected
    assert "final sparsity" not in words
    # The comparison, the weights left in each layer, the arms of both runs, and the masks.
    assert text.count("<svg") == 5
    assert "Not loaded:" in words


def test_the_page_leads_from_configurations_to_sections_and_folders(text):
    links = {attributes["href"] for tag, attributes in Reader(text).found if tag == "a"}
    sections = {attributes.get("id") for tag, attributes in Reader(text).found if tag == "section"}
    assert {"../one/", "../two/"} <= links
    inside = {link[1:] for link in links if link.startswith("#")}
    assert inside == {"configuration-1", "configuration-2"} <= sections


def test_the_pointer_shows_values(text):
    titles = re.findall(r'<g class="told" id="[^"]+"><title>([^<]+)</title>', text)
    assert "ticket, 50 % of the weights: 90.00 ± 14.14 %" in titles
    assert "a/kernel: 25.00%" in titles


def test_names_cannot_become_markup(text):
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text


def test_brackets_in_names_are_not_markup_of_the_terminal():
    sheet = tables.Sheet("[/b]", ("[red]", "[/x]"), (("[bold]", "[/y]"),), 1, "[/note]")
    console = Console(file=io.StringIO(), width=80)
    console.print(sheet.table())
    for text in ("[/b]", "[red]", "[/x]", "[bold]", "[/y]", "[/note]"):
        assert text in console.file.getvalue()


def test_pictures_take_the_colors_of_the_page():
    rows = pd.DataFrame(ROWS)
    figure = figures.line_figure(figures.arm_lines(rows), dense=[0.9])
    image = web_page.svg(figure, "p1", 'a "label" <here>')
    root = xml.etree.ElementTree.fromstring(image)
    assert root.get("aria-label") == 'a "label" <here>'
    assert root.get("width") is None
    texts = {
        "".join(element.itertext()).strip() for element in root.iter() if "text" in element.tag
    }
    assert {"ticket", "random mask", "dense, 90.00 %", "50 %"} <= texts
    assert {"test accuracy (log scale of the error)", "weights remaining (log scale)"} <= texts
    assert "var(--c0)" in image
    assert "var(--ink)" in image
    assert "#0072b2" not in image
    assert "#000000" not in image


def test_the_command_writes_page_pictures_and_rows(folder, tmp_path, capsys):
    for name in ("picture-4.png", "picture-mine.png", "report.html"):
        (tmp_path / name).write_bytes(b"of an earlier report")
    assert cli.main(["report", str(folder / "one"), "--out", str(tmp_path)]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "91.00±1.41" in printed
    assert "digits, lenet-300-100, large_final" in printed
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        *("picture-1-weights-by-layer.png", "picture-2-accuracy.png", "picture-3-masks.png"),
        *("picture-mine.png", "report.html", "results.csv", "tables.md"),
    ]
    assert "a/kernel 12 3 25.00%" in printed
    markdown = (tmp_path / "tables.md").read_text()
    assert "| dense | 100.00% | 91.00 ± 1.41 |" in markdown
    assert "| a/kernel | 12 | 3 | 25.00% |" in markdown
    assert markdown.startswith("# Lottery tickets: digits, lenet-300-100\n\n")
    assert "On average" not in markdown
    assert "No ticket is as accurate as the dense network (91.00 ± 1.41 %)" in markdown
    picture = tmp_path / "picture-2-accuracy.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    rows = pd.read_csv(tmp_path / "results.csv")
    assert len(rows) == len(ROWS)
    assert set(rows["data"] + rows["network"] + rows["strategy"]) == {
        "digitslenet-300-100large_final"
    }


def test_quiet_reports_print_nothing_and_are_written_next_to_the_runs(ticket, tmp_path, capsys):
    write_run(tmp_path / "runs" / "one")
    for _ in range(2):  # the folder of the report is not a run
        assert cli.main(["report", str(tmp_path / "runs"), "--quiet"]) == 0
    assert (tmp_path / "runs" / "report" / "report.html").is_file()
    assert capsys.readouterr().out == ""


def test_folders_that_are_not_runs_are_errors(tmp_path, capsys):
    for arguments, message in (
        ([str(tmp_path)], "neither a run folder"),
        ([str(tmp_path / "none")], "There is no folder"),
    ):
        assert cli.main(["report", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "Traceback" not in error
    with pytest.raises(ValueError, match="at least one run folder"):
        report.write_report(ReportConfig(()))


def test_results_without_rounds_are_drawn_by_their_choices(tmp_path):
    """Figures of untrained masks: one for each treatment, with a line for each criterion."""
    rows = [
        {"criterion": c, "weights": w, "dwr": d, "sparsity": s, "replicate": r,
         "test_accuracy": 0.5 + 0.1 * s + 0.01 * r + (0.2 if c == "large_final" else 0)}
        for c in ("large_final", "random", "movement")
        for w in ("initial", "signed_constant")
        for d in (True, False)
        for s in (0.2, 0.6)
        for r in (0, 1)
    ]  # fmt: skip
    write_run(tmp_path / "grid", rows, strategy=None)
    (group,) = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [title for title, _, _ in figures.charts(group.rows)] == [
        "weights initial, rescaled",
        "weights initial, not rescaled",
        "weights signed_constant, rescaled",
        "weights signed_constant, not rescaled",
    ]
    _, lines, _ = figures.charts(group.rows)[0]
    assert [line.label for line in lines] == ["large_final", "random", "movement"]
    assert sorted(lines[0].x) == pytest.approx([40, 80])
    at_40 = lines[0].samples[np.argmin(lines[0].x)]
    assert at_40 == pytest.approx((0.76, 0.77))
    # Nine bands would hide each other, so there are only means, which the caption says.
    for count, start in ((8, "Bands: lowest"), (9, "Means of 2 replicates")):
        many = figures.with_looks([lines[0]] * count)
        bands = figures.line_figure(many).axes[0].collections
        ends = [band.get_paths()[0].vertices for band in bands]
        heights = [np.ptp(points[points[:, 0] == points[0, 0], 1]) for points in ends]
        assert [height > 0.9 for height in heights] == [count == 8] * count
        assert figures.describe_spread(many).startswith(start)
    sheet = tables.best_sheet(group.rows)
    assert sheet.headings[:3] == ("criterion", "initial, rescaled", "initial")
    assert sheet.lines[0] == ("large_final", *["76.50 ± 0.71 at 40%"] * 4)
    assert "| large_final | 76.50 ± 0.71 at 40% |" in sheet.markdown()
    assert [line[0] for line in sheet.lines] == ["large_final", "random", "movement"]
    text = rendered(tmp_path)
    Reader(text)
    assert text.count("<svg") == 8  # Lines and cells of each.
    sentence = "best mask reaches 76.50_±_0.71_% test accuracy with 40_% of the weights (criterion"
    sentence = sentence.replace("_", "\N{NO-BREAK SPACE}")
    assert sentence in text


def test_results_by_epoch_have_epochs_below(tmp_path):
    rows = [
        {"kind": "bernoulli", "epoch": e, "replicate": 0, "test_accuracy": 0.8 + 0.01 * e}
        for e in (1, 2, 3)
    ]
    write_run(tmp_path / "learned", rows)
    (group,) = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    ((_, (line,), x_label),) = figures.charts(group.rows)
    assert (line.label, line.x, x_label) == ("bernoulli", (1, 2, 3), "epoch")
    assert tables.best_sheet(group.rows).lines == (("bernoulli", "83.00", "3"),)
    assert figures.line_figure([line], x_label=x_label).axes[0].get_xscale() == "linear"
