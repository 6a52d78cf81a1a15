"""Reads `.npz` files without trusting the sizes in their headers.

NumPy allocates the memory that the header of an array announces before it reads the data. Here
the announced sizes are first compared with what the number of bytes can justify.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from typing import BinaryIO

import numpy as np

from masked_layers.files import FileContentError

# A zlib or gzip stream never expands to more than this many bytes per byte.
MOST_PER_BYTE = 1032
_CHUNK = 1 << 20

# The record at the end of a zip file: signature, two numbers of disks, entries on this disk, all
# entries, size and place of their directory, length of a comment.
_END = struct.Struct("<4s4H2LH")
_ZIP64_ENDS = 56 + 20


def read_npz(path: str | os.PathLike[str], *, limit: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an `.npz` file, allocating memory only after all sizes were checked.

    Args:
        path: Path of the file.
        limit: Maximum total size of the arrays in bytes. Default: the most that a file of this
            length can contain.

    Returns:
        The arrays by name, writable, in the order of the file. Object arrays are refused.

    Raises:
        OSError: If the file is missing or cannot be read.
        FileContentError: If it is not an `.npz` file, or is cut short or damaged. The message names
            it.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115
    except FileNotFoundError as error:
        raise FileNotFoundError(f"There is no file '{path}'.") from error
    except IsADirectoryError as error:
        raise IsADirectoryError(f"'{path}' is a folder. Expected an .npz file.") from error
    with file:
        try:
            return _read(file, limit)
        # For wrong bytes, `zipfile`, its decompressors and NumPy raise a dozen kinds of exceptions.
        except Exception as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise FileContentError(
                f"'{path}' is not an .npz file, or is cut short or damaged: {reason}. Restore "
                "it from a copy."
            ) from error


def _read(file: BinaryIO, limit: int | None) -> dict[str, np.ndarray]:
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        _check_end(file, size, len(members))
        # Entries must not share bytes; otherwise a few bytes could represent many arrays.
        if sum(member.compress_size for member in members) > size:
            raise ValueError(f"its entries are longer than its {size} bytes")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("it contains two entries with the same name")
        for member in members:
            # A wrong length before the next entry hides it in this one.
            inside = member.orig_filename.encode("utf-8", "replace") + member.extra + member.comment
            if b"PK\x01\x02" in inside:
                raise ValueError(f"the entry of '{member.filename[:40]}' contains another one")
            if member.file_size > MOST_PER_BYTE * member.compress_size:
                raise ValueError(f"{member.file_size} bytes cannot come from so few")
        total = sum(member.file_size for member in members)
        if limit is not None and total > limit:
            raise ValueError(f"its arrays take {total} bytes; at most {limit} are expected")
        return {
            member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members
        }


def _check_end(file: BinaryIO, size: int, found: int) -> None:
    """Raises a ValueError if the last record of a zip file does not agree with the entries found.

    `zipfile` reads the entries that it finds in the directory, even if these are not all or if the
    record is followed by other bytes, and then a file without any entry is one that was changed.
    """
    file.seek(size - _END.size)
    signature, *_, entries, length, start, comment = _END.unpack(file.read(_END.size))
    if signature != b"PK\x05\x06" or comment:
        raise ValueError("it does not end where its directory ends")
    # More entries or bytes than the fields can hold are in records of ZIP64 before this one, which
    # `zipfile` already writes from 2 GiB.
    if entries < 0xFFFF and entries != found:
        raise ValueError(f"it has {found} of {entries} entries")
    between = size - _END.size - start - length
    if max(length, start) < 0xFFFFFFFF and between not in (0, _ZIP64_ENDS):
        raise ValueError("its directory is not where its end says")


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"'{member.filename}' has version {version} of NumPy's format")
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(file)
        if dtype.hasobject or not dtype.itemsize or any(length < 0 for length in shape):
            raise ValueError(f"'{member.filename}' contains {dtype}{shape}, which is not supported")
        count, left = math.prod(shape), member.file_size - file.tell()
        if count * dtype.itemsize != left:
            raise ValueError(
                f"'{member.filename}' should contain {count} values of {dtype} but has {left} bytes"
            )
        array = np.empty(count, dtype)
        buffer, start = array.view(np.uint8), 0
        while chunk := file.read(_CHUNK):  # To the end, where the checksum is compared.
            buffer[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
            start += len(chunk)
        if start != left:
            raise ValueError(f"'{member.filename}' ends after {start} of {left} bytes")
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
