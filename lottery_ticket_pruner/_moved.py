"""Warnings for public names that are used at their earlier place or by their earlier name."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any


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


def earlier_names(module: str, names: Mapping[str, Any]) -> Callable[[str], Any]:
    """Returns a `__getattr__` for a module, which returns renamed objects with a warning.

    Args:
        module: Dotted name of the module.
        names: Earlier name -> the function or class that has another name now.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warnings.warn(
            f"`{module}.{name}` was renamed to `{names[name].__name__}`. The earlier name will be "
            "removed in a later release.",
            DeprecationWarning,
            stacklevel=2,
        )
        return names[name]

    return get
