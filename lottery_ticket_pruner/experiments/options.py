"""Types of the options that may be left out, which the commands share.

An option without a value says so by being left out, so that its help has no default to show.
"""

from pathlib import Path
from typing import Annotated

import tyro

NO_HINT = tyro.conf.arg(help_behavior_hint="")
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
