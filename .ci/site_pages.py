"""Hooks of MkDocs: notebooks with their outputs and the changelog as pages; names in tables."""

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Replaces every notebook by a page in Markdown, and adds the changelog."""
    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            text = as_markdown(json.loads(Path(str(file.abs_src_path)).read_text("utf-8")))
            files.remove(file)
            name = file.src_uri.removesuffix(".ipynb") + ".md"
            files.append(File.generated(config, name, content=text))
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    # Its links begin at the folder above `docs`.
    changes = re.sub(r"(\[|\]\()docs/", r"\1", changes)
    files.append(File.generated(config, "changelog.md", content=changes))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Lets links to notebooks, which the repository's readers follow, lead to their pages."""
    return re.sub(r"(\]\([^):]*)\.ipynb\)", r"\1.md)", markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Lets names in tables continue on the next line after `_`, `.` and the like, not anywhere."""
    return re.sub(
        r"<td.*?</td>",
        lambda cell: re.sub(r"(?<=<code>)[^<]+", _breakable, cell[0]),
        html,
        flags=re.S,
    )


def _breakable(code: re.Match[str]) -> str:
    return re.sub(r"[_.(=/](?=\w)", r"\g<0><wbr>", code[0])


def as_markdown(notebook: dict[str, Any]) -> str:
    """Returns the cells of a notebook and their outputs in Markdown."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else _fenced("python", source))
        parts += map(_output, cell.get("outputs", ()))
    return "\n\n".join(parts)


def _output(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    texts = {kind: "".join(value) for kind, value in data.items()}
    if "image/png" in texts:
        return f'<img alt="Picture" src="data:image/png;base64,{texts["image/png"].strip()}">'
    if "text/html" in texts:  # A table of pandas, which brings styles of its own.
        table = re.sub(r"<style.*?</style>", "", texts["text/html"], flags=re.S)
        table = re.sub(r"<table[^>]*>", "<table>", table)
        return "\n".join(filter(str.strip, table.splitlines()))
    return _fenced("text", texts["text/plain"])


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
