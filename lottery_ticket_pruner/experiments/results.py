"""Files of results that commands write row by row, and the checks when they are read."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from _lottery_ticket import hints
from lottery_ticket_pruner import pictures
from lottery_ticket_pruner.experiments import catalogue, checksums
from masked_layers.archives import read_npz
from masked_layers.files import UNEXPECTED_FORM, FileContentError, naming, replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG_FILE = "config.json"

RESULTS_FILE = "results.csv"

# Checksums of the tables of an unfinished run.
PARTS_FILE = ".tables.json"
SWEEP_FILE = "sweep.json"

# Metrics along the lines of a run of `lottery-ticket instability`.
LINES_FILE = "lines.csv"

INITIAL_FILE = "initial.npz"

COLUMNS = (
    "round",
    "arm",
    "replicate",
    "sparsity",
    "test_accuracy",
    "test_loss",
    "early_stop_step",
    "seconds",
    "validation_loss",
)

# Column of runs with a structure of channels or filters: the share of these that is left.
CHANNELS = "channels"

# Columns that say what the results are of, after those of the measurements. All are options, except
# that `seed` is the one of the row's replicate.
IDENTITY = ("data", "network", "strategy", "seed")

# Entries of a run folder's configuration that affect results besides the options.
ORIGIN = ("backend", "data_digest")

# Other entries of a run folder's configuration: the command that wrote it, whether all results are
# there, and the versions of this package, of Keras and of the backend.
FACTS = ("command", "finished", "versions")

# Entry for the custom criteria and treatments.
CODE = "code"

# Columns that contain only numbers or nothing, in the results of every command and version.
_NUMBERS = frozenset(name for kind in catalogue.KINDS.values() for name in kind.numbers)


class CsvWriter:
    """Writes rows to a CSV file one by one, and each to disk at once.

    Args:
        path: Path of the file.
        columns: Names of its columns.
    """

    def __init__(self, path: Path, columns: Sequence[str] = COLUMNS) -> None:
        self._path = path
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.DictWriter(self._file, columns)
        with naming(path):
            self._writer.writeheader()
            self._file.flush()

    def write(self, row: dict[str, Any]) -> None:
        """Appends a row. Numbers are written with six digits.

        Raises:
            FileNotFoundError: If the file was removed or replaced in the meantime.
        """
        try:
            same = os.path.samestat(os.fstat(self._file.fileno()), os.stat(self._path))
        except FileNotFoundError:
            same = False
        if not same:
            raise FileNotFoundError(
                f"'{self._path}' was removed or replaced while results were written to it: they "
                "are lost."
            )
        rounded = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
        with naming(self._path):
            self._writer.writerow(rounded)
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def identity(config: Any, seed: int) -> dict[str, Any]:
    """Returns the columns of `IDENTITY` for a configuration, without options that it lacks."""
    values = {name: getattr(config, name, None) for name in IDENTITY} | {"seed": seed}
    return {name: value for name, value in values.items() if value is not None}


def write_figure(file: Path, figure: "Figure") -> None:
    """Writes a picture that is complete or absent."""
    with replacing(file) as whole:
        pictures.show_literally(figure).savefig(whole, dpi=150, format="png")


def missing_folder(folder: Path, expected: str) -> FileNotFoundError:
    """Returns an error for the folder of a command that does not exist or is a file.

    Args:
        folder: The folder.
        expected: The folders that can be named.
    """
    what = f"'{folder}' is a file." if folder.exists() else f"There is no folder '{folder}'."
    return FileNotFoundError(
        f"{what} Expected {expected}: `lottery-ticket run` and the other commands write theirs "
        f"into ./runs or --out.{hints.folder_question(folder)}"
    )


def is_run(folder: Path) -> bool:
    """Returns True if a folder contains a configuration and results, or says that it does.

    Folders of `lottery-ticket prune` are not runs of an experiment.
    """
    if is_pruned(folder):
        return False
    if (folder / CONFIG_FILE).is_file() and (folder / RESULTS_FILE).is_file():
        return True
    return bool((read_json(folder / CONFIG_FILE) or {}).get("finished"))


def is_pruned(folder: Path) -> bool:
    """Returns True if `lottery-ticket prune` has finished in a folder."""
    return (read_json(folder / CONFIG_FILE) or {}).get("command") == "prune"


def file_of_initial_weights(folder: Path, replicate: int) -> Path:
    """Returns the file with the initial weights of a seed in a run folder."""
    return folder / "rounds" / str(replicate) / INITIAL_FILE


def initial_weights(folder: Path, replicate: int) -> dict[str, np.ndarray] | None:
    """Reads the weights that a seed of a run started with at step 0, by path.

    Returns:
        None if there is no such file, as in runs of earlier versions.

    Raises:
        OSError: If the file cannot be read.
        FileContentError: If it is damaged.
    """
    file = file_of_initial_weights(folder, replicate)
    return read_npz(file) if file.exists() else None


def read_json(file: Path) -> dict[str, Any] | None:
    """Returns the options in a file, or None if the file cannot be read."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def as_bytes(values: Mapping[str, Any]) -> bytes:
    """Returns the content of a file of options."""
    return (json.dumps(values, indent=2) + "\n").encode()


