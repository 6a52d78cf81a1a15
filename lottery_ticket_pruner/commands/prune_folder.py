"""The files of `lottery-ticket prune` in its folder, written and read back."""

import csv
import dataclasses
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lottery_ticket_pruner.compression import Comparison, Findings
from lottery_ticket_pruner.experiments.reports import pruning
from lottery_ticket_pruner.experiments.results import CONFIG_FILE, RESULTS_FILE
from lottery_ticket_pruner.experiments.run_folder import versions, write_json
from masked_layers.files import FileContentError, replacing

RESULT_FILE = "result.json"
SCAN_FILE = "sensitivity.csv"


def write(findings: Findings, facts: pruning.Facts, folder: Path) -> None:
    """Writes the tables, the report, the model card and the configuration."""
    fields = [field.name for field in dataclasses.fields(Findings)]
    stored = {name: getattr(findings, name) for name in fields}
    stored["test"] = dataclasses.asdict(findings.test)
    write_json(folder / RESULT_FILE, {"findings": stored, "facts": dataclasses.asdict(facts)})
    _write_text(folder / RESULTS_FILE, table(findings.rows))
    if findings.scan:
        _write_text(folder / SCAN_FILE, table(findings.scan))
    else:  # Of an earlier search.
        (folder / SCAN_FILE).unlink(missing_ok=True)
    write_report(findings, facts, folder)
    options = {"command": "prune", **facts.options, "versions": versions()}
    write_json(folder / CONFIG_FILE, options)


def write_report(findings: Findings, facts: pruning.Facts, folder: Path) -> None:
    """Writes the web page and the model card."""
    _write_text(folder / "report.html", pruning.page(findings, facts))
    _write_text(folder / "model_card.md", pruning.card(findings, facts))


def read(folder: Path) -> tuple[Findings, pruning.Facts]:
    """Reads what `write` has stored.

    Raises:
        FileContentError: If the file is missing or damaged.
    """
    file = folder / RESULT_FILE
    try:
        stored = json.loads(file.read_text())
        findings, facts = stored["findings"], stored["facts"]
        test = findings["test"]
        pairs = {name: tuple(test[name]) for name in ("worse", "better")}
        interval = None if test["interval"] is None else tuple(test["interval"])
        findings["test"] = Comparison(**test | pairs | {"interval": interval})
        findings["notes"] = tuple(findings["notes"])
        return Findings(**findings), pruning.Facts(**facts)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileContentError(
            f"'{file}' is missing or damaged ({error}). Run `lottery-ticket prune` with the same "
            "options again: it writes the file from the finished search."
        ) from error


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
