"""The folder of a SavedModel: what is in it, and whether another may take its place."""

from pathlib import Path

from masked_layers.serving.report import FILE

CONTENTS = frozenset(
    ("assets", "assets.extra", "fingerprint.pb", "saved_model.pb", "variables", "keras_metadata.pb")
)
"""Names in a folder of an unfinished export."""

_KNOWN = {*CONTENTS, FILE, "debug"}


def check_replaceable(path: Path) -> None:
    """Checks that a SavedModel may be written to a path, where nothing is lost by that.

    Raises:
        FileExistsError: If a file or another folder is there, or a SavedModel with something else
            beside it.
    """
    if not path.exists():
        return
    if not path.is_dir() or (any(path.iterdir()) and not (path / "saved_model.pb").is_file()):
        raise FileExistsError(
            f"'{path}' exists and is no SavedModel folder. Remove it or choose another path."
        )
    # In `assets.extra` TensorFlow has users put what goes along with a model, such as requests to
    # warm it up.
    inside = [*path.iterdir(), *(path / FILE).parent.glob("*")]
    names = sorted(file.relative_to(path).as_posix() for file in inside)
    if others := [name for name in names if name not in _KNOWN]:
        raise FileExistsError(
            f"'{path}' holds a SavedModel, and beside it {', '.join(others)}, which would be lost. "
            "Move that, or choose another path."
        )
