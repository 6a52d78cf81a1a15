"""Tells numbers from all else that users may give in their place."""

import numbers
from typing import TypeGuard


def is_number(value: object) -> TypeGuard[float]:
    """Returns True for a real number, of NumPy too; a bool is not one."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Returns True for an integer, of NumPy too; a bool is not one."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
