"""Warnings that point to the line of the user's code, at any depth of the library."""

from __future__ import annotations

import sys
import warnings


def warn_outside(message: str, *packages: str) -> None:
    """Issues a warning for the innermost line on the stack that is outside these packages.

    Args:
        message: Text of the `UserWarning`.
        packages: Names of top-level packages.
    """
    frame, level = sys._getframe(), 1
    while (
        frame.f_back is not None
        and frame.f_globals.get("__name__", "").partition(".")[0] in packages
    ):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
