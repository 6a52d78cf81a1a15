"""Writes files and folders that are always either complete or absent."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

if sys.platform != "win32":  # Windows has no such locks, and refuses to remove open files.
    import fcntl


# Errors of a reader that takes apart JSON data of an unexpected form.
UNEXPECTED_FORM = (LookupError, TypeError, AttributeError, ValueError, RecursionError)


class FileContentError(ValueError):
    """An error for a file whose content cannot be used.

    It is cut short, damaged, or not of the expected format, announces more than its length can
    justify, or does not fit the model that it is read for. Nothing is changed, and no code from the
    file is executed. A file that cannot be opened raises an `OSError` instead.
    """


_SUFFIX = re.compile(r"\.[a-z0-9_]{8}")  # The suffix that `tempfile` appends.


@contextlib.contextmanager
def naming(path: str | os.PathLike[str], *, always: bool = False) -> Iterator[None]:
    """Names a path in errors of the system that name none, such as those of a full disk.

    Args:
        path: The path.
        always: Whether to replace another name, too, such as that of a temporary file for the path.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None and (always or error.filename is None):
            error.filename = str(path)
        raise


def file_sizes(path: Path) -> dict[str, int]:
    """Returns the size of every file below a folder, or of one file, by its relative path."""
    if path.is_file():
        return {path.name: path.stat().st_size}
    files = (file for file in sorted(path.rglob("*")) if file.is_file())
    return {file.relative_to(path).as_posix(): file.stat().st_size for file in files}


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Creates a folder among the temporary files of the system, and removes it at the end."""
    with tempfile.TemporaryDirectory() as folder, naming(folder):
        yield Path(folder)


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a new file that replaces the one at `path` when the block ends without an error.

    Until then, and after an error, an existing file at `path` is unchanged. The new content is on
    disk before it replaces the old one, so that this holds for a loss of power, too. Temporary
    files that killed processes left for the same path are removed.
    """
    path = Path(path)
    check_target(path)
    remove_abandoned(path.parent, path.name)
    file = _create_locked(path)
    temporary = Path(file.name)
    try:
        with naming(path), file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform != "win32":  # While it is locked. Windows cannot move an open file.
                os.replace(temporary, path)
        if sys.platform == "win32":
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # The folder may be gone, too.
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def sync(path: Path) -> None:
    """Waits until a file, or everything in a folder, is on disk.

    Raises:
        OSError: If it cannot be written, because the disk is full, for example.
    """
    if path.is_dir():
        for inside in path.iterdir():
            if not inside.is_symlink():
                sync(inside)
        _sync_folder(path)
    elif path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can tell."""
    if sys.platform == "win32":  # Folders cannot be opened there.
        return
    # Some file systems refuse this. The content of the files is on disk in any case.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _create_locked(path: Path) -> BinaryIO:
    """Creates a temporary file for a path that no other process takes for an abandoned one."""
    while True:
        # Random, because threads, and processes in two containers, may have the same number.
        temporary = path.with_name(f".{path.name}.{secrets.randbits(48)}.part")
        with naming(path, always=True):
            file = open(temporary, "xb")  # noqa: SIM115
        # Another process may have removed it before it was locked.
        if sys.platform == "win32" or not _lock(file.fileno(), wait=True):
            return file
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()


def check_target(path: str | os.PathLike[str]) -> None:
    """Checks that a file can be written at a path, as far as this is known in advance.

    Raises:
        IsADirectoryError: If it is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"'{path}' is a folder. Expected the path of a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"'{path}' cannot be written, because there is no folder '{path.parent}'. Create it "
            "first."
        )


