"""Data sets that are read from their published files in a folder, or downloaded."""

import gzip
import importlib
import io
import logging
import math
import pickle
import pickletools
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lottery_ticket_pruner.experiments.own import DatasetNotFoundError
from masked_layers.archives import MOST_PER_BYTE, read_npz
from masked_layers.files import FileContentError

logger = logging.getLogger(__name__)

_FOLDERS = {
    "mnist": ("mnist", "MNIST", "MNIST/raw", "datasets/mnist"),
    "fashion_mnist": (
        "fashion-mnist",
        "fashion_mnist",
        "FashionMNIST",
        "FashionMNIST/raw",
        "datasets/fashion-mnist",
    ),
    "cifar10": ("cifar10", "cifar-10", "datasets"),
}
_IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_NPZ_KEYS = ("x_train", "y_train", "x_test", "y_test")
_CIFAR_FOLDER = "cifar-10-batches-py"
_CIFAR_ARCHIVE = "cifar-10-python.tar.gz"
_CIFAR_BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")

# A published batch has 31 million bytes.
_LARGEST_BATCH = 1 << 28


class Found(NamedTuple):
    """Arrays of a data set, and where they were found.

    Attributes:
        source: The file, the folder of the files, or the function that downloaded them.
        places: Sources of the training and the test data, if they are in different files.
        arrays: `x_train, y_train, x_test, y_test`, not checked.
    """

    source: str
    places: tuple[str, str] | None
    arrays: tuple[Any, Any, Any, Any]


def load(name: str, data_dir: str | Path | None) -> Found:
    """Reads a data set from the folder, or downloads it with Keras.

    Raises:
        FileContentError: If a file has unexpected content or is damaged.
        DatasetNotFoundError: If the data is neither in the folder nor could be downloaded.
    """
    if data_dir is not None:
        for folder in _candidate_folders(name, Path(data_dir)):
            found = _read_folder(name, folder)
            if found is not None:
                logger.info("read %s from %s", name, folder)
                return found
    try:
        module = importlib.import_module(f"keras.datasets.{name}")
        (x_train, y_train), (x_test, y_test) = module.load_data()
    except Exception as error:  # A missing network raises errors of many types.
        raise DatasetNotFoundError(_how_to_provide(name, data_dir, error)) from error
    return Found(f"keras.datasets.{name}", None, (x_train, y_train, x_test, y_test))


def _candidate_folders(name: str, data_dir: Path) -> Iterator[Path]:
    yield from (data_dir / folder for folder in _FOLDERS[name])
    # The files of MNIST and Fashion-MNIST have the same names, so a folder named after one of them
    # is not used for the other.
    others = {Path(f).name for key, fs in _FOLDERS.items() if key != name for f in fs}
    if data_dir.resolve().name not in others - {"raw", "datasets"}:
        yield data_dir


def _read_folder(name: str, folder: Path) -> Found | None:
    """Returns the four arrays in a folder, or None if it does not contain this data set."""
    npz = folder / f"{name}.npz"
    if npz.is_file():
        stored = read_npz(npz)
        missing = [key for key in _NPZ_KEYS if key not in stored]
        if missing:
            raise FileContentError(f"{npz} lacks {', '.join(missing)}; it holds {list(stored)}.")
        x_train, y_train, x_test, y_test = (stored[key] for key in _NPZ_KEYS)
        return Found(f"'{npz}'", None, (x_train, y_train, x_test, y_test))
    if name == "cifar10":
        return _read_cifar_batches(folder)
    found = [_existing(folder / f"{stem}.gz", folder / stem) for stem in _IDX_STEMS]
    files = [file for file in found if file is not None]
    if len(files) < len(_IDX_STEMS):
        return None
    first, second = (f"'{images}' and '{labels.name}'" for images, labels in (files[:2], files[2:]))
    x_train, y_train, x_test, y_test = map(_read_idx, files)
    return Found(f"'{folder}'", (first, second), (x_train, y_train, x_test, y_test))


def _existing(*paths: Path) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


def _damaged(file: str | Path, error: Exception) -> FileContentError:
    """Converts errors of libraries about damaged bytes to one error that names the file."""
    reason = str(error).rstrip(".") or type(error).__name__
    return FileContentError(
        f"'{file}' is cut short or damaged: {reason}. Download it "
        "again, or restore it from where it was copied."
    )


def _read_idx(file: Path) -> np.ndarray:
    """Reads a file in the IDX format: two zero bytes, type, rank, big-endian sizes, the data."""
    most = file.stat().st_size * (MOST_PER_BYTE if file.suffix == ".gz" else 1)
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as content:

        def read(count: int) -> bytes:
            try:
                return content.read(count)
            # For a wrong checksum, a missing end or an invalid stream.
            except (OSError, EOFError, zlib.error) as error:
                raise _damaged(file, error) from error

        head = read(4)
        rank = head[3] if len(head) == 4 else 0
        sizes = read(4 * rank)
        if head[:3] != b"\x00\x00\x08" or len(sizes) < 4 * rank:
            raise FileContentError(f"{file} is not an IDX file of unsigned bytes: starts {head!r}.")
        shape = tuple(int(n) for n in np.frombuffer(sizes, ">u4"))
        size = math.prod(shape)
        if size > most:
            raise FileContentError(f"{file} should hold {shape} values and is too short for them.")
        values = np.frombuffer(read(size), np.uint8)
        if values.size != size or read(1):
            held = values.size if values.size < size else "more"
            raise FileContentError(f"{file} should hold {shape} values and holds {held}.")
    return values.reshape(shape)


