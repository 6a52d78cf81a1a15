"""Checksums of the files in a finished folder."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from masked_layers.checksums import SUMS_FILE, checksum, first_wrong, lines, read
from masked_layers.files import FileContentError, replacing


def write(folder: Path, files: Iterable[Path], later: Mapping[str, bytes]) -> None:
    """Writes the checksums of files in a folder.

    Args:
        folder: The folder.
        files: Files in it.
        later: Contents of files that are written afterwards, by name.
    """
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in later.items()}
    for file in files:
        sums.setdefault(file.relative_to(folder).as_posix(), checksum(file))
    _write(folder / SUMS_FILE, sums)


def update(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of files that were written again, if the folder has any.

    Args:
        folder: The folder.
        names: Names of files in it.
    """
    file = folder / SUMS_FILE
    if file.exists():
        sums = read(file) | {name: checksum(folder / name) for name in names}
        _write(file, sums)


def replace(path: Path, content: bytes) -> None:
    """Replaces a file, and its checksum if its folder has any.

    Meanwhile the folder has no checksums, so that after a kill none contradicts the file.

    Args:
        path: Path of the file.
        content: Its new content.
    """
    file = path.with_name(SUMS_FILE)
    sums = read(file) if file.exists() else None
    file.unlink(missing_ok=True)
    with replacing(path) as whole:
        whole.write(content)
    if sums is not None:
        _write(file, sums | {path.name: hashlib.sha256(content).hexdigest()})


def check(
    folder: Path, names: Iterable[str], later: Mapping[str, bytes] = MappingProxyType({})
) -> None:
    """Compares files with their checksums, if the folder has any.

    Args:
        folder: The folder. Those of earlier versions have no checksums.
        names: Names of files in it.
        later: Other contents that files may have the checksums of, by name.

    Raises:
        FileContentError: If a file differs or is missing, or the checksums are damaged.
    """
    file = folder / SUMS_FILE
    if not file.exists():
        return
    wrong = first_wrong(folder, read(file), names, later)
    if wrong is not None:
        raise FileContentError(
            f"'{wrong}' does not have the checksum in {SUMS_FILE}, so one of the two was changed "
            f"since the folder was finished. If you changed '{wrong.relative_to(folder)}' on "
            f"purpose, delete '{file}'."
        )


def _write(file: Path, sums: Mapping[str, str]) -> None:
    with replacing(file) as whole:
        whole.write(lines(sums))
