"""Checksums of the files in a finished folder, in the form that `sha256sum --check` reads."""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

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
    _write(folder / SUMS_FILE, sums)


def update(folder: Path, names: Iterable[str]) -> None:
    """Writes the checksums of files that were written again, if the folder has any.

    Args:
        folder: The folder.
        names: Names of files in it.
    """
    file = folder / SUMS_FILE
    if file.exists():
        sums = _read(file) | {name: _of(folder / name) for name in names}
        _write(file, sums)


def replace(path: Path, content: bytes) -> None:
    """Replaces a file, and its checksum if its folder has any.

    Meanwhile the folder has no checksums, so that after a kill none contradicts the file.

    Args:
        path: Path of the file.
        content: Its new content.
    """
    file = path.with_name(SUMS_FILE)
    sums = _read(file) if file.exists() else None
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
        FileContentError: If a file differs, or the checksums are damaged.
    """
    file = folder / SUMS_FILE
    if not file.exists():
        return
    sums = _read(file)
    for name in names:
        found = {_of(folder / name)}
        if name in later:
            found.add(hashlib.sha256(later[name]).hexdigest())
        if sums.get(name) not in found:
            raise FileContentError(
                f"'{folder / name}' does not have the checksum in {SUMS_FILE}, so one of the two "
                f"was changed since the folder was finished. If you changed '{name}' on purpose, "
                f"delete '{file}'."
            )


def _read(file: Path) -> dict[str, str]:
    lines = [_LINE.fullmatch(line) for line in file.read_text("utf-8", "replace").splitlines()]
    return {line[2]: line[1] for line in lines if line is not None}


def _write(file: Path, sums: Mapping[str, str]) -> None:
    with replacing(file) as whole:
        whole.write("".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode())


def _of(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
