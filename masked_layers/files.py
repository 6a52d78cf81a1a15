"""Files and folders that are complete or not there."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows, which refuses to remove what is open.
    fcntl = None

_SUFFIX = re.compile(r"\.[a-z0-9_]{8}")  # What `tempfile` appends.


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of the one at `path` when the block ends without an error.

    Until then, and after an error, whatever was at `path` is still there. What a process that was
    killed left of the same file is removed.
    """
    path = Path(path)
    remove_abandoned(path.parent, path.name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            if fcntl is not None:
                _lock(file.fileno())
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes what killed processes left of `replacing` the file `name`, or any, in a folder."""
    pattern = "*" if name is None else glob.escape(name)
    for part in folder.glob(f".{pattern}.*.part"):
        # Not there any more, another's, or, on Windows, open.
        with contextlib.suppress(OSError):
            if fcntl is None:
                part.unlink()
                continue
            with _locked(part) as unused:
                if unused:
                    part.unlink()


@contextlib.contextmanager
def scratch_folder(path: Path, contents: frozenset[str]) -> Iterator[Path]:
    """Makes a folder beside `path`, and its parents; takes it away, and parents left empty.

    What killed processes left of such folders is removed (not on Windows).

    Args:
        path: What the folder is to replace.
        contents: Names that may be in it; another folder is not taken for one that was left.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_folders(path, contents)
        folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            with contextlib.nullcontext() if fcntl is None else _locked(folder):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # Not empty if all went well.
                parent.rmdir()


def _remove_abandoned_folders(path: Path, contents: frozenset[str]) -> None:
    if fcntl is None:
        return
    prefix = f".{path.name}"
    for folder in path.parent.glob(f"{glob.escape(prefix)}.*"):
        if not _SUFFIX.fullmatch(folder.name.removeprefix(prefix)):
            continue
        with contextlib.suppress(OSError):
            if {inside.name for inside in folder.iterdir()} <= contents:
                with _locked(folder) as unused:
                    if unused:
                        shutil.rmtree(folder, ignore_errors=True)


def replace_folder(new: Path, path: Path) -> None:
    """Puts folder `new` at `path` in one step; what was there is at `new` afterwards."""
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # Where the system cannot exchange two folders: two steps, undone if the second fails.
        old = path.with_name(f"{new.name}.old")
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(new)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two paths atomically; False where the system or file system cannot."""
    names = os.fsencode(a), os.fsencode(b)
    library = None
    with contextlib.suppress(TypeError):  # Windows has no library of the whole process.
        library = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(here, names[0], here, names[1], exchange) == 0
    with contextlib.suppress(AttributeError):
        swap = 2  # RENAME_SWAP
        return library.renamex_np(*names, swap) == 0
    return False


# What is in use is told from what was left by a lock of the system, which ends with its process.


def _lock(descriptor: int) -> bool:
    """Locks what is open until it is closed; False where another process has, or there are none."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    return False


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Locks a file or folder; yields whether nobody else had it locked."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _lock(descriptor)
    finally:
        os.close(descriptor)
