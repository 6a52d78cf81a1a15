"""Files of arrays that others may have damaged, read without trusting what they say of themselves.

NumPy takes the memory that the header of an array asks for before it looks for the data. Here a
header is believed no more than the bytes behind it can justify.
"""

from __future__ import annotations

import math
import os
import zipfile
from typing import BinaryIO

import numpy as np

# No stream of zlib or gzip holds more than this many bytes for each of its own.
MOST_PER_BYTE = 1032
_CHUNK = 1 << 20


def read_npz(path: str | os.PathLike[str], *, limit: int | None = None) -> dict[str, np.ndarray]:
    """Reads the arrays of an `.npz` file, which need memory only once all sizes have been checked.

    Args:
        path: The file.
        limit: Most bytes that its arrays may take together. Default: what a file of this length
            can hold.

    Returns:
        The arrays by name, writable, in the order of the file. None of them holds objects.

    Raises:
        OSError: If the file is missing or cannot be read.
        ValueError: If it is no such file, or is cut short or damaged; the message names it.
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
        # What `zipfile`, its decompressors and NumPy make of wrong bytes: a dozen exceptions.
        except Exception as error:
            reason = str(error).rstrip(".") or type(error).__name__
            raise ValueError(
                f"'{path}' is no .npz file, or is cut short or damaged: {reason}. Restore it from "
                "a copy."
            ) from error


def _read(file: BinaryIO, limit: int | None) -> dict[str, np.ndarray]:
    size = file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        # Entries may not share bytes, or few of them could stand for any number of arrays.
        if sum(member.compress_size for member in members) > size:
            raise ValueError(f"its entries are longer than its {size} bytes")
        if len({member.filename for member in members}) < len(members):
            raise ValueError("it holds two entries of one name")
        for member in members:
            # A wrong length before the next entry hides it in this one.
            inside = member.orig_filename.encode("utf-8", "replace") + member.extra + member.comment
            if b"PK\x01\x02" in inside:
                raise ValueError(f"the entry of '{member.filename[:40]}' holds another one")
            if member.file_size > MOST_PER_BYTE * member.compress_size:
                raise ValueError(f"{member.file_size} bytes cannot come from so few")
        total = sum(member.file_size for member in members)
        if limit is not None and total > limit:
            raise ValueError(f"its arrays take {total} bytes where at most {limit} are expected")
        return {
            member.filename.removesuffix(".npy"): _read_array(archive, member) for member in members
        }


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"'{member.filename}' has the version {version} of NumPy's format")
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = header(file)
        if dtype.hasobject or not dtype.itemsize or any(length < 0 for length in shape):
            raise ValueError(f"'{member.filename}' holds {dtype}{shape}, which is not read")
        count, left = math.prod(shape), member.file_size - file.tell()
        if count * dtype.itemsize != left:
            raise ValueError(
                f"'{member.filename}' should hold {count} values of {dtype} and has {left} bytes"
            )
        array = np.empty(count, dtype)
        buffer, start = array.view(np.uint8), 0
        while chunk := file.read(_CHUNK):  # To the end, where the checksum is compared.
            buffer[start : start + len(chunk)] = np.frombuffer(chunk, np.uint8)
            start += len(chunk)
        if start != left:
            raise ValueError(f"'{member.filename}' ends after {start} of {left} bytes")
    return array.reshape(shape[::-1]).T if fortran_order else array.reshape(shape)
