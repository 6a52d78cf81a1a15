"""`repeat` and `report` for folders of `lottery-ticket prune`."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lottery_ticket_pruner.commands import prune_folder
from lottery_ticket_pruner.commands.prune import PruneConfig, prune
from lottery_ticket_pruner.experiments import progress
from lottery_ticket_pruner.experiments.reports import pruning
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, is_pruned, read_json, reason
from lottery_ticket_pruner.experiments.run_folder import restored
from masked_layers.files import FileContentError
from masked_layers.text_tables import aligned

_COMPARED = ("method", "sparsity", "validation")


def configuration(folder: Path, out: Path | None, *, overwrite: bool, quiet: bool) -> PruneConfig:
    """Returns the configuration of a finished search, to be executed in another folder.

    Args:
        folder: The folder of the search.
        out: The other folder. None for the name with -again next to it.
        overwrite: Whether to discard a search there.
        quiet: Whether to print nothing.

    Raises:
        FileContentError: If the configuration is damaged or was written by another version.
        ValueError: If `out` is the same folder.
    """
    file = folder / CONFIG_FILE
    if (values := read_json(file)) is None:
        raise FileContentError(f"'{file}' {reason(file)}.")
    try:
        config = restored(PruneConfig, values)
    except ValueError as error:
        raise FileContentError(f"'{file}' is not the configuration of a search: {error}") from error
    again = out or folder.resolve().with_name(f"{folder.resolve().name}-again")
    if again.resolve() == folder.resolve():
        raise ValueError(f"--out is the folder that is repeated: '{folder}'. Choose another one.")
    return dataclasses.replace(config, out=again, overwrite=overwrite, quiet=quiet)


def repeat(folder: Path, config: PruneConfig, console: Console | None = None) -> bool:
    """Executes a search again, and prints where its rows differ from those of the earlier one.

    Args:
        folder: The folder of the earlier search.
        config: Its configuration with another folder.
        console: Where to print.

    Returns:
        Whether all rows are the same, except for their times.
    """
    console = console or progress.console(quiet=config.quiet)
    earlier, _ = prune_folder.read(folder)
    if is_pruned(config.folder) and not config.overwrite:
        text = f"The search in {config.folder} is finished. Use --overwrite to execute it again."
        progress.say(console, text)
    result = prune(config, console)
    pairs = differences(earlier.rows, result.rows)
    same = not pairs and earlier.test == result.test
    if same:
        text = f"The same {len(result.rows)} models were tried, with the same results."
    else:
        lines = [("step", "there", "here"), *pairs] if pairs else []
        text = "\n".join(
            [
                "The results differ. Training on several threads is not always the same, nor are "
                "measured times and other versions.",
                *aligned(lines, left={1, 2}),
                f"there, test: {earlier.test}",
                f"here, test: {result.test}",
            ]
        )
    progress.say(console, text)
    return same


def differences(
    there: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]
) -> list[tuple[str, str, str]]:
    """Returns the step and both texts of rows that differ in what was tried or measured."""
    texts = [[_text(row) for row in rows] for rows in (there, here)]
    length = max(map(len, texts))
    padded = [column + ["-"] * (length - len(column)) for column in texts]
    return [
        (str(number), first, second)
        for number, (first, second) in enumerate(zip(*padded, strict=True))
        if first != second
    ]


def report(folders: Iterable[Path], out: Path | None, console: Console) -> list[Path]:
    """Writes the reports of finished searches again from their stored results.

    Args:
        folders: Their folders.
        out: Folder of the report, for a single one. None for the folder of each search.
        console: Where to print.

    Returns:
        The web pages.

    Raises:
        FileContentError: If results are missing or damaged.
        ValueError: If `out` is given for several folders.
    """
    folders = list(folders)
    if out is not None and len(folders) > 1:
        raise ValueError(
            "Reports of several folders of `prune` are written into these folders: leave out --out."
        )
    read = [(folder, *prune_folder.read(folder)) for folder in folders]
    pages = []
    for folder, findings, facts in read:
        for sheet in pruning.sheets(findings, facts):
            console.print(sheet.table())
        progress.say(console, findings.conclusion)
        target = out or folder
        target.mkdir(parents=True, exist_ok=True)
        prune_folder.write_report(findings, facts, target)
        pages.append(target / "report.html")
        progress.say(console, str(pages[-1]))
    return pages


def pruned_in(folders: Iterable[Path]) -> list[Path]:
    """Returns those folders, and folders directly inside the others, where a search finished."""
    found: list[Path] = []
    for folder in folders:
        if is_pruned(folder):
            found.append(folder)
        elif folder.is_dir():
            found += sorted(inside for inside in folder.iterdir() if is_pruned(inside))
    return found


def _text(row: Mapping[str, Any]) -> str:
    values = (row[name] for name in _COMPARED)
    return " ".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values)
