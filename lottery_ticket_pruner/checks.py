"""Checks whether arguments of users are numbers, and shortens errors from their code."""

import importlib.util
import numbers
from typing import TypeGuard

from _lottery_ticket.refusals import MissingExtraError


def is_number(value: object) -> TypeGuard[float]:
    """Returns True for a real number of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Returns True for an integer of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def line_of(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    text = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text.strip()}"


def require_extra(name: str, package: str | None = None) -> None:
    """Checks that the package of an extra is installed.

    Args:
        name: The extra.
        package: The package. None for one of the same name.

    Raises:
        MissingExtraError: If it is not.
    """
    if importlib.util.find_spec(package or name) is None:
        raise MissingExtraError(
            f"This needs the package {package or name}, which is not installed. Install it with "
            f'its extra: pip install "lottery-ticket-pruner[{name}]"'
        )
