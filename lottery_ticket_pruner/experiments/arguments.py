"""Options of a command as text, in the form of its command line."""

import dataclasses
import math
import typing
from collections.abc import Sequence
from typing import Any

from _lottery_ticket.refusals import option, takes_several
from _lottery_ticket.unknown import UnknownNameError
from lottery_ticket_pruner.checks import share_meant

# Options that say where an experiment is executed, and belong to a single call.
EXECUTION = ("executor", "address", "executor_option", "jobs")


def options_of(config: type) -> list[dataclasses.Field[Any]]:
    """Returns the options that a sweep passes on to its runs unchanged."""
    own = ("seeds", "out", "overwrite", "quiet", *EXECUTION)
    return [field for field in dataclasses.fields(config) if field.name not in own]


def options_given(config: Any, kind: type) -> dict[str, Any]:
    """Returns the options that a sweep passes on to its runs, and that are not the defaults.

    Args:
        config: Options of the sweep, which include those of its runs.
        kind: The class of the latter.
    """
    return {
        field.name: getattr(config, field.name)
        for field in options_of(kind)
        if getattr(config, field.name) != field.default
    }


def parse_over(text: str, config: type) -> tuple[str, list[str]]:
    """Parses the value of --over into the name of an option and its values.

    Raises:
        ValueError: If the text is malformed, or the command does not have this option.
    """
    name, equals, values = text.partition("=")
    name = name.removeprefix("--").replace("-", "_")
    allowed = [field.name for field in options_of(config)]
    if name in ("data_dir", "log"):
        raise ValueError(f"--over {name}: {name} does not affect results and cannot be swept.")
    if name in ("seeds", "seed"):
        raise ValueError("Give seeds as in --seeds 0 1 2: each of them has a run of its own.")
    if name not in allowed:
        error = UnknownNameError("option", name, allowed)
        raise ValueError(f"--over {text}: {error}") from error
    found = list(dict.fromkeys(values.split(",")))
    if not equals or "" in found:
        raise ValueError(f"--over expects values, as in --over rate=0.2,0.4. Received: {text!r}.")
    return name, found


def given(name: str, value: str, config: type) -> list[str]:
    """Returns the command-line arguments for one value of --over."""
    hint = typing.get_type_hints(config)[name]
    if takes_several(hint):
        return [option(name), *([] if value == "none" else value.split("+"))]
    if hint is bool:
        if value.lower() not in ("true", "false"):
            raise ValueError(f"--over {name} takes true and false. Received: {value!r}.")
        return arguments(name, value.lower() == "true")
    return [option(name), value]


def arguments(name: str, value: object) -> list[str]:
    """Returns the command-line arguments of an option."""
    if isinstance(value, bool):
        return [option(name) if value else f"--no-{name.replace('_', '-')}"]
    if isinstance(value, tuple):
        return [option(name), *map(str, value)]
    return [option(name), str(value)]


def rates_of(texts: Sequence[str], default: float) -> dict[str, float]:
    """Parses rates such as `0.2 conv=0.1`: one for all layers, and others for patterns of paths.

    Args:
        texts: The rates as text. A pattern is a regular expression that is searched in paths, such
            as `conv_1/kernel`. The first one that matches counts.
        default: Rate of all other layers, if the texts contain none.

    Raises:
        ValueError: If a text is malformed, or a rate is given twice or not in [0, 1).
    """
    rates: dict[str, float] = {}
    for text in texts:
        pattern, equals, number = text.rpartition("=")
        key = pattern if equals else "default"
        rate = _number(number)
        if not key or not 0 <= rate < 1:
            hint = share_meant(_number(number.removesuffix("%")))
            raise ValueError(
                "--rate expects a share in [0, 1) for all layers and PATTERN=SHARE for some of "
                f"them, as in --rate 0.2 conv=0.1. Received: {' '.join(texts)!r}.{hint}"
            )
        if key in rates:
            raise ValueError(f"--rate has two values for {key}. Received: {' '.join(texts)!r}.")
        rates[key] = rate
    if not rates:
        raise ValueError("--rate expects at least one value, as in --rate 0.2 conv=0.1.")
    return {"default": rates.pop("default", default), **rates}


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
