"""The report on a TorchScript file: kernels, times and bytes, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from masked_layers.files import UNEXPECTED_FORM
from masked_layers.text_tables import aligned


@dataclass(frozen=True)
class KernelRow:
    """One weight, or one operation with it.

    Attributes:
        path: Path of the weight; paths of several are joined by `+`.
        shape: Shape of the weight.
        alive: Number of entries that are not zero.
        site: Name of the operation that has a sparse form, or "".
        kernel: The kernel in the file: `"dense"`, `"csr"`, or `"csr/32"` for a product in blocks of
            32 columns. Convolutions multiply patches of their input.
        seconds: Median time of each kernel, for all calls of the operation in one pass.
        nbytes: Bytes in the file.
    """

    path: str
    shape: tuple[int, ...]
    alive: int
    site: str
    kernel: str
    seconds: Mapping[str, float]
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
    def gain(self) -> float | None:
        """Time of the dense kernel divided by that of the kernel in the file."""
        return self.seconds["dense"] / self.seconds[self.kernel] if self.seconds else None


@dataclass(frozen=True)
class TorchReport:
    """Kernels, times and bytes of a TorchScript file; iterates over rows and prints as a table.

    Attributes:
        rows: A row for each operation that has a sparse form, and for each other weight.
        programs: Median time of one call of the whole model: `"dense"`, `"sparse"` with the fastest
            kernel of every row, and `"sparse, rows first"` with another layout of their outputs.
            Empty if no sparse kernel gains anything.
        program: The fastest of these, which is in the file.
        batch_size: Number of rows for which it was measured.
        threads: Number of threads for which it was measured.
        dense_nbytes: Bytes of the model's weights in dense form.
        file_nbytes: Bytes of the file.
        output_error: Largest absolute difference between an output of the file and of the model on
            the sample inputs, relative to the largest absolute output.
        notes: Limits of the file, such as lengths of inputs.
    """

    rows: tuple[KernelRow, ...]
    programs: Mapping[str, float]
    program: str
    batch_size: int
    threads: int
    dense_nbytes: int
    file_nbytes: int
    output_error: float
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[KernelRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def gain(self) -> float:
        """Time of the dense program divided by that of the program in the file."""
        return self.programs["dense"] / self.programs[self.program] if self.programs else 1.0

    def to_json(self) -> bytes:
        """Returns the report as JSON."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode()

    @classmethod
    def from_json(cls, data: bytes) -> TorchReport:
        """Creates a report from JSON; the inverse of `to_json`.

        Raises:
            ValueError: If the bytes are not such a report.
        """
        try:
            content = json.loads(data)
            rows = tuple(
                KernelRow(**{**row, "shape": tuple(row["shape"])}) for row in content["rows"]
            )
            report = cls(**{**content, "rows": rows, "notes": tuple(content["notes"])})
            times = [report.programs, *(row.seconds for row in rows if row.seconds)]
            for seconds in times:
                _check_times(seconds)
            for row in rows:
                if row.seconds and not {"dense", row.kernel} <= row.seconds.keys():
                    raise ValueError(f"'{row.path}' lacks times of its kernels")
            if report.programs and not {"dense", report.program} <= report.programs.keys():
                raise ValueError("it lacks times of its programs")
            str(report)  # Fails for values of other types.
        except UNEXPECTED_FORM as error:
            # Not the representation of the error, which may contain all bytes of a wrong file.
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"Not a report of `export_sparse_torch`: {reason}") from error
        return report

    def __str__(self) -> str:
        lines = [("weight", "shape", "sparsity", "kernel", "dense us", "us", "bytes")]
        shown = [row for row in self.rows if row.seconds or row.nbytes > 1024]
        for row in shown:
            dense, chosen = (
                f"{1e6 * row.seconds[name]:.0f}" if row.seconds else ""
                for name in ("dense", row.kernel)
            )
            shape = "x".join(map(str, row.shape))
            cells = (f"{row.sparsity:.2%}", row.kernel, dense, chosen, f"{row.nbytes:,}")
            lines.append((row.site or row.path, shape, *cells))
        rest = [row for row in self.rows if row not in shown]
        if rest:
            nbytes = f"{sum(row.nbytes for row in rest):,}"
            lines.append((f"{len(rest)} others", "", "", "dense", "", "", nbytes))
        text = aligned(lines, left=(0, 1, 3))
        for name, seconds in self.programs.items():
            mark = " (in the file)" if name == self.program else ""
            text.append(f"whole model, {name}: {1e6 * seconds:,.0f} us{mark}")
        text += [
            f"batch size {self.batch_size}, threads: {self.threads}",
            f"file: {self.file_nbytes:,} bytes; dense weights: {self.dense_nbytes:,}",
            f"largest difference of an output: {self.output_error:.2g} of the largest output",
            *self.notes,
        ]
        return "\n".join(text)


def _check_times(seconds: Mapping[str, Any]) -> None:
    if not all(type(x) in (int, float) and 0 < x < math.inf for x in seconds.values()):
        raise ValueError(f"times of {seconds!r}")
    if seconds and ("dense" not in seconds or len(seconds) < 2):
        raise ValueError(f"times of only {sorted(seconds)}")
