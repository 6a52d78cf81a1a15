"""Finds what was probably meant by a name that does not exist."""

import contextlib
import difflib
from collections.abc import Iterable
from pathlib import Path

from _lottery_ticket import synonyms

# Folder of the folders that commands write.
_RUNS = Path("runs")


def closest(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most like another one, or None if none is.

    Upper case, and hyphens for underscores, make no difference. The start of a name is like it.
    """
    plain = {_plain(one): one for one in known}
    wanted = _plain(name)
    found = difflib.get_close_matches(wanted, plain, 1)
    if len(wanted) > 2:
        found += [one for one in plain if one.startswith(wanted)]
    return plain[found[0]] if found else None


def question(name: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` with what a name means elsewhere, or is like, or nothing."""
    plain = {_plain(one): one for one in known}
    meant = map(_plain, synonyms.MEANT.get(_plain(name), ()))
    found = [plain[one] for one in meant if one in plain]
    if not found and (like := closest(name, plain.values())) is not None:
        found = [like]
    if not found:
        return ""
    *others, last = map(repr, found)
    listed = f"{', '.join(others)} or {last}" if others else last
    return f" Did you mean {listed}?"


def file_question(path: Path, suffixes: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` with the file of the same folder whose name is most alike.

    Args:
        path: A path that cannot be used.
        suffixes: Endings of the files that can be.
    """
    try:
        names = {one.stem: one.name for one in path.parent.iterdir() if one.suffix in suffixes}
    except OSError:
        return ""
    found = closest(path.stem, names)  # Equal endings would make all of them alike.
    return f" Did you mean '{path.parent / names[found]}'?" if found else ""


def folder_question(path: Path) -> str:
    """Returns `" Did you mean 'x'?"` with the folder beside a path, or in ./runs, most like it."""
    folders: dict[str, Path] = {}
    for place in (path.parent, *((_RUNS,) if path.parent == Path() else ())):
        with contextlib.suppress(OSError):
            folders.update((one.name, one) for one in place.iterdir() if one.is_dir())
    found = closest(path.name, folders)
    return f" Did you mean '{folders[found]}'?" if found else ""


def inside_question(path: Path, suffixes: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` with the first file with an ending in a folder, or nothing.

    Args:
        path: A folder, given in place of a file.
        suffixes: Endings of the files that can be used.
    """
    try:
        files = sorted(one for one in path.iterdir() if one.suffix in suffixes)
    except OSError:
        return ""
    return f" Did you mean '{files[0]}'?" if files else ""


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").strip("_")
