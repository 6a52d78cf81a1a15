"""Loads and checks `.keras` files, and says why Keras cannot make a model."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import os
import shutil
import tempfile
import textwrap
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import h5py
import keras

from masked_layers.archives import MOST_PER_BYTE
from masked_layers.files import FileContentError, naming

_WEIGHTS = "model.weights.h5"
_LARGEST_TEXT = 1 << 26  # Bytes of a config, as in ticket files.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # What the system says when a disk is full.
# Keras' warning for an optimizer that had no slots yet when it was saved, so that none are lost: it
# has its step and, without a schedule, its learning rate.
_OF_UNBUILT = r"Skipping variable loading for optimizer .* the saved optimizer has [12] variables"
_NAME_LENGTHS = 26  # Position of the lengths of two fields in the header of an entry.


def how_to_save(path: Path) -> str:
    """Returns advice on creating a `.keras` file from a model file in another format."""
    of_weights = path.name.endswith(".weights.h5")
    name = path.name.removesuffix(".weights.h5") if of_weights else path.stem
    file = str(path.with_name(f"{name}.keras"))
    if of_weights:
        return f"Load these weights into their model and save it with `model.save({file!r})`."
    if path.suffix in (".h5", ".hdf5"):
        return (
            f"Convert the file to that format: `import keras, masked_layers; "
            f"keras.models.load_model({str(path)!r}).save({file!r})`."
        )
    return "To create a '.keras' file, call `model.save('NAME.keras')`."


def load_model(path: Path, *, compiled: bool = False) -> keras.Model:
    """Loads a `.keras` file, after checking that it is complete, or a legacy `.h5` file.

    Args:
        path: Path of the file.
        compiled: Whether the model is compiled as it was saved.

    Raises:
        FileContentError: If the file is cut short, damaged or not written by Keras, or contains a
            layer of a class that is not imported.
    """
    if path.suffix not in (".h5", ".hdf5"):
        _check_archive(path)
    elif path.is_file() and h5py.is_hdf5(path):  # Keras says what others are.
        _check_h5(path, path)
    try:
        if not compiled:
            return keras.models.load_model(path, compile=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", _OF_UNBUILT)
            return keras.models.load_model(path)
    except KeyError as error:
        raise FileContentError(f"'{path}' was not written by Keras: {error}.") from error
    # Keras can raise any error for other files, and for layers that are not imported.
    except Exception as error:
        raise FileContentError(f"'{path}' cannot be loaded: {reason_of(error)}") from error


def _check_archive(path: Path) -> None:
    """Raises FileContentError if a `.keras` file is cut short or damaged."""
    with path.open("rb") as file:
        complete = zipfile.is_zipfile(file)
    if not complete:  # Keras says "File not found".
        raise FileContentError(
            f"'{path}' exists, but it is not a '.keras' file or was cut short: it does not end "
            "like a zip archive. Restore it from where it was copied, or save the model again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = _reason_of_sizes(archive, path.stat().st_size) or archive.testzip()
            if damaged is None and _WEIGHTS in archive.namelist():
                with _opened(archive, path) as weights:
                    _check_h5(weights, path)
    except FileContentError:
        raise
    # Raised by `zipfile` for wrong lengths, flags and names.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:  # The disk of temporary files is.
            raise
        damaged = repr(error)
    if damaged is not None:
        raise FileContentError(
            f"'{path}' is damaged ({damaged}). Restore it from where it was copied, or save the "
            "model again."
        )


def _reason_of_sizes(archive: zipfile.ZipFile, size: int) -> str | None:
    """Returns why the sizes of entries cannot be those of a model, or None. Nothing is read.

    Keras does not compress them. Archives that were compressed again are accepted.
    """
    entries = archive.infolist()
    if sum(entry.compress_size for entry in entries) > size:
        return f"its entries are longer than its {size} bytes"
    for entry in entries:
        justified = MOST_PER_BYTE * entry.compress_size
        most = justified if entry.filename == _WEIGHTS else min(justified, _LARGEST_TEXT)
        if entry.file_size > most and not entry.filename.startswith("assets/"):
            return f"'{entry.filename}' announces {entry.file_size} bytes"
    return None


@contextlib.contextmanager
def _opened(archive: zipfile.ZipFile, path: Path) -> Iterator[Any]:
    """Opens the weights in an archive for reading at any position, as `zipfile` cannot quickly."""
    entry = archive.getinfo(_WEIGHTS)
    if entry.compress_type == zipfile.ZIP_STORED:
        with path.open("rb") as file:
            file.seek(entry.header_offset + _NAME_LENGTHS)
            lengths = int.from_bytes(file.read(2), "little"), int.from_bytes(file.read(2), "little")
            start = entry.header_offset + _NAME_LENGTHS + 4 + sum(lengths)
            yield _Part(file, start, entry.file_size)
    else:
        with tempfile.TemporaryFile() as whole, archive.open(entry) as packed:
            with naming(tempfile.gettempdir()):
                shutil.copyfileobj(packed, whole)
            yield whole


class _Part(io.RawIOBase):
    """The bytes of a file from a position on, as a file of its own."""

    def __init__(self, file: IO[bytes], start: int, size: int) -> None:
        self._file, self._start, self._size, self._place = file, start, size, 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._start + self._place)
        part = memoryview(buffer)[: max(0, self._size - self._place)]
        count = self._file.readinto(part)  # type: ignore[attr-defined]  # Of binary files.
        self._place += count
        return count


def _check_h5(file: Any, path: Path) -> None:
    """Checks an HDF5 file before Keras reads its arrays.

    Raises:
        FileContentError: If an array is in another file, or announces more values than the bytes
            that are stored for it can justify.
    """
    try:
        with h5py.File(file) as stored:
            waiting, known = [stored["/"]], set()
            while waiting:
                group = waiting.pop()
                for name in group:
                    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                        raise ValueError(f"'{name}' is a link")
                    item = group[name]
                    address = h5py.h5o.get_info(item.id).addr
                    if address in known:  # A group may contain itself.
                        continue
                    known.add(address)
                    if isinstance(item, h5py.Group):
                        waiting.append(item)
                    elif isinstance(item, h5py.Dataset):
                        _check_dataset(item)
    # h5py raises many kinds of errors for wrong bytes.
    except Exception as error:
        raise FileContentError(
            f"'{path}' is damaged or crafted: {error}. Restore it from where it was copied, or "
            "save the model again."
        ) from error


def _check_dataset(dataset: h5py.Dataset) -> None:
    if dataset.external or dataset.is_virtual:
        raise ValueError(f"the values of '{dataset.name}' are in another file")
    nbytes, there = dataset.size * dataset.dtype.itemsize, dataset.id.get_storage_size()
    # Filters of HDF5 compress as zip archives do.
    if nbytes > (there if dataset.chunks is None else MOST_PER_BYTE * there):
        raise ValueError(f"'{dataset.name}' announces {nbytes} bytes, but has {there}")


def reason_of(error: Exception) -> str:
    """Returns a sentence that says why Keras cannot make a model from a config, or call a layer.

    Args:
        error: Error of Keras, whose message contains the config of every layer around the one that
            cannot be made, or all arguments of the call.
    """
    if isinstance(error, KeyError):  # Its message is the key alone.
        return f"An entry is missing: {error}."
    text = str(error)
    for before in ("Exception encountered: ", "Error encountered during deserialization: "):
        text = text.rpartition(before)[2].strip()
    # What a layer said is in bold, between the layer's name and the arguments.
    text = text.rpartition("\x1b[1m")[2].partition("\x1b[0m")[0].strip()
    # Further paragraphs, and what follows these words, are configs.
    first = itertools.takewhile(str.strip, (text or repr(error)).splitlines())
    line = " ".join(first).partition(" Full object config:")[0].partition(" config=")[0]
    return f"{textwrap.shorten(line, 300, placeholder=' ...').rstrip('.')}."
