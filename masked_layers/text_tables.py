"""Tables and lists of text, for reports that are printed and for messages."""

from collections.abc import Collection, Sequence


def aligned(lines: Sequence[Sequence[str]], left: Collection[int]) -> list[str]:
    """Returns the lines of a table whose columns have equal widths.

    Args:
        lines: Cells of each line, the heading first.
        left: Numbers of the columns that are aligned to the left. Others are aligned to the right.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def shortened(items: Sequence[object], most: int) -> str:
    """Returns the first items as text, at most a number of them, and how many more there are."""
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(map(str, items[:most])) + more
