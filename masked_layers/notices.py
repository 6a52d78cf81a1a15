"""Warnings at the line of a user's code, however deep in the library their reason is found."""

from __future__ import annotations

import sys
import warnings


def warn_outside(message: str, *packages: str) -> None:
    """Warns at the innermost line on the stack that is outside of these packages.

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
