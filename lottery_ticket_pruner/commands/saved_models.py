"""The commands `lottery-ticket export` and `lottery-ticket inspect` for saved models."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from masked_layers import serving
from masked_layers.keras_files import how_to_save, load_model


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Write a saved model as a sparse SavedModel folder, which any TensorFlow runtime serves."""

    model: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="MODEL")]
    """A `.keras` file: masked, or plain with zeros in its kernels."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write, such as served/1. An existing SavedModel is not replaced."""
    overwrite: bool = False
    """Replace an existing SavedModel once the new one is complete."""
    values: Literal["float32", "float16", "bfloat16"] = "float32"
    """float32 keeps every value exactly. The others take 2 bytes; the error is printed."""
    level: int = 6
    """Compression level, 0 to 9."""
    include: tuple[str, ...] = ()
    """Regular expressions for the paths of weights that may be stored sparsely. Default: all."""

    def execute(self) -> serving.StorageReport:
        """Loads the model, writes the folder and returns a report of the stored sizes."""
        _check_model(self.model)
        if (self.out / "saved_model.pb").is_file() and not self.overwrite:
            raise FileExistsError(
                f"'{self.out}' holds a SavedModel. Choose another folder, or pass --overwrite to "
                "replace it once the new one is complete."
            )
        return serving.export_sparse_saved_model(
            load_model(self.model),
            self.out,
            values=self.values,
            level=self.level,
            include=self.include or None,
        )


@dataclasses.dataclass(frozen=True)
class InspectConfig:
    """Print sparsity, encoding and bytes of every weight of a saved model."""

    path: tyro.conf.Positional[Path]
    """A `.keras` file or a SavedModel folder."""

    def execute(self) -> serving.StorageReport:
        """Returns a report of the stored sizes."""
        return serving.inspect(self.path)


def _check_model(path: Path) -> None:
    if not path.is_file():
        received = f" Received: the folder '{path}'." if path.is_dir() else ""
        raise FileNotFoundError(f"There is no file '{path}'.{received}")
    if path.suffix != ".keras":
        raise ValueError(f"Expected a '.keras' file. Received: '{path}'. {how_to_save(path)}")
