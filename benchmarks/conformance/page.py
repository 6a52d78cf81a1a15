"""The page of the conformance table, from the results that are stored."""

import json
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.conformance.reasons import Note, by_reason, escaped, plain, word_for_word

BACKENDS = {"tensorflow": "TensorFlow", "jax": "JAX", "torch": "torch"}
PEERS = {"tfmot": "tfmot", "pquant": "PQuantML"}
# Keys and heads of the columns.
HEADS = {
    "converted": "same bits",
    "masked": "masked",
    "exact": "exact",
    "zero": "zero",
    "saved": "saved",
    "stripped": "stripped",
    "exported": "exported",
    "shrunk": "shrunk",
}
MEANING = {
    "converted": "`convert_to_masked` leaves every bit of every output as it is.",
    "masked": "How many of the weights with two or more axes, except biases, have a mask. Those "
    "without are named in the notes; most are tables of positions and class tokens.",
    "exact": '`update_masks("smallest_weights", sparsity=0.8, scope="global")` prunes exactly '
    "floor(0.8 size) weights, and no pruned weight is larger than a kept one, by NumPy.",
    "zero": "All pruned raw weights are set to NaN, and the outputs keep their bits: nothing reads "
    "a pruned weight.",
    "saved": "A `.keras` file brings back the masks, and every bit of the outputs.",
    "stripped": "`strip_masks` leaves the classes of the original and every bit of the pruned "
    "model's outputs.",
    "exported": "The exported program has the outputs of the pruned model up to rounding (1e-4 of "
    "the largest; in mixed precision the epsilon of its dtype): a SavedModel of "
    "`export_sparse_saved_model`, run by TensorFlow alone, and on torch the file "
    "of `export_sparse_torch`, run by `torch.jit`.",
    "shrunk": "The share of the model's weights that `shrink` leaves after half of the channels "
    "were pruned, with outputs equal up to the same rounding.",
}
INTRODUCTION = """# Conformance: what works with which model

<!-- Written by `python -m benchmarks.conformance --page`; do not edit. -->

Every row is a model with random weights, on which each feature was called and its result compared,
on every backend that is named. The table is measured by

```sh
KERAS_BACKEND=tensorflow python -m benchmarks.conformance   # and jax, torch
python -m benchmarks.conformance --page
```

{cells}

"refused" is an error that is raised on purpose and says what to do, "error" any other one. "no"
says that the result was another, "not possible" that there is nothing to check, because no weight
could be masked, and "no model" that Keras or the library of the model cannot make it there. What is
not "yes" has its [reason below the tables](#reasons).
"""
PEERS_INTRODUCTION = """## What other libraries mask

The same models, asked how many of these weights the library prunes
(`python -m benchmarks.conformance --peer tfmot`, `--peer pquant`). "no model" is one that cannot be
made with the library's Keras. PQuantML calls each layer on the output of the one before it, in the
order of `model.layers`, and so refuses models that branch; its extra asks for TensorFlow 2.20.
"""
REASONS_INTRODUCTION = """## Reasons

Why cells are not "yes", or not complete. A row can have several reasons, and counts at each. The
note of a row, which names its layers and weights, is [below](#every-note-word-for-word).
"""
NOTES_INTRODUCTION = """## Every note, word for word

Each stands after the cells that have it. A long message ends in "...", and of many layers only the
first are named.
"""
ABSENT = "-"
ORDER = ("Layers and kinds of models", "keras.applications", "KerasHub")
Row = dict[str, Any]


def stored(results: Path, name: str) -> dict[str, Row]:
    path = results / f"{name}.json"
    rows: dict[str, Row] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    return rows


def answer(row: Row | None, column: str) -> str:
    """Returns the answer of a cell; cells after the end of a process are missing."""
    if row is None:
        return ABSENT
    return str(row["cells"].get(column, ["not reached"])[0])


def joined(answers: Iterable[str]) -> str:
    """Returns one answer if all are the same, or all of them."""
    answers = list(answers)
    measured = {a for a in answers if a != ABSENT}
    if len(measured) == 1 and len(set(answers)) == 1:
        return answers[0]
    return " / ".join(answers)


