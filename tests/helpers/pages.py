"""Finds and runs the code in the pages of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"
README = DOCS.parent / "README.md"
PAGES = sorted([README, *DOCS.rglob("*.md")])

# A block, with the label `here` after a line `here:`, or the reason why it is not run.
_BLOCK = re.compile(
    r"(?:^(?:(?P<label>\w+):\n|<!-- not run: (?P<reason>[^\n]+) -->)\n)?"
    r"^```python\n(?P<code>.*?)^```$",
    re.M | re.S,
)


def _text(page):
    return (DOCS / page).read_text("utf-8")


def blocks(page):
    """Returns label and code of each block that can be run. Without a label, it is empty."""
    found = _BLOCK.finditer(_text(page))
    return [(block["label"] or "", block["code"]) for block in found if not block["reason"]]


def code_of(page):
    """Returns the code of each block that can be run."""
    return [code for _, code in blocks(page)]


def unmarked(page):
    """Returns the first lines of blocks in Python that `blocks` does not see."""
    text = _text(page)
    fences = re.findall(r"^[ >]*(?:```|~~~) *((?:python|py)\b.*)$", text, re.M)
    return [fence for fence in fences if fence != "python"] + ["?"] * (
        len(fences) - len(_BLOCK.findall(text))
    )


def run(page, code, names):
    """Runs the code of a page in a namespace, which it changes."""
    exec(compile(code, page, "exec"), names)
    return names


def run_all(page, names):
    """Runs all code of a page in order."""
    for code in code_of(page):
        run(str(page), code, names)
    return names
