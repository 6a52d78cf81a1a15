"""Checks whether arguments of users are numbers."""

import numbers
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Returns True for a real number of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Returns True for an integer of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
