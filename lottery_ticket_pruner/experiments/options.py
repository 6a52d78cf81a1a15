"""Types of optional options, shared by the commands.

Such an option has no value if it is left out, so its help shows no default.
"""

from pathlib import Path
from typing import Annotated

import tyro

NO_HINT = tyro.conf.arg(help_behavior_hint="")
OptionalInt = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
OptionalPath = Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")]
