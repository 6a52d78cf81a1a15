"""The report on the size of an exported model, weight by weight."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from masked_layers.checksums import SUMS_FILE
from masked_layers.files import UNEXPECTED_FORM
from masked_layers.text_tables import aligned

COLUMNS = ("path", "shape", "dtype", "encoding", "alive", "nbytes")
FILE = "assets.extra/sparsity.json"
"""Path of the report in a SavedModel folder; the format reserves `assets.extra` for such files."""
SUMS = f"assets.extra/{SUMS_FILE}"
"""Path of the checksums of all other files in the folder, relative to the folder."""


@dataclass(frozen=True)
class StorageRow:
    """One weight on disk.

    Attributes:
        path: Path of the weight in the model.
        shape: Shape of the weight.
        dtype: Dtype of the stored values, or kind of their codes, such as `"codebook-5"`.
        encoding: `"sparse"` (only the non-zero values and the gaps between them), `"packed"` (all
            values, compressed), or `"dense"` (all values, uncompressed).
        alive: Number of entries that are not zero.
        nbytes: Bytes on disk. Shared streams are divided among their weights.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    encoding: str
    alive: int
    nbytes: int

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """Share of entries that are zero."""
        return 1.0 - self.alive / self.size if self.size else 0.0

    @property
    def entropy_nbytes(self) -> float:
        """Entropy of a random mask of this sparsity, in bytes."""
        return sum(
            -self.size * p * math.log2(p) / 8 for p in (self.sparsity, 1 - self.sparsity) if p
        )


@dataclass(frozen=True)
class StorageReport:
    """Size of a model on disk; iterates over its weights and prints as a table.

    Attributes:
        rows: One row per weight.
        files: Size of each file in bytes.
        dense_nbytes: Size of all weights in bytes, uncompressed and with the model's dtypes.
        values: Kind of values requested; `"float32"` means that all values are exact.
        output_error: Largest absolute difference between the outputs of the SavedModel and the
            model on the sample inputs, relative to the largest absolute output; None if not
            measured.
    """

    rows: tuple[StorageRow, ...]
    dense_nbytes: int
    files: Mapping[str, int]
    values: str = "float32"
    output_error: float | None = None

    def __iter__(self) -> Iterator[StorageRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def size(self) -> int:
        """Number of weights."""
        return sum(row.size for row in self.rows)

    @property
    def alive(self) -> int:
        """Number of weights that are not zero."""
        return sum(row.alive for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all weights."""
        return 1.0 - self.alive / self.size if self.size else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of all weights on disk."""
        return sum(row.nbytes for row in self.rows)

    @property
    def disk_nbytes(self) -> int:
        """Bytes of all files, including the graph and this report."""
        return sum(self.files.values())

    @property
    def dense_disk_nbytes(self) -> int:
        """Bytes of the same graph together with one uncompressed copy of the weights."""
        return self.dense_nbytes + self.files.get("saved_model.pb", 0)

    @property
    def reference_nbytes(self) -> float:
        """Entropy of the masks plus 4 bytes for every value: a reference, not a lower bound."""
        return sum(row.entropy_nbytes + 4 * row.alive for row in self.rows)

    def with_own_size(self) -> StorageReport:
        """Returns the report with the size of its JSON file included in `files`."""
        report = self
        # The size is part of the text, so its number of digits must converge.
        for _ in range(3):
            files = {**self.files, FILE: len(report.to_json())}
            report = dataclasses.replace(self, files=files)
        return report

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as JSON-serializable numbers, strings, lists and dicts."""
        return {
            "values": self.values,
            "output_error": self.output_error,
            "dense_nbytes": self.dense_nbytes,
            "files": dict(self.files),
            "columns": list(COLUMNS),
            "rows": [[getattr(row, column) for column in COLUMNS] for row in self.rows],
        }

    def to_json(self) -> bytes:
        """Returns the report as JSON on one line."""
        return json.dumps(self.to_dict(), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> StorageReport:
        """Creates a report from JSON; the inverse of `to_json`.

        Raises:
            ValueError: If the bytes are not such a report.
        """
        try:
            content = json.loads(data)
            rows = [
                StorageRow(**dict(zip(content["columns"], cells, strict=True)))
                for cells in content["rows"]
            ]
            fields = {key: content[key] for key in content if key not in ("rows", "columns")}
            rows = [dataclasses.replace(row, shape=tuple(row.shape)) for row in rows]
            report = cls(rows=tuple(rows), **fields)
            _check(report)
        except UNEXPECTED_FORM as error:
            raise ValueError(f"Not a storage report: {error!r}") from error
        return report

    def __str__(self) -> str:
        lines = [("weight", "shape", "values", "encoding", "non-zero", "sparsity", "bytes")]
        # Dense biases and statistics are summed up, since a large model has hundreds of them.
        shown = [row for row in self.rows if row.encoding == "sparse" or len(row.shape) > 1]
        rest = [row for row in self.rows if row not in shown]
        for row in shown:
            shape = "x".join(map(str, row.shape))
            lines.append((row.path, shape, row.dtype, row.encoding, *_numbers(row)))
        if rest:
            others = StorageReport(tuple(rest), 0, {})
            encodings = "/".join(sorted({row.encoding for row in rest}))
            dtypes = "/".join(sorted({row.dtype for row in rest}))
            lines.append((f"{len(rest)} others", "", dtypes, encodings, *_numbers(others)))
        lines.append(("total", "", "", "", *_numbers(self)))
        text = aligned(lines, left=range(4))
        matrices = [row for row in shown if len(row.shape) > 1]  # Zero biases are common.
        if zero := [row.path for row in matrices if row.size and not row.alive]:
            text.append(f"nothing but zeros: {', '.join(zero)}")
        on_disk = f"on disk: {self.disk_nbytes:,} bytes"
        if "saved_model.pb" in self.files:
            dense, here = self.dense_disk_nbytes, max(self.disk_nbytes, 1)
            ratio = f"{dense / here:.1f} times smaller than"
            if here > dense:
                ratio = f"{here / max(dense, 1):.1f} times as large as"
            on_disk += (
                f", {ratio} one uncompressed copy of the weights with the same graph ({dense:,})"
            )
        text += [
            f"uncompressed weights: {self.dense_nbytes:,} bytes",
            f"mask entropy + 4 bytes per value: {round(self.reference_nbytes):,} bytes",
            on_disk,
        ]
        if self.values != "float32":
            text.append(f"values are not exact: rounded with values='{self.values}'")
        if self.output_error is not None:
            text.append(
                f"largest difference of an output: {self.output_error:.2g} of the largest output"
            )
        return "\n".join(text)


def _check(report: StorageReport) -> None:
    """Checks the types and ranges in a report that was read from a file.

    Raises:
        ValueError: If one of them is wrong.
    """
    texts = [report.values, *report.files]
    counts = [report.dense_nbytes, *report.files.values()]
    for row in report.rows:
        texts += [row.path, row.dtype, row.encoding]
        counts += [*row.shape, row.size, row.alive, row.nbytes]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text is not a string")
    if not all(type(count) is int and 0 <= count < 2**63 for count in counts):
        raise ValueError("a count is not a valid integer")
    if any(row.alive > row.size for row in report.rows):
        raise ValueError("a weight has more non-zero values than entries")
    if type(report.output_error) not in (float, int, type(None)):
        raise ValueError(f"an output error of {report.output_error!r}")


def _numbers(counts: StorageRow | StorageReport) -> tuple[str, str, str]:
    return f"{counts.alive:,}", f"{counts.sparsity:.2%}", f"{counts.nbytes:,}"
