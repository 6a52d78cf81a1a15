"""The files that the commands write into their folders; all others there are a user's own."""

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from lottery_ticket_pruner.experiments.results import CONFIG_FILE, RESULTS_FILE, SWEEP_FILE
from lottery_ticket_pruner.supermasks import WEIGHTS
from lottery_ticket_pruner.tickets import CONTROLS

# Marks a folder that another one is about to replace, or has replaced.
REPLACED = ".replaced"
# What runs of the earlier versions of two commands kept beside their results.
EARLIER_STATE = "state.json"

_ARMS = "|".join(("ticket", *CONTROLS))
# Paths from the folder, as regular expressions. What a user may have put beside them, such as a
# served/2 or masks with names of their own, fits none of these.
_RESULTS = {
    "run": (
        re.escape(RESULTS_FILE),
        r"accuracy\.png",
        r"ticket(-\d+)?\.keras",
        rf"logs/({_ARMS})-\d+/events\.out\.tfevents\.[^/]*",
        r"rounds/\d+/(state\.json|(masks|model|pruner)-\d+\.npz)",
        r"served/1/(saved_model|fingerprint)\.pb",
        r"served/1/variables/variables\.(index|data-[\d-]+of-\d+)",
        r"served/1/(assets/weights\.mlsp|assets\.extra/sparsity\.json)",
    ),
    "supermask": (
        re.escape(RESULTS_FILE),
        re.escape(EARLIER_STATE),
        r"(curves-\d+|heat-map)\.png",
        rf"supermask-({'|'.join(WEIGHTS)})-(plain|rescaled)(-[\d.e+-]+)?-\d+\.keras",
    ),
    "instability": (
        *map(re.escape, (RESULTS_FILE, EARLIER_STATE)),
        r"lines\.csv",
        r"instability\.png",
    ),
    "sweep": (re.escape(RESULTS_FILE),),
}
_OF_ALL = (
    *map(re.escape, (CONFIG_FILE, SWEEP_FILE, REPLACED)),
    r"output\.log",
    # What `lottery-ticket report` makes of them.
    r"report/(report\.html|tables\.md|results\.csv|picture-\d+\.png)",
    r"(rounds/\d+/)?(\.lock(\.json)?|\.[^/]+\.\d+\.part)",
)
# The folder of a run within that of a sweep: data set, network and what else, and a digest.
_CHILD = r"[^/]+-[0-9a-f]{8}"


def _fitting(patterns: tuple[str, ...], prefix: str = "") -> re.Pattern[str]:
    return re.compile(f"{prefix}(?:{'|'.join(patterns)})")


def results_in(folder: Path, command: str) -> list[Path]:
    """The files of results in the folder of a command, configuration and logs left out."""
    fits = _fitting(_RESULTS[command])
    return [folder / name for name in _files(folder) if fits.fullmatch(name.as_posix())]


def others_in(folder: Path, command: str | None) -> list[Path]:
    """The files in the folder of a command that it has not written, as paths from there.

    Args:
        folder: The folder.
        command: `run`, `supermask`, `instability`, or `sweep` for both kinds of sweeps. None: not
            known, so that results count as a user's own.
    """
    fits = [_fitting((*_RESULTS.get(command, ()), *_OF_ALL))]
    if command == "sweep":
        of_runs = (*_RESULTS["run"], *_RESULTS["supermask"], *_OF_ALL)
        fits.append(_fitting(of_runs, f"{_CHILD}/"))
    return [
        name
        for name in _files(folder)
        if not any(pattern.fullmatch(name.as_posix()) for pattern in fits)
    ]


def move_others(old: Path, new: Path, command: str | None) -> list[Path]:
    """Moves what a command has not written from its folder to the one that replaces it.

    Returns:
        Where the files are now, as paths from the new folder. One whose name is taken there has
        `.old` at its end.
    """
    moved = []
    for name in others_in(old, command):
        target = new / name
        while os.path.lexists(target):
            target = target.with_name(f"{target.name}.old")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(old / name, target)
        moved.append(target.relative_to(new))
    return moved


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder, and links to folders, as paths from there, in order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name).relative_to(folder) for name in sorted([*names, *links]))
