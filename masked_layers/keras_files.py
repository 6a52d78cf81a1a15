"""Files of Keras' own format, `.keras`: how they are made, and a check that one is whole."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import keras


def how_to_save(path: Path) -> str:
    """Says how a `.keras` file is made from a model that lies in another one."""
    of_weights = path.name.endswith(".weights.h5")
    name = path.name.removesuffix(".weights.h5") if of_weights else path.stem
    file = str(path.with_name(f"{name}.keras"))
    if of_weights:
        return f"Load these weights into their model, and save it with `model.save({file!r})`."
    if path.suffix in (".h5", ".hdf5"):
        return (
            f"Save the model of this file in that format: `import keras, masked_layers; "
            f"keras.models.load_model({str(path)!r}).save({file!r})`."
        )
    return "A model is saved as one with `model.save('NAME.keras')`."


def load_model(path: Path) -> keras.Model:
    """Loads a `.keras` file without its compilation, after a check that it is whole.

    Raises:
        ValueError: If it is cut short, damaged, nothing that Keras wrote, or holds a layer of a
            class that is not imported.
    """
    with path.open("rb") as file:
        complete = zipfile.is_zipfile(file)
    if not complete:  # Keras says "File not found".
        raise ValueError(
            f"'{path}' exists, but is no '.keras' file or was cut short: it does not end as a zip "
            "archive does. Restore it from where it was copied, or save the model again."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    # What `zipfile` makes of wrong lengths, flags and names.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        damaged = repr(error)
    if damaged is not None:
        raise ValueError(
            f"'{path}' is damaged ({damaged}). Restore it from where it was copied, or save the "
            "model again."
        )
    try:
        return keras.models.load_model(path, compile=False)
    except KeyError as error:
        raise ValueError(f"'{path}' is not a file that Keras wrote: {error}.") from error
    # Whatever else Keras makes of the file, or of a layer that is not imported.
    except Exception as error:
        raise ValueError(f"'{path}' cannot be loaded: {type(error).__name__}: {error}") from error
