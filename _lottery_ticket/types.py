"""Types of options, shared by the commands.

An option that may be left out has no value then, so its help shows no default.
"""

from pathlib import Path
from typing import Annotated, Any

import tyro

NO_HINT = tyro.conf.arg(help_behavior_hint="")
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Devices = Annotated[
    tuple[str, ...],
    tyro.conf.arg(
        metavar="N|DEVICE [DEVICE ...]",
        help_behavior_hint="",
        help="Devices that train together, each on an equal part of every batch: a number of them, "
        "or names such as gpu:0 gpu:1. On TensorFlow only. Default: one device.",
    ),
]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]


def choice(*names: str, help: str | None = None) -> Any:  # noqa: A002 (as tyro calls it)
    """Returns what shows an option that may be left out as a choice among names."""
    return tyro.conf.arg(metavar=f"{{{','.join(names)}}}", help_behavior_hint="", help=help)
