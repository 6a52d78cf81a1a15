"""Checks of arguments of users: numbers, percentages, compiled models; and shorter errors."""

import importlib.util
import numbers
import re
from typing import Any, TypeGuard

from _lottery_ticket.refusals import MissingExtraError

# Keras puts what a layer said in bold, between the name of the layer and all arguments of the call.
_CALL = re.compile(
    r"Exception encountered when calling [^\n]*\n\n"
    r"\x1b\[1m(.*?)\x1b\[0m\n\nArguments received by.*",
    re.DOTALL,
)


def is_number(value: object) -> TypeGuard[float]:
    """Returns True for a real number of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def is_integer(value: object) -> TypeGuard[int]:
    """Returns True for an integer of Python or NumPy, but not for a bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def share_meant(value: object) -> str:
    """Returns `" For 80 %, give 0.8."` for a number that is probably a percentage, or nothing."""
    if not is_number(value) or not 1 < value < 100:
        return ""
    return f" For {value:g} %, give {value / 100:g}."


def check_compiled(model: Any, call: str) -> None:
    """Checks that a model is compiled.

    Args:
        model: The model.
        call: What it has to be compiled for, such as `"prune()"`.

    Raises:
        TypeError: If it is not a model.
        ValueError: If it is not compiled.
    """
    if not hasattr(model, "compiled"):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    if not model.compiled:
        raise ValueError(f"{model.name} is not compiled: call compile() before {call}.")


def reason_in(text: str) -> str:
    """Returns the message of an error, with Keras' account of a call shortened to its reason.

    Keras adds the layer that was called, with all its arguments. What is before that, such as which
    of the user's files is meant, stays.
    """
    return _CALL.sub(lambda found: found[1].strip() or text[found.start() :], text)


def line_of(error: Exception) -> str:
    """Returns the type of an error and the first line of its message."""
    text = next((line for line in reason_in(str(error)).splitlines() if line.strip()), "")
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
