"""The code of the documentation's pages, found and run as it stands."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[2] / "docs"


def blocks(page):
    """The label (as `here` in a line `here:` right before it, or empty) and code of each block."""
    text = (DOCS / page).read_text("utf-8")
    return re.findall(r"(?:^(\w+):\n\n)?^```python\n(.*?)^```$", text, re.M | re.S)


def run(page, code, names):
    """Runs code of a page in a namespace, which it changes."""
    exec(compile(code, page, "exec"), names)
    return names
