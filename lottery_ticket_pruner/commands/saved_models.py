"""The commands `lottery-ticket export` and `lottery-ticket inspect` for saved models."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import masked_layers
from _lottery_ticket import commands as options
from _lottery_ticket import hints
from _lottery_ticket.refusals import option
from lottery_ticket_pruner.commands import prune_folder
from lottery_ticket_pruner.commands.all_formats import (
    REPORT,
    FormatsTable,
    Options,
    export_all,
    inspect_all,
)
from lottery_ticket_pruner.experiments import saved_tickets
from masked_layers import serving
from masked_layers.keras_files import how_to_save
from masked_layers.ticket_files import SUFFIX, load_saved


@dataclasses.dataclass(frozen=True)
class ExportConfig(options.ExportOptions):
    """Options of `lottery-ticket export`."""

    def execute(self) -> serving.StorageReport | masked_layers.TorchReport | FormatsTable:
        """Loads the model, writes the folder or file and returns a report."""
        _check_model(self.model)
        self._check_options()
        self._check_ending()
        if self.format == "all":
            return self._write_all()
        if self.format != "saved_model":
            self._check_out()
        if self.format == "torch":
            return self._write_torch()
        if self.format == "onnx":
            return masked_layers.export_sparse_onnx(
                load_saved(self.model),
                self.out,
                values=self.values,
                tolerance=self.tolerance,
                sample_inputs=self._samples(),
            )
        if (self.out / "saved_model.pb").is_file() and not self.overwrite:
            raise FileExistsError(
                f"'{self.out}' holds a SavedModel. Choose another folder, or pass --overwrite to "
                "replace it once the new one is complete."
            )
        return serving.export_sparse_saved_model(
            load_saved(self.model),
            self.out,
            values=self.values,
            tolerance=self.tolerance,
            sample_inputs=self._samples(),
            level=self.level,
            include=self.include or None,
        )

    def _samples(self) -> np.ndarray | None:
        return None if self.sample_inputs is None else _array(self.sample_inputs)

    def _check_options(self) -> None:
        others = {name for names in _OPTIONS.values() for name in names}
        others -= set(_OPTIONS[self.format])
        given = [
            option(field.name)
            for field in dataclasses.fields(self)
            if field.name in others and getattr(self, field.name) != field.default
        ]
        if given:
            raise ValueError(f"{', '.join(given)} cannot be used with --format {self.format}.")

    def _check_ending(self) -> None:
        """Refuses a folder that is named like a file of another format."""
        meant = _ENDINGS.get(self.out.suffix.lower())
        if meant is not None and self.format in ("saved_model", "all") and self.format != meant:
            raise ValueError(
                f"--format {self.format} writes a folder. Received: '{self.out}', the name of a "
                f"file. Pass --format {meant}{_LITERT * (meant == 'all')}, or choose another name."
            )

    def _check_out(self) -> None:
        if self.out.is_file() and not self.overwrite:
            raise FileExistsError(
                f"'{self.out}' exists. Choose another file, or pass --overwrite to replace it once "
                "the new one is complete."
            )

    def _write_all(self) -> FormatsTable:
        for name, count in (("batch-size", self.batch_size), ("threads", self.threads)):
            if count is not None and count < 1:
                raise ValueError(f"--{name} must be 1 or more. Received: {count}")
        options = Options(
            tolerance=self.tolerance,
            level=self.level,
            include=self.include or None,
            sample_inputs=self._samples(),
            batch_size=self.batch_size,
            threads=self.threads,
        )
        return export_all(load_saved(self.model), self.out, options, overwrite=self.overwrite)

    def _write_torch(self) -> masked_layers.TorchReport:
        return masked_layers.export_sparse_torch(
            load_saved(self.model),
            self.out,
            batch_size=self.batch_size,
            threads=self.threads,
            timings=self.timings,
            shrink=self.shrink,
        )


# The formats of files that are named so.
_ENDINGS = {".onnx": "onnx", ".pt": "torch", ".tflite": "all"}
_LITERT = " with a folder, in which LiteRT files are written, too"

# The options that some formats do not have.
_OPTIONS = {
    "saved_model": ("values", "tolerance", "sample_inputs", "level", "include"),
    "torch": ("batch_size", "threads", "timings", "shrink"),
    "onnx": ("values", "tolerance", "sample_inputs"),
    "all": ("tolerance", "sample_inputs", "level", "include", "batch_size", "threads"),
}


@dataclasses.dataclass(frozen=True)
class InspectConfig(options.InspectOptions):
    """Options of `lottery-ticket inspect`."""

    def execute(self) -> serving.StorageReport | FormatsTable:
        """Returns a report of the stored sizes."""
        if not self.path.exists():
            hint = hints.file_question(self.path, saved_tickets.SUFFIXES)
            raise FileNotFoundError(
                f"There is no '{self.path}'. Expected a '.keras' file, a ticket ('{SUFFIX}'), or "
                "a folder that `lottery-ticket prune` (served/1) or `lottery-ticket export` has "
                f"written.{hint or hints.folder_question(self.path)}"
            )
        if (self.path / REPORT).is_file():
            return inspect_all(self.path)
        if not (self.path / "saved_model.pb").is_file():
            if tickets := saved_tickets.tickets_in(self.path):
                raise ValueError(f"'{self.path}' is the folder of a run.{_named(tickets)}")
            if models := prune_folder.models_in(self.path):
                raise ValueError(f"'{self.path}' is a folder of `prune`.{_named(models)}")
        return serving.inspect(self.path)


def _check_model(path: Path) -> None:
    expected = f"Expected a '.keras' file or a ticket ('{SUFFIX}')."
    if not path.is_file():
        remedy = f"{expected}{hints.file_question(path, saved_tickets.SUFFIXES)}"
        if path.is_dir():
            models = saved_tickets.tickets_in(path) or prune_folder.models_in(path)
            remedy = f"Received: the folder '{path}'.{_named(models) or f' {expected}'}"
        raise FileNotFoundError(f"There is no file '{path}'. {remedy}")
    if path.suffix not in saved_tickets.SUFFIXES:
        raise ValueError(f"{expected} Received: '{path}'. {how_to_save(path)}")


def _named(models: Sequence[Path]) -> str:
    if not models:
        return ""
    kind = "tickets" if models[0].suffix == SUFFIX else "models"
    return f" Its {kind}: {', '.join(map(str, models))}."


def _array(path: Path) -> np.ndarray:
    try:
        array = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy raises many kinds of errors for damaged files.
        raise ValueError(f"'{path}' is not a '.npy' file: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"'{path}' contains several arrays. Expected a '.npy' file with one.")
    return array
