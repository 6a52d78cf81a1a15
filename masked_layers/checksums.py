"""Checksums of the files in a folder, in the form that `sha256sum --check` reads."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

SUMS_FILE = "SHA256SUMS"

_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def checksum(file: Path) -> str:
    """Returns the checksum of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def lines(sums: Mapping[str, str]) -> bytes:
    """Returns the content of a file of checksums.

    Args:
        sums: Checksums by path, relative to the folder in which `sha256sum` is called.
    """
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def length(names: Iterable[str]) -> int:
    """Returns the bytes that `lines` takes for files of these names."""
    return len(lines(dict.fromkeys(names, "0" * 64)))


def read(file: Path) -> dict[str, str]:
    """Returns the checksums in a file by path, without damaged lines."""
    found = [_LINE.fullmatch(line) for line in file.read_text("utf-8", "replace").splitlines()]
    return {line[2]: line[1] for line in found if line is not None}


def first_wrong(
    folder: Path,
    sums: Mapping[str, str],
    names: Iterable[str],
    later: Mapping[str, bytes] = MappingProxyType({}),
) -> Path | None:
    """Returns the first file that is missing or does not have its checksum, or None.

    Args:
        folder: The folder of the files.
        sums: Checksums by name.
        names: Names of the files to compare.
        later: Other contents that files may have the checksums of, by name.
    """
    for name in names:
        file = folder / name
        if not file.is_file():
            return file
        found = {checksum(file)}
        if name in later:
            found.add(hashlib.sha256(later[name]).hexdigest())
        if sums.get(name) not in found:
            return file
    return None
