"""Checks the sizes of modules, functions and tests: `python .ci/limits.py`, part of `tox -e lint`.

Modules and functions above a limit are listed with their exact sizes, so that the list can only
shrink: any other size fails, and so does an entry that is no longer needed.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = {"lines of a module": 600, "lines of a body": 60, "parameters": 12}
LIMITS = {
    "_lottery_ticket": CODE,
    "masked_layers": CODE,
    "lottery_ticket_pruner": CODE,
    "tests": {"lines of a module": 500},
}
# Public functions with flat signatures for users. The list may only shrink.
LARGER = {
    ("lottery_ticket_pruner/tickets.py:find_ticket", "parameters"): 28,
    ("lottery_ticket_pruner/learned.py:learn_supermask", "parameters"): 16,
    ("lottery_ticket_pruner/training/loops.py:train", "parameters"): 14,
    ("lottery_ticket_pruner/training/loops.py:fit", "parameters"): 15,
}


def sizes(path: Path) -> Iterator[tuple[str, str, int]]:
    """Yields (place, kind, size) for a module and each of its functions."""
    place = path.relative_to(ROOT).as_posix()
    text = path.read_text("utf-8")
    yield place, "lines of a module", len(text.splitlines())
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) is not None else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            arguments = node.args
            names = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
            count = sum(name.arg not in ("self", "cls") for name in names)
            yield f"{place}:{node.name}", "lines of a body", lines
            yield f"{place}:{node.name}", "parameters", count


def main() -> int:
    """Prints the places above a limit and entries that are no longer needed."""
    faults, needed = [], set()
    for folder, limits in LIMITS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            for place, kind, size in sizes(path):
                if kind in limits and size > limits[kind]:
                    needed.add((place, kind))
                    allowed = LARGER.get((place, kind), limits[kind])
                    if size != allowed:
                        faults.append(f"{place}: {size} {kind}; the limit or entry is {allowed}")
    faults += [
        f"{place}: {kind} are within the limit; remove the entry from .ci/limits.py"
        for place, kind in LARGER.keys() - needed
    ]
    print("\n".join(faults) or "Sizes are within their limits.")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