def remove_abandoned(folder: Path, name: str | None = None) -> None:
    """Removes temporary files that killed processes left in a folder.

    Args:
        folder: The folder to look in.
        name: Name of the file that was to be replaced. Default: any.
    """
    pattern = "*" if name is None else glob.escape(name)
    for part in folder.glob(f".{pattern}.*.part"):
        # It may have been removed meanwhile, belong to another user or, on Windows, be open.
        with contextlib.suppress(OSError):
            if sys.platform == "win32":
                part.unlink()
                continue
            with _locked(part) as unused:
                if unused:
                    part.unlink()


@contextlib.contextmanager
def scratch_folder(path: Path, contents: frozenset[str]) -> Iterator[Path]:
    """Creates a temporary folder next to `path`, with missing parents.

    At the end it is removed, and so are parents that were created and are still empty. Temporary
    folders that killed processes left for the same path are removed (not on Windows).

    Args:
        path: Path that the folder is to replace.
        contents: Names that the folder may contain. A folder with other names is not treated as
            abandoned.
    """
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned_folders(path, contents)
        with _locked_scratch(path) as folder:
            try:
                with naming(path):
                    yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        for parent in made:
            with contextlib.suppress(OSError):  # It is not empty after a success.
                parent.rmdir()


@contextlib.contextmanager
def _locked_scratch(path: Path) -> Iterator[Path]:
    """Creates a temporary folder that no other process takes for an abandoned one."""
    while True:
        with naming(path, always=True):
            folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        if sys.platform == "win32":
            yield folder
            return
        with contextlib.ExitStack() as stack:
            # Another process may have removed it before it was locked.
            with contextlib.suppress(FileNotFoundError):
                stack.enter_context(_locked(folder, wait=True))
            if folder.exists():
                yield folder
                return


def _remove_abandoned_folders(path: Path, contents: frozenset[str]) -> None:
    if sys.platform == "win32":
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
    """Moves folder `new` to `path` in one step; an existing folder is then at `new`.

    Everything in `new` is on disk before. It gets the permissions of a new folder, since only their
    owner can read temporary ones.
    """
    if new.is_dir():
        special = new.stat().st_mode & 0o7000  # Such as the group that folders pass on.
        os.chmod(new, special | _mode_of_new_folders(new))
        sync(new)
    if not path.exists():
        new.rename(path)
    elif not _exchange(new, path):
        # If the system cannot exchange two folders, this takes two steps. If the second fails, the
        # first is undone.
        old = path.with_name(f"{new.name}.old")
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        old.rename(new)
    _sync_folder(path.parent)


def _mode_of_new_folders(folder: Path) -> int:
    """Returns the permissions that the process gives to new folders inside a folder.

    The system only tells its mask by setting another one. Meanwhile, files of other threads would
    be open to everyone, and two threads that ask at once could leave it that way.
    """
    probe = Path(tempfile.mkdtemp(dir=folder)) / "probe"
    try:
        probe.mkdir()
        return probe.stat().st_mode & 0o777
    finally:
        shutil.rmtree(probe.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Exchanges two paths atomically, or returns False if the system does not support it."""
    names = os.fsencode(a), os.fsencode(b)
    try:
        library = ctypes.CDLL(None)
    except TypeError:  # Windows cannot open the process itself as a library.
        return False
    with contextlib.suppress(AttributeError):
        here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
        return library.renameat2(here, names[0], here, names[1], exchange) == 0
    with contextlib.suppress(AttributeError):
        swap = 2  # RENAME_SWAP
        return library.renamex_np(*names, swap) == 0
    return False


# A lock of the system, which is released when its process ends, tells files in use from abandoned
# ones.


def _lock(descriptor: int, *, wait: bool = False) -> bool:
    """Locks an open file or folder until it is closed.

    Args:
        descriptor: Descriptor of the file or folder.
        wait: Whether to wait until another process has unlocked it. Where only processes that
            look for abandoned files lock it, this takes a moment.

    Returns:
        False if another process has locked it, or the file system has no locks.
    """
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    return False


@contextlib.contextmanager
def _locked(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Locks a file or folder; yields whether the lock was free."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield _lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)
