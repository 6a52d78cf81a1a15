"""The notes of the conformance table, grouped by what they say in short.

Notes name layers, weights and sizes of their rows, so that hardly two are the same. A reader wants
the few reasons behind them first, and the note of a row only then.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

# What a note contains, as a pattern, and what the page says of it. A note can have several reasons.
# One without any is a reason by itself, so nothing is lost when the messages change.
REASONS = {
    "same bits": {r"Nothing to mask": "The model has nothing to mask."},
    "masked": {
        r"to mask its weights:": "The class is not registered; `masked_layers.register` does, with "
        "the names of the weights that shall get masks.",
        r"it is quantized": "A quantized weight is not trained.",
        r"spectral normalization overwrites": "`SpectralNormalization` overwrites the weights of "
        "its layer.",
    },
    "exported": {
        r"input_signature": "Exported with an `input_signature` of fixed sizes only.",
        r"this version of JAX writes": "TensorFlow cannot execute an operation that JAX writes.",
    },
    "shrunk": {
        r"on symbolic inputs without sizes|uses a size that is not known": "The `call` of a "
        "composite layer cannot run on symbolic inputs: it asks for a size that is unknown then, "
        "or for values.",
        r"normalizes all channels together": "A normalization over all channels left none of them "
        "out.",
        r"unknown class": "`shrink` has no rule for the class of a layer.",
        r"a mode of its own": "A layer inside a composite layer does not follow its mode, training "
        "or inference.",
        r"inside it has no config": "A layer inside a composite layer has no config.",
        r"because Keras cannot create it from its config": "Keras cannot create a layer from its "
        "config, so there is no smaller one.",
        r"LoRA is enabled": "LoRA is enabled.",
        r": quantized": "A layer is quantized.",
        r"Nothing to mask": "The model has nothing to mask.",
        r"it is stateful": "A layer keeps a state between calls.",
        r"exactly one axis": "A kernel makes several axes of the outputs, or none.",
        r"changes a variable": "The `call` of a layer changes a variable.",
        r"reads a weight or an array": "The `call` of a layer reads a weight or an array itself.",
        r"weights besides those": "A composite layer has weights of its own.",
        r"Expected a Sequential or Functional": "A subclassed model has no graph of layers.",
    },
    "tfmot": {
        r"needs Keras 3": "The model cannot be made with Keras 2.",
        r"layer by layer": "Layer by layer, since tfmot refuses the model as a whole for a layer "
        "that it does not know.",
    },
    "PQuantML": {
        r"positional arguments|required argument|Iterating over a symbolic|on a list of inputs": (
            "A layer is called on fewer or more inputs than it takes."
        ),
        r"shape of the target variable": "A weight is assigned to one of another shape.",
    },
}


class Note(NamedTuple):
    """What a cell says beside its answer.

    Attributes:
        row: Name of the row.
        column: Head of the column, or name of the peer.
        text: The note.
        backends: Those that say so.
        measured: Those on which the row was measured.
    """

    row: str
    column: str
    text: str
    backends: tuple[str, ...] = ()
    measured: tuple[str, ...] = ()


def plain(text: str) -> str:
    """Returns a message without colors, and without addresses of objects, of each run its own."""
    return re.sub(r"\x1b\[\d+m| at 0x[0-9a-f]*", "", text).strip()


def escaped(text: str) -> str:
    """Returns a text without marks of Markdown."""
    for mark in "\\`*_{}[]<>|":
        text = text.replace(mark, f"\\{mark}")
    return text


def reasons(note: Note) -> list[str]:
    """Returns what a note says in short, in Markdown; the note itself if that is not known."""
    known = REASONS.get(note.column, {})
    found = [short for pattern, short in known.items() if re.search(pattern, note.text)]
    return found or [escaped(note.text)]


def by_reason(notes: Iterable[Note]) -> list[str]:
    """Returns a list of reasons for each column, those of most rows first."""
    columns: dict[str, dict[str, list[Note]]] = {}
    for note in notes:
        of_column = columns.setdefault(note.column, {})
        for reason in reasons(note):
            of_column.setdefault(reason, []).append(note)
    lines = []
    for column, found in columns.items():
        lines += [f"### {column}", ""]
        counted = [(len({note.row for note in those}), key) for key, those in found.items()]
        for count, reason in sorted(counted, key=lambda pair: -pair[0]):
            counts = f"{count} row{'s' * (count > 1)}"
            lines.append(f"- **{reason.rstrip('.')}** ({counts}): {rows(found[reason])}")
        lines.append("")
    return lines


def rows(notes: list[Note]) -> str:
    """Returns the names of rows; of those of which not all backends say so, after the backends."""
    backends: dict[str, set[str]] = {}
    for note in notes:
        backends.setdefault(note.row, set()).update(note.backends)
    measured = {note.row: note.measured for note in notes}
    places: dict[str, list[str]] = {"": []}
    for row, those in backends.items():
        where = only([backend for backend in measured[row] if backend in those], measured[row])
        places.setdefault(where, []).append(escaped(row))
    named = [f"{where}: " * bool(where) + "; ".join(those) for where, those in places.items()]
    return ". ".join(text for text in named if text)


def only(backends: Sequence[str], measured: Sequence[str]) -> str:
    """Returns the names of backends, empty if those are all that were measured."""
    return "" if set(backends) == set(measured) else ", ".join(backends)


def word_for_word(notes: Iterable[Note]) -> list[str]:
    """Returns each different note once, after all cells that have it."""
    found: dict[str, dict[str, dict[str, list[str]]]] = {}
    for note in notes:
        of_row = found.setdefault(note.text, {}).setdefault(note.row, {})
        of_row.setdefault(only(note.backends, note.measured), []).append(note.column)
    lines = []
    for text, of_rows in found.items():
        places: dict[str, list[str]] = {}
        for row, columns in of_rows.items():
            where = " and ".join(
                ", ".join(heads) + f" ({backends})" * bool(backends)
                for backends, heads in columns.items()
            )
            places.setdefault(where, []).append(f"**{escaped(row)}**")
        cells = "; ".join(f"{', '.join(names)}, {where}" for where, names in places.items())
        lines.append(f"- {cells}: {escaped(text)}")
    return lines
