"""Loads and checks `.keras` files, and says why Keras cannot make a model."""

from __future__ import annotations

import itertools
import textwrap
import zipfile
import zlib
from pathlib import Path

import keras

from masked_layers.files import FileContentError


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
    try:
        return keras.models.load_model(path, compile=compiled)
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
            damaged = archive.testzip()
    # Raised by `zipfile` for wrong lengths, flags and names.
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError) as error:
        damaged = repr(error)
    if damaged is not None:
        raise FileContentError(
            f"'{path}' is damaged ({damaged}). Restore it from where it was copied, or save the "
            "model again."
        )


def reason_of(error: Exception) -> str:
    """Returns a sentence that says why Keras cannot make a model from a config.

    Args:
        error: Error of Keras, whose message contains the config of every layer around the one that
            cannot be made.
    """
    if isinstance(error, KeyError):  # Its message is the key alone.
        return f"An entry is missing: {error}."
    text = str(error)
    for before in ("Exception encountered: ", "Error encountered during deserialization: "):
        text = text.rpartition(before)[2].strip()
    # Further paragraphs, and what follows these words, are configs.
    first = itertools.takewhile(str.strip, (text or repr(error)).splitlines())
    line = " ".join(first).partition(" Full object config:")[0].partition(" config=")[0]
    return f"{textwrap.shorten(line, 300, placeholder=' ...').rstrip('.')}."
