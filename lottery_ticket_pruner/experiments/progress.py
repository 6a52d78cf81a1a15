"""The console of the commands, and their progress bar with the remaining time."""

import rich.progress
from rich.console import Console

STEPS = "{task.completed:.0f} of {task.total:.0f} steps"


def console(*, quiet: bool = False) -> Console:
    """Creates a console that shows names as they are: with emoji, `file.py:fire:` would be one."""
    return Console(quiet=quiet, emoji=False)


def say(console: Console, text: str) -> None:
    """Prints a text as it is. Its lines are not broken, because a path in them may be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def bar(console: Console, count: str = STEPS, period: float = 30.0) -> rich.progress.Progress:
    """Creates a progress bar that disappears at the end.

    Args:
        console: Console that shows the bar.
        count: Format of the progress of a task, with rich's fields of a task.
        period: Number of seconds over which the speed is averaged.
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