def reason(file: Path) -> str:
    """Returns why `read_json` cannot read a file, as the end of a sentence."""
    if not file.is_file():
        return "is missing"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"is cut short or damaged ({error})"
    return f"does not contain options, but {values!r:.40}"


def complete_lines(file: Path) -> list[bytes]:
    """Returns the complete lines of a file, which have a line end. Empty without the file."""
    try:
        content = file.read_bytes()
    except OSError:
        return []
    return [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]


def read_table(file: Path) -> pd.DataFrame:
    """Reads a CSV file written by a command, with each number as it was written.

    A last line without its end is left out, because it may be cut off inside a number.

    Raises:
        FileContentError: If the file is not such a table. The message names the file, and the line
            if there is one.
    """
    content = b"".join(complete_lines(file))
    try:
        heading, *rows = csv.reader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
    except (ValueError, csv.Error) as error:  # Also a ValueError if the heading is missing.
        what = "no whole line" if not content else str(error)
        raise FileContentError(f"'{file}' was not written by a command: {what}.") from error
    for line, row in enumerate(rows, 2):
        if row and len(row) != len(heading):
            raise FileContentError(
                f"'{file}', line {line}: expected {len(heading)} values, one for each column. "
                f"Received {len(row)}."
            )
        for name, cell in zip(heading, row, strict=False):
            if name in _NUMBERS and not _is_number(cell):
                raise FileContentError(
                    f"'{file}', line {line}: expected a number in column '{name}'. "
                    f"Received: {cell!r}."
                )
    return pd.read_csv(io.BytesIO(content))


def _is_number(cell: str) -> bool:
    """Returns True for a number as commands write it, and for an empty cell (no value)."""
    try:
        return not cell or (float(cell) is not None and cell.isascii() and "_" not in cell)
    except ValueError:
        return False


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Reads back the rows written by a run, in order to resume it.

    Raises:
        FileContentError: If the file is not a complete table.
    """
    try:
        return read_table(file).to_dict("records")
    except ValueError as error:
        raise FileContentError(
            f"{error} Restore it from a copy, or delete it: its run starts over then."
        ) from error


def write_parts(folder: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Writes tables of an unfinished run in their order, and before, checksums of their lines.

    Args:
        folder: Folder of the run.
        tables: The rows of each table, by name of the file.
    """
    contents = {
        name: pd.DataFrame(rows).to_csv(index=False).encode() for name, rows in tables.items()
    }
    # Next to those of the lines that are there, because a kill may come in between.
    sums = {
        name: sorted(_sums([*complete_lines(folder / name), *content.splitlines(keepends=True)]))
        for name, content in contents.items()
    }
    with replacing(folder / PARTS_FILE) as whole:
        whole.write(json.dumps(sums).encode())
    for name, content in contents.items():
        with replacing(folder / name) as whole:
            whole.write(content)


