"""The warning of modules that only re-export what has moved."""

import warnings


def warn_of_earlier_place(place: str, new: str) -> None:
    """Warns, at the line that imports the calling module, that its names have moved.

    Args:
        place: Dotted name of the calling module.
        new: Dotted name of the package that has its names now.
    """
    warnings.warn(
        f"The names of `{place}` have moved to `{new}`: import them from there. `{place}` will be "
        "removed in a later release.",
        DeprecationWarning,
        stacklevel=3,
    )