def notes(names: list[str], results: dict[str, dict[str, Row]]) -> list[Note]:
    """Returns the notes of rows, by column; those that several backends share once."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for column in (*HEADS, "ended"):
        for name in names:
            for backend, rows in results.items():
                if name not in rows:
                    continue
                said, text = rows[name]["cells"].get(column, ["", ""])
                # Without a model, all columns have the same note.
                head = said if said == "no model" else HEADS.get(column, column)
                if text and not text.startswith("needs '"):
                    backends = found.setdefault((name, head, plain(text)), [])
                    backends += [BACKENDS[backend]] * (BACKENDS[backend] not in backends)
    measured = {n: tuple(BACKENDS[b] for b, rows in results.items() if n in rows) for n in names}
    every = [Note(*key, tuple(those), measured[key[0]]) for key, those in found.items()]
    heads = [*HEADS.values(), "ended", "no model"]
    return sorted(every, key=lambda note: heads.index(note.column))


def table(names: list[str], results: dict[str, dict[str, Row]]) -> list[str]:
    lines = ["| | " + " | ".join(HEADS.values()) + " |", "|---" * (len(HEADS) + 1) + "|"]
    for name in names:
        rows = [rows.get(name) for rows in results.values()]
        cells = [joined(answer(row, column) for row in rows) for column in HEADS]
        lines.append(f"| {escaped(name)} | " + " | ".join(cells) + " |")
    return lines


def overview(results: dict[str, dict[str, Row]], size: int) -> list[str]:
    """Returns the counts of answers, by backend."""
    lines = ["| | rows | " + " | ".join(HEADS.values()) + " |", "|---" * (len(HEADS) + 2) + "|"]
    for backend, rows in results.items():
        cells = []
        for column in HEADS:
            answers = Counter(kind(answer(row, column)) for row in rows.values())
            rest = "".join(f", {count} {k}" for k, count in answers.most_common() if k != "yes")
            cells.append(f"{answers['yes']}{rest}")
        lines.append(f"| {BACKENDS[backend]} | {len(rows)} of {size} | " + " | ".join(cells) + " |")
    return lines


def kind(given: str) -> str:
    """Returns what an answer counts as in the overview: numbers count as yes, if complete."""
    if " of " in given:
        masked, _, size = given.partition(" of ")
        return "yes" if masked == size else "in part"
    return "yes" if given.endswith("%") else given


def peers(names: list[str], results: Path) -> tuple[list[str], list[Note]]:
    """Returns the section of the peers, and their notes."""
    every = {name: stored(results, name) for name in PEERS}
    found = {name: rows for name, rows in every.items() if rows}
    absent = [PEERS[name] for name, rows in every.items() if not rows]
    missing = [f"Not measured so far: {', '.join(absent)}.", ""] if absent else []
    if not found:
        return [PEERS_INTRODUCTION, *missing], []
    ours = stored(results, "tensorflow")
    heads = ["", "this library", *(PEERS[name] for name in found)]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    notes = []
    for name in names:
        if all(name not in rows for rows in found.values()):
            continue
        cells = [answer(rows.get(name), "masked") for rows in (ours, *found.values())]
        lines.append(f"| {escaped(name)} | " + " | ".join(cells) + " |")
        for peer, rows in found.items():
            if name in rows and (note := rows[name]["cells"].get("masked", ["", ""])[1]):
                notes.append(Note(name, PEERS[peer], plain(note)))
    used = [f"{PEERS[name]}: {joined_versions(rows)}." for name, rows in found.items()]
    head = [PEERS_INTRODUCTION, " ".join(used), "", *missing]
    notes.sort(key=lambda note: list(PEERS.values()).index(note.column))
    return [*head, *lines, "", *by_reason(notes)], notes


def joined_versions(rows: dict[str, Row]) -> str:
    return "; ".join(sorted({row["versions"] for row in rows.values()}))


def progress(found: dict[str, dict[str, Row]], size: int) -> str:
    """Returns a sentence of how many rows are known on each backend."""
    counts = [f"{len(found.get(key, ()))} on {name}" for key, name in BACKENDS.items()]
    if all(len(found.get(key, ())) == size for key in BACKENDS):
        return f"All of its {size} rows are measured, on {', '.join(BACKENDS.values())}."
    return f"Of its {size} rows, these are measured so far: {', '.join(counts)}."


def page(results: Path) -> str:
    """Returns the page of the results in a folder."""
    from benchmarks.conformance.__main__ import makers

    found = {backend: stored(results, backend) for backend in BACKENDS}
    found = {backend: rows for backend, rows in found.items() if rows}
    rows = makers()
    cells = progress(found, len(rows))
    if len(found) > 1:
        named = ", ".join(BACKENDS[backend] for backend in found)
        cells += (
            f" A cell holds one answer if all backends gave it, and otherwise those of {named}, in "
            f'this order; "{ABSENT}" is not measured.'
        )
    lines = [INTRODUCTION.format(cells=textwrap.fill(cells, 100))]
    lines += [f"- **{HEADS[key]}**: {text}" for key, text in MEANING.items()]
    lines += ["", "## Overview", ""]
    lines += [
        "Numbers of rows. A number without a word counts those that are right: for masked, those "
        "of which every weight is masked, and for shrunk, those with a smaller model.",
        "",
    ]
    lines += [*overview(found, len(rows)), ""]
    lines += [f"- {BACKENDS[b]}: {joined_versions(known)}" for b, known in found.items()]
    for family in ORDER:
        names = [m.name for m in rows if m.family == family]
        names = [name for name in names if any(name in known for known in found.values())]
        if not names:
            continue
        lines += ["", f"## {family}", "", *table(names, found)]
    names = [m.name for m in rows]
    own = notes(names, found)
    section, theirs = peers(names, results)
    lines += ["", REASONS_INTRODUCTION, *by_reason(own), *section]
    lines += [NOTES_INTRODUCTION, *word_for_word([*own, *theirs])]
    return "\n".join(lines).rstrip() + "\n"