def _read_cifar_batches(folder: Path) -> Found | None:
    plain = [folder / _CIFAR_FOLDER / batch for batch in _CIFAR_BATCHES]
    if folder.name == _CIFAR_FOLDER and (folder / _CIFAR_BATCHES[0]).is_file():
        plain = [folder / batch for batch in _CIFAR_BATCHES]
    archive = folder / _CIFAR_ARCHIVE
    if all(batch.is_file() for batch in plain):
        batches = [_cifar_batch(batch, batch.read_bytes()) for batch in plain]
        source = plain[0].parent
    elif archive.is_file():
        batches = [_cifar_batch(f"{archive}/{n}", c) for n, c in _cifar_members(archive)]
        source = archive
    else:
        return None
    images, labels = zip(*batches, strict=True)
    arrays = np.concatenate(images[:5]), np.concatenate(labels[:5]), images[5], labels[5]
    return Found(f"'{source}'", None, arrays)


def _cifar_members(archive: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive) as tar:
            for batch in _CIFAR_BATCHES:
                member = tar.getmember(f"{_CIFAR_FOLDER}/{batch}")
                if member.size > _LARGEST_BATCH:
                    raise ValueError(f"{member.name} has {member.size} bytes")
                content = tar.extractfile(member)
                if content is None:
                    raise LookupError(f"{member.name} is not a file")
                yield batch, content.read()
    # From tar, from gzip, or for a member that is missing or a folder.
    except (tarfile.TarError, OSError, EOFError, zlib.error, LookupError, AttributeError) as error:
        raise _damaged(archive, error) from error


def _cifar_batch(file: str | Path, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Returns images and labels of a batch: 3 072 bytes per image, first red, then green, blue."""
    try:
        _check_memo(content)
        batch = _ArraysOnlyUnpickler(io.BytesIO(content)).load()
        data, labels = batch[b"data"], np.asarray(batch[b"labels"])
        if data.dtype != np.uint8:
            raise ValueError(f"its images are of {data.dtype}")
        return data.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels
    except Exception as error:  # A damaged pickle may call anything with any arguments.
        raise _damaged(file, error) from error


def _check_memo(content: bytes) -> None:
    """Raises ValueError if a pickle numbers an object beyond the number of objects it contains.

    Unpickling allocates memory for all numbers up to the largest one.
    """
    for count, (opcode, argument, _) in enumerate(pickletools.genops(content)):
        numbers = opcode.name in ("PUT", "BINPUT", "LONG_BINPUT")
        if numbers and argument is not None and argument > count:
            raise ValueError(f"object {argument} of at most {count}")


class _ArraysOnlyUnpickler(pickle.Unpickler):
    """Reads the published CIFAR-10 batches, and refuses pickles that contain anything else."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, encoding="bytes")

    def find_class(self, module: str, name: str) -> object:
        if (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        # Files older than NumPy 2 refer to `numpy.core`.
        if module.split(".")[0] == "numpy" and name in ("_reconstruct", "ndarray", "dtype"):
            # Arrays are created empty here; NumPy's own function would accept any shape. The class
            # is only an argument, and must not be called.
            return {"_reconstruct": _empty, "ndarray": name, "dtype": np.dtype}[name]
        raise pickle.UnpicklingError(f"A CIFAR-10 batch does not contain {module}.{name}.")


def _empty(*_: Any) -> np.ndarray:
    return np.empty(0, np.uint8)


def _how_to_provide(name: str, data_dir: str | Path | None, error: Exception) -> str:
    if name == "cifar10":
        files = (
            f"`{_CIFAR_ARCHIVE}` or its folder `{_CIFAR_FOLDER}`, as published at "
            "https://www.cs.toronto.edu/~kriz/cifar.html, or `cifar10.npz` with the arrays "
            f"{', '.join(_NPZ_KEYS)}"
        )
    else:
        files = f"the four files {', '.join(f'`{stem}.gz`' for stem in _IDX_STEMS)}, as published"
        files += f", or `{name}.npz` with the arrays {', '.join(_NPZ_KEYS)}"
    looked = f"is not in {data_dir}" if data_dir is not None else "was not given a folder"
    return (
        f"The data set {name} {looked} and could not be downloaded ({error}). Put into a folder "
        f"DIR, or into DIR/{_FOLDERS[name][0]}, {files}; then name it with --data-dir DIR "
        "(in Python: data_dir=DIR)."
    )
