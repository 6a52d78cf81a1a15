"""Finds and runs the code in the pages of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page):
    """Returns label and code of each block. The label is `here` after a line `here:`, or empty."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(r"(?:^(\w+):\n\n)?^```python\n(.*?)^```$", text, re.M | re.S)


def run(page, code, names):
    """Runs the code of a page in a namespace, which it changes."""
    exec(compile(code, page, "exec"), names)
    return names
