"""Files that the commands write into their folders. All other files belong to the user."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from lottery_ticket_pruner.experiments import catalogue
from lottery_ticket_pruner.experiments.results import (
    CONFIG_FILE,
    PARTS_FILE,
    RESULTS_FILE,
    SWEEP_FILE,
)
from masked_layers.checksums import SUMS_FILE
from masked_layers.text_tables import shortened

# Marks a folder that another one is about to replace, or has replaced.
REPLACED = ".replaced"
# Folder in that of a run with the runs of its seeds, if these are jobs of their own.
SEEDS_FOLDER = ".seeds"
# Files that runs of earlier versions of two commands wrote next to their results.
EARLIER_STATE = "state.json"

# Maximum number of files that a message names.
SHOWN = 5

# Name of a picture of `lottery-ticket report`. In earlier versions, it was only a number.
PICTURE = r"picture-\d+(-[a-z0-9-]+)?\.png"

# Regular expressions for paths in the folder, next to those of `catalogue`.
_OF_ALL = (
    *map(re.escape, (CONFIG_FILE, SWEEP_FILE, PARTS_FILE, REPLACED)),
    r"output\.log",
    r"optuna\.log(\.lock)?",  # Trials of a sweep.
    r"\.cluster-[0-9a-f]{8}|\.starts\.json(\.new)?|\.slurm/.*",  # Of sweeps on a cluster.
    rf"{re.escape(SEEDS_FOLDER)}/.*",
    # Written by `lottery-ticket report`.
    rf"report/(report\.html|tables\.md|results\.csv|{PICTURE})",
    r"(rounds/\d+/)?(\.lock(\.json)?|\.[^/]+\.\d+\.part)",
)
# Folder of a run in a sweep: data set, network, other options, and a digest.
_CHILD = r"[^/]+-[0-9a-f]{8}"


def _fitting(patterns: tuple[str, ...], prefix: str = "") -> re.Pattern[str]:
    return re.compile(f"{prefix}(?:{'|'.join(patterns)})")


def _results_of(command: str) -> tuple[str, ...]:
    files = () if command == "sweep" else catalogue.kind_of(command).files
    return (re.escape(RESULTS_FILE), SUMS_FILE, *files)


def results_in(folder: Path, command: str) -> list[Path]:
    """Returns the files of results in the folder of a command, without configuration and logs."""
    fits = _fitting(_results_of(command))
    return [folder / name for name in _files(folder) if fits.fullmatch(name.as_posix())]


def others_in(folder: Path, command: str | None) -> list[Path]:
    """Returns the files in the folder of a command that it has not written, as relative paths.

    Args:
        folder: The folder.
        command: The command, or `sweep` for all kinds of sweeps. None, or another one, if it is
            unknown; results then count as the user's own files.
    """
    results = _results_of(command) if command in (*catalogue.KINDS, "sweep") else ()
    fits = [_fitting((*results, *_OF_ALL))]
    if command == "sweep":
        swept = [kind.command for kind in catalogue.KINDS.values() if kind.swept]
        of_runs = [name for kind in swept for name in _results_of(kind)]
        fits.append(_fitting((*of_runs, *_OF_ALL), f"{_CHILD}/"))
    return [
        name
        for name in _files(folder)
        if not any(pattern.fullmatch(name.as_posix()) for pattern in fits)
    ]


def move_others(old: Path, new: Path, command: str | None) -> list[Path]:
    """Moves files that a command has not written from its folder to the one that replaces it.

    Returns:
        The new locations of the files, as paths in the new folder. If a name is already used there,
        `.old` is appended.
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


def refuse_to_replace(folder: Path, names: Sequence[str | Path], missing: str) -> None:
    """Refuses files that a command would replace in a folder that does not belong to it.

    Args:
        folder: The folder.
        names: The files, as relative paths. None if empty.
        missing: What a folder of the command has, and this one has not.

    Raises:
        ValueError: If there are such files.
    """
    if names:
        raise ValueError(
            f"'{folder}' holds no {missing}, but {shortened(names, SHOWN)}, which would be "
            "replaced. Choose another folder with --out, or move these files."
        )


def _files(folder: Path) -> Iterator[Path]:
    """Yields the files below a folder, and links to folders, as relative paths in order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        links = [name for name in folders if Path(place, name).is_symlink()]
        yield from (Path(place, name).relative_to(folder) for name in sorted([*names, *links]))
