"""The files of tickets in run folders."""

import warnings
from pathlib import Path

import keras

import masked_layers as ml
from lottery_ticket_pruner.compression import save_model
from masked_layers.ticket_files import SUFFIX, UnsuitableModelError

# The second one: in folders of earlier versions, and for models that a ticket file cannot describe.
SUFFIXES = (SUFFIX, ".keras")


def save(model: keras.Model, folder: Path, name: str) -> Path:
    """Writes a masked model as a ticket file, or if it cannot be, as a `.keras` file.

    Args:
        model: The model.
        folder: Folder of the file.
        name: Its name, without a suffix. A file of this name with the other suffix is removed.

    Returns:
        Path of the file, which is complete or absent.

    Warns:
        UserWarning: If it is a `.keras` file.
    """
    file, other = (folder / f"{name}{suffix}" for suffix in SUFFIXES)
    try:
        ml.save_ticket(model, file)
    except ValueError as error:
        file, other = other, file
        # Without the folder, which a run that replaces another one is moved from.
        reason = error.reason if isinstance(error, UnsuitableModelError) else str(error)
        warnings.warn(
            f"'{file.name}' is written in place of a ticket file, for `keras.models.load_model`. "
            f"{reason}",
            stacklevel=2,
        )
        save_model(model, file)
    other.unlink(missing_ok=True)
    return file


def find(folder: Path, name: str = "ticket") -> Path:
    """Returns the path of a ticket in a folder. If there is none, that of a ticket file."""
    files = [folder / f"{name}{suffix}" for suffix in SUFFIXES]
    return next((file for file in files if file.is_file()), files[0])


def tickets_in(folder: Path) -> list[Path]:
    """Returns the tickets in the folder of a `lottery-ticket run`, in the order of their names."""
    names = {file.stem for suffix in SUFFIXES for file in folder.glob(f"ticket*{suffix}")}
    return [find(folder, name) for name in sorted(names)]