def read_parts(folder: Path, name: str) -> list[dict[str, Any]]:
    """Reads back the rows of a table of `write_parts`, of which the last ones may be missing.

    Args:
        folder: Folder of the run. One of an earlier version has no checksums.
        name: Name of the file.

    Raises:
        FileContentError: If a line was changed since it was written, or the file is not a table.
    """
    file, sums = folder / name, folder / PARTS_FILE
    try:
        known = json.loads(sums.read_bytes())[name] if sums.is_file() else None
        same = known is None or _sums(complete_lines(file)) <= set(known)
    except UNEXPECTED_FORM:
        same = False
    if not same:
        raise FileContentError(
            f"'{file}' has a line without a checksum in {PARTS_FILE}, so one of the two was "
            "changed since the run was interrupted. Restore both from a copy, or delete the table: "
            "its run starts over then."
        )
    return read_rows(file)


def _sums(lines: Iterable[bytes]) -> set[str]:
    return {hashlib.sha256(line).hexdigest() for line in lines}


def rows_per_seed(config: Mapping[str, Any]) -> int | None:
    """Returns the number of rows per seed of a finished run, or None if options are unknown.

    Args:
        config: The resolved options of the run, and its `command`.

    Raises:
        ValueError: If the command executes no experiment.
    """
    if "command" not in config:
        return None
    kind = catalogue.kind_of(config["command"])
    try:
        return kind.rows_per_seed(config)
    except (KeyError, TypeError):
        return None


def check_unfinished(folder: Path, config: Mapping[str, Any]) -> None:
    """Raises an error if a run is only unfinished because its configuration was damaged.

    Args:
        folder: The folder of the run.
        config: Its configuration.

    Raises:
        FileContentError: If it has checksums, which are written last, and they do not match.
    """
    # A run that is killed before its mark has the checksum of the configuration with the mark.
    marked = as_bytes({**config, "finished": True})
    checksums.check(folder, [RESULTS_FILE, CONFIG_FILE], {CONFIG_FILE: marked})


def check_results(file: Path, config: Mapping[str, Any]) -> None:
    """Raises an error if results of a finished run are missing.

    Args:
        file: The table of its results.
        config: The resolved options of the run, and its `command`.

    Raises:
        FileContentError: If the table is missing, damaged or lacks rows, or a checksum does not
            match. The message says what to do.
    """
    try:
        _check_rows(file, config)
        checksums.check(file.parent, [RESULTS_FILE, CONFIG_FILE])
    except ValueError as error:
        raise FileContentError(
            f"{error} Restore it from a copy, or repeat the run: the command that "
            f"made '{file.parent}' replaces it with --overwrite; `lottery-ticket repeat` does the "
            "same in another folder."
        ) from error


def _check_rows(file: Path, config: Mapping[str, Any]) -> None:
    if not file.is_file():
        raise ValueError(f"'{file}' is missing, with the results of a finished run.")
    rows = read_table(file)
    wanted = rows_per_seed(config)
    if wanted is None or "epoch" in rows:  # Written by an earlier version.
        return
    lines = file.read_bytes().splitlines(keepends=True)
    if not lines[-1].endswith(b"\n"):
        raise ValueError(f"'{file}', line {len(lines)}: it ends in the middle.")
    found = rows["replicate"].value_counts() if "replicate" in rows else {}
    for replicate, seed in enumerate(config["seeds"]):
        if (there := int(found.get(replicate, 0))) != wanted:
            raise ValueError(
                f"'{file}' has {there} rows of seed {seed} (replicate {replicate}), but the "
                f"finished run wrote {wanted}; {len(rows)} of {wanted * len(config['seeds'])} "
                "in all."
            )
    if len(rows) != wanted * len(config["seeds"]):
        raise ValueError(f"'{file}' has rows of seeds other than its {len(config['seeds'])}.")
