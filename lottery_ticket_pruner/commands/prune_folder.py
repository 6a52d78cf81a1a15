"""The files of `lottery-ticket prune` in its folder, written and read back with checksums."""

import csv
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_ticket_pruner.compression import STATE_FILE, Comparison, Findings
from lottery_ticket_pruner.experiments import checksums
from lottery_ticket_pruner.experiments.reports import pruning
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, RESULTS_FILE, as_bytes, is_pruned
from lottery_ticket_pruner.experiments.run_folder import versions, write_json
from lottery_ticket_pruner.experiments.written import refuse_to_replace
from lottery_ticket_pruner.fingerprints import of_json
from masked_layers.checksums import SUMS_FILE
from masked_layers.files import UNEXPECTED_FORM, FileContentError, replacing

MODEL_FILE = "model.keras"
RESULT_FILE = "result.json"
SCAN_FILE = "sensitivity.csv"
# `lottery-ticket report` writes these again.
_REPORT_FILES = ("report.html", "model_card.md")
_SERVED = "served"
# Folder with the state of the search.
SEARCH = "search"


def models_in(folder: Path) -> list[Path]:
    """Returns the models that a folder of a search has: the file, and the SavedModel if written.

    A SavedModel of an earlier search, which stays if the export fails, is left out.
    """
    if not (folder / RESULT_FILE).is_file():
        return []
    served = folder / _SERVED / "1"
    try:
        was_exported = is_pruned(folder) and read(folder)[1].served is not None
    except FileContentError:
        was_exported = False
    return [folder / MODEL_FILE, *([served] if was_exported and served.is_dir() else [])]


def check_that_nothing_is_lost(folder: Path, model: str | None) -> None:
    """Refuses a folder in which a search would replace files that no search has written.

    Args:
        folder: The folder.
        model: The model that is pruned, perhaps a file.

    Raises:
        ValueError: If one of the files to write is the model, or the folder holds no search.
    """
    file = folder / MODEL_FILE
    if model is not None and file.exists() and Path(model).exists() and file.samefile(model):
        raise ValueError(
            f"The pruned model would replace '{file}', from which it is made. Choose another "
            "folder with --out."
        )
    if (folder / SEARCH / STATE_FILE).exists() or is_pruned(folder):
        return
    names = (CONFIG_FILE, SUMS_FILE, MODEL_FILE, RESULT_FILE, RESULTS_FILE, SCAN_FILE)
    found = [name for name in (*names, *_REPORT_FILES, _SERVED) if (folder / name).exists()]
    refuse_to_replace(folder, found, "search of `lottery-ticket prune`")


def begin(folder: Path) -> None:
    """Marks a folder as incomplete, so that no new model is taken for that of an earlier search."""
    for name in (CONFIG_FILE, SUMS_FILE):
        (folder / name).unlink(missing_ok=True)


def write(findings: Findings, facts: pruning.Facts, folder: Path) -> None:
    """Writes the tables, the report, the model card, all checksums and the configuration."""
    fields = [field.name for field in dataclasses.fields(Findings)]
    stored = {name: getattr(findings, name) for name in fields}
    stored["test"] = dataclasses.asdict(findings.test)
    content = {"findings": stored, "facts": dataclasses.asdict(facts)}
    content = json.loads(json.dumps(content))
    write_json(folder / RESULT_FILE, content | {"checksum": of_json(content)})
    _write_text(folder / RESULTS_FILE, table(findings.rows))
    if findings.scan:
        _write_text(folder / SCAN_FILE, table(findings.scan))
    else:  # Of an earlier search.
        (folder / SCAN_FILE).unlink(missing_ok=True)
    write_report(findings, facts, folder)
    options = as_bytes({"command": "prune", **facts.options, "versions": versions()})
    names = (MODEL_FILE, RESULT_FILE, RESULTS_FILE, SCAN_FILE, *_REPORT_FILES)
    files = [folder / name for name in names if (folder / name).is_file()]
    if facts.served is not None:  # Otherwise it is of an earlier search.
        files += [file for file in (folder / _SERVED).rglob("*") if file.is_file()]
    checksums.write(folder, files, {CONFIG_FILE: options})
    with replacing(folder / CONFIG_FILE) as whole:  # Marks the folder as complete.
        whole.write(options)


def write_report(findings: Findings, facts: pruning.Facts, folder: Path) -> None:
    """Writes the web page and the model card, and their checksums where there are others."""
    texts = (pruning.page(findings, facts), pruning.card(findings, facts))
    for name, text in zip(_REPORT_FILES, texts, strict=True):
        _write_text(folder / name, text)
    checksums.update(folder, _REPORT_FILES)


def read(folder: Path) -> tuple[Findings, pruning.Facts]:
    """Reads what `write` has stored.

    Raises:
        FileContentError: If the file is missing or damaged, or a checksum does not match.
    """
    file = folder / RESULT_FILE
    try:
        stored = json.loads(file.read_text())
        # A damaged name of the checksum must not make it a file without one.
        if more := stored.keys() - {"findings", "facts", "checksum"}:
            raise ValueError(f"it has further entries: {sorted(more)}")
        checksum = stored.pop("checksum", None)  # Earlier files have none.
        if checksum not in (None, of_json(stored)):
            raise ValueError("its checksum does not match")
        findings, facts = stored["findings"], stored["facts"]
        test = findings["test"]
        pairs = {name: tuple(test[name]) for name in ("worse", "better")}
        interval = None if test["interval"] is None else tuple(test["interval"])
        findings["test"] = Comparison(**test | pairs | {"interval": interval})
        findings |= {k: tuple(findings.get(k, ())) for k in ("notes", "cautions")}
        found = Findings(**findings), pruning.Facts(**facts)
        _check(*found)
    # Whatever else than a result the file describes, the tables cannot be made of it.
    except (OSError, ArithmeticError, *UNEXPECTED_FORM) as error:
        raise FileContentError(
            f"'{file}' is missing or damaged ({error}). Run `lottery-ticket prune` with the same "
            "options again: it writes the file from the finished search."
        ) from error
    checksums.check(folder, [name for name in (CONFIG_FILE,) if (folder / name).is_file()])
    return found


def _check(findings: Findings, facts: pruning.Facts) -> None:
    """Raises an error of some type if a report cannot be made of a result."""
    str(findings)
    pruning.sheets(findings, facts)
    pruning.may_lose(findings.scan, 0.0, dense=1.0)
    texts = (findings.conclusion, *findings.notes, *findings.cautions, facts.name, facts.data)
    if not all(isinstance(text, str) for text in texts) or not isinstance(facts.options, dict):
        raise ValueError("its texts or options are others")
    numbers = [row[name] for row in findings.rows for name in ("sparsity", "validation")]
    numbers += [findings.tolerance, *facts.dense_sizes.values(), *facts.kept_sizes.values()]
    if not all(x is None or (type(x) in (int, float) and math.isfinite(x)) for x in numbers):
        raise ValueError("its numbers are not finite")


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_text(file: Path, text: str) -> None:
    with replacing(file) as whole:
        whole.write(text.encode())
