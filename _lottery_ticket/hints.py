"""Finds what was probably meant by a name that does not exist."""

import difflib
from collections.abc import Iterable
from pathlib import Path


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
    """Returns `" Did you mean 'x'?"` with the name that is most like another one, or nothing."""
    found = closest(name, known)
    return f" Did you mean {found!r}?" if found else ""


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


def _plain(name: str) -> str:
    return name.lower().replace("-", "_").strip("_")
