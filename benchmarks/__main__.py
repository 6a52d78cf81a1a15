"""Compares this library with its peers and its performance goals; prints and saves one table.

    python -m benchmarks [NAME ...] [--quick] [--out FOLDER] [--markdown FILE]

Every contender runs in a separate process, and the contenders of a comparison take turns. A ratio
is the median of the ratios of all rounds; the parentheses contain the smallest and the largest.
Peers that are not installed are reported.
"""

import argparse
import datetime
import os
import sys
from pathlib import Path

from rich.console import Console

from benchmarks import report
from benchmarks.plan import BENCHMARKS

# Not run by default, because it needs a GPU.
GPU = "gpu"


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmarks; returns 1 if a goal was missed or a contender failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="benchmarks:\n"
        + "\n".join(f"  {name:12}{make.__doc__}" for name, make in BENCHMARKS.items()),
    )
    default = [name for name in BENCHMARKS if name != GPU]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: {' '.join(default)}")
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: tests that everything runs, not speed"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("runs/benchmarks"),
        metavar="FOLDER",
        help="folder for results.json and results.md (default: %(default)s)",
    )
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="document in which to replace the table between the markers `<!-- benchmarks all -->` "
        "and `<!-- end of benchmarks all -->` (with gpu instead of all if only `gpu` is run)",
    )
    options = parser.parse_args(arguments)
    names = options.names or default
    if unknown := set(names) - BENCHMARKS.keys():
        parser.error(f"unknown benchmarks: {sorted(unknown)}; known: {list(BENCHMARKS)}")
    table = "gpu" if names == [GPU] else "all"
    if options.markdown:
        if options.quick or (table == "all" and set(names) != set(default)):
            parser.error("--markdown needs all benchmarks or only `gpu`, without --quick")
        # Checks the document before the work.
        report.between(options.markdown.read_text(), table, "")

    # Output that does not go to a terminal may have longer lines.
    console = Console(width=None if sys.stdout.isatty() else 180)
    about = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "quick": options.quick,
        "machine": report.machine(),
        "versions": report.versions(),
    }
    load = [os.getloadavg()[0]]
    rows = []
    failed = False
    for name in names:
        for group in BENCHMARKS[name](options.quick):
            try:
                found = list(group.rows(name))
            except RuntimeError as error:
                failed = True
                console.print(f"{name}: {error}", markup=False, highlight=False)
                continue
            rows += found
            for row in found:
                console.print(" | ".join(cell for cell in row.cells() if cell), highlight=False)
    about["load"] = [*load, os.getloadavg()[0]]

    console.print(report.table(rows))
    console.print(report.sentence(about))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.json").write_text(report.as_json(rows, about))
    (options.out / "results.md").write_text(report.markdown(rows, about))
    if options.markdown and not failed:
        text = report.between(options.markdown.read_text(), table, report.markdown(rows, about))
        options.markdown.write_text(text)
    return int(failed or any(row.met is False for row in rows))


if __name__ == "__main__":
    sys.exit(main())
