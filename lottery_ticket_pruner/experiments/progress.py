"""The bar that the commands show while they work, with the time that is left."""

import rich.progress
from rich.console import Console

STEPS = "{task.completed:.0f} of {task.total:.0f} steps"


def bar(console: Console, count: str = STEPS, period: float = 30.0) -> rich.progress.Progress:
    """A bar that leaves nothing behind.

    Args:
        console: Where it is shown.
        count: What is said of how far a task is, in rich's fields of a task.
        period: Seconds to look back for the speed.
    """
    return rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(),
        rich.progress.TextColumn(count),
        rich.progress.TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=period,
    )
