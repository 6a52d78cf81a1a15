"""The contents of a SavedModel folder, and a check that it can be replaced."""

from pathlib import Path

from masked_layers.serving.report import FILE, SUMS

CONTENTS = frozenset(
    ("assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables", "keras_metadata.pb")
)
"""Names that the folder of an unfinished export may contain."""

_KNOWN = {*CONTENTS, FILE, SUMS, "debug"}


def check_replaceable(path: Path) -> None:
    """Checks that writing a SavedModel to a path would not destroy anything else.

    Raises:
        FileExistsError: If the path is a file, a folder of another kind, or the folder of a
            SavedModel with other files in it.
    """
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / "saved_model.pb").is_file()):
        raise FileExistsError(
            f"'{path}' exists and is not a SavedModel folder. Remove it or choose another path."
        )
    # TensorFlow's users put additional files into `assets.extra`, such as warmup requests.
    inside = [*path.iterdir(), *(path / FILE).parent.glob("*")]
    names = sorted(file.relative_to(path).as_posix() for file in inside)
    if others := [name for name in names if name not in _KNOWN]:
        raise FileExistsError(
            f"'{path}' contains other files than those of a SavedModel, which would be lost: "
            f"{', '.join(others)}. Move them, or choose another path."
        )
