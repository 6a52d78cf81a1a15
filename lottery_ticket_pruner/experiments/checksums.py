"""Checksums of the files of a finished run, in the form that `sha256sum --check` reads."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from masked_layers.files import FileContentError, replacing

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(folder: Path, files: Iterable[Path], later: Mapping[str, bytes]) -> None:
    """Writes the checksums of files in a folder.

    Args:
        folder: The folder.
        files: Files in it.
        later: Contents of files that are written afterwards, by name.
    """
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in later.items()}
    for file in files:
        sums.setdefault(file.relative_to(folder).as_posix(), _of(file))
    with replacing(folder / SUMS_FILE) as whole:
        whole.write("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def check(folder: Path, names: Iterable[str]) -> None:
    """Compares files with their checksums, if the folder has any.

    Args:
        folder: The folder. Those of earlier versions have no checksums.
        names: Names of files in it.

    Raises:
        FileContentError: If a file differs, or the checksums are damaged.
    """
    file = folder / SUMS_FILE
    if not file.exists():
        return
    lines = [_LINE.fullmatch(line) for line in file.read_text("utf-8", "replace").splitlines()]
    sums = {line[2]: line[1] for line in lines if line is not None}
    for name in names:
        if sums.get(name) != _of(folder / name):
            raise FileContentError(
                f"'{folder / name}' does not have the checksum in {SUMS_FILE}, so one of the two "
                f"was changed since the run was finished. If you changed '{name}' on purpose, "
                f"delete '{file}'."
            )


def _of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
