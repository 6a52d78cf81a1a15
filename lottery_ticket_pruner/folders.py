"""Folders that only one process at a time may use."""

import contextlib
import json
import os
import shlex
import socket
import sys
import time
from pathlib import Path
from typing import Self

import filelock

from masked_layers.files import remove_abandoned, replacing

_LOCK, _HOLDER = ".lock", ".lock.json"
_PATIENCE = 0.5  # Seconds; longer than another process takes to release the lock.


class FolderInUseError(OSError):
    """An error for a folder that another process is using, with that process and its start."""


def make_folder(folder: Path) -> None:
    """Creates a folder and its parents if they do not exist.

    Raises:
        NotADirectoryError: If there is a file in place of the folder or one of its parents.
        OSError: If the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        there = (path for path in (folder, *folder.parents) if os.path.lexists(path))
        raise NotADirectoryError(
            f"'{next(there, folder)}' is a file, but a folder is to be written there. Choose "
            "another folder."
        ) from error


class FolderLock:
    """Keeps other processes out of a folder within a `with` block, and creates it if necessary.

    The lock belongs to the operating system and ends with the process in any case.

    Args:
        folder: The folder.

    Raises:
        FolderInUseError: If another process, or another part of this process, uses the folder.
        OSError: If the folder cannot be created or written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = filelock.FileLock(folder / _LOCK, thread_local=False)
        self._made: list[Path] = []
        self._stat: os.stat_result | None = None

    def __enter__(self) -> Self:
        folder = self._folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        make_folder(folder)
        try:
            self._lock.acquire(timeout=_PATIENCE)
        except filelock.Timeout as error:
            raise FolderInUseError(
                f"'{folder}' is in use by {self._holder()}. Wait until it ends, or choose another "
                "folder."
            ) from error
        except OSError as error:
            if error.filename is not None:  # The file cannot be created; the error says why.
                raise
            raise OSError(
                error.errno,
                f"'{folder}' cannot be locked: {error.strerror}. Choose a folder on a file system "
                "with locks",
            ) from error
        try:
            self._describe()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _describe(self) -> None:
        """Writes who holds the lock, and removes files left by killed processes."""
        folder = self._folder
        self._stat = os.stat(folder / _LOCK)
        holder = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": shlex.join(sys.argv),
        }
        with replacing(folder / _HOLDER) as file:
            file.write((json.dumps(holder) + "\n").encode())
        remove_abandoned(folder)

    def __exit__(self, *_: object) -> None:
        # Another process that has opened the lock notices that it is gone, and creates a new one.
        for name in (_HOLDER, _LOCK) if self._is_there() else ():
            with contextlib.suppress(OSError):
                (self._folder / name).unlink()
        self._stat = None
        self._lock.release()
        for path in self._made:
            with contextlib.suppress(OSError):  # Not empty, if there was anything to keep.
                path.rmdir()

    def check(self) -> None:
        """Raises an error if the locked folder was removed or replaced.

        Raises:
            FileNotFoundError: If the folder was removed, or another one is in its place.
        """
        if self._stat is not None and not self._is_there():
            raise FileNotFoundError(
                f"'{self._folder}' was removed or replaced while it was in use. Its content is "
                "lost, and nothing more is written."
            )

    def moved(self, folder: Path) -> None:
        """Sets the new path of the folder."""
        self._folder = folder

    def _is_there(self) -> bool:
        """Returns whether the lock file in the folder is the one that this process holds."""
        with contextlib.suppress(OSError):
            found = os.stat(self._folder / _LOCK)
            return self._stat is not None and os.path.samestat(self._stat, found)
        return False

    def _holder(self) -> str:
        try:
            holder = json.loads((self._folder / _HOLDER).read_text())
            return (
                f"process {holder['pid']} on {holder['host']} since {holder['since']}: "
                f"{holder['command']}"
            )
        except (OSError, ValueError, KeyError, TypeError):  # Not written yet, or already removed.
            return "another process"
