"""Says in one line why the arguments of a command were refused, and what was probably meant."""

import dataclasses
import re
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any

from _lottery_ticket import hints, names

_EXPECTED = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
    str: "a value",
}

# What may follow a number after a space, and how it is written where it is part of the value.
_UNITS = {
    **{
        unit.lower(): unit for unit in ("%", "kB", "MB", "GB", "KiB", "MiB", "us", "ms", "min", "h")
    },
    **dict.fromkeys(("s", "sec", "seconds"), "s"),
    **dict.fromkeys(("b", "bytes"), "B"),
    **dict.fromkeys(("it", "step", "steps"), "it"),
    **dict.fromkeys(("ep", "epoch", "epochs"), "ep"),
    "minutes": "min",
}
# Values that are given to options without one. 1 may be a folder.
_FLAGS = ("true", "false", "yes", "no", "on", "off")
_SUPERMASK = "to execute seeds as jobs, use `lottery-ticket sweep-supermask`."
_PRUNE = (
    "it is one search, in which each step follows from the one before, so there are no jobs to "
    "execute elsewhere."
)
# Why commands lack an option of similar ones.
_WITHOUT = {
    ("supermask", "--executor"): _SUPERMASK,
    ("prune", "--executor"): _PRUNE,
    ("instability", "--executor"): "only runs, sweeps and their seeds are executed as jobs.",
}


class UsageError(ValueError):
    """An error for a command line that cannot be read."""


class MissingExtraError(ImportError):
    """An error for packages of the command line, or of another extra, that are not installed."""


def check_names(kind: type[Any], command: str, arguments: Sequence[str]) -> None:
    """Raises a UsageError for an option that a command does not have or whose values get lost.

    Args:
        kind: Class of its options.
        command: Its name.
        arguments: Its arguments.
    """
    known = _option_names(kind)
    unnamed = unnamed_options(kind)
    repeatable = _marked(kind, "UseAppendAction")
    types = {option(one): type_ for one, type_ in typing.get_type_hints(kind).items()}
    given: dict[str, list[str]] = {}
    for name, values in _given(arguments):
        if name in unnamed or (name not in known and f"{name}s" in unnamed):
            usage = " ".join([command, *(one.lstrip("-").upper() for one in unnamed)])
            raise UsageError(
                f"{name} is not an option: give the value alone, as in lottery-ticket {usage}."
            )
        if name not in known:
            if (command, name) in _WITHOUT:
                why = _WITHOUT[command, name]
                raise UsageError(f"`lottery-ticket {command}` has no option {name}: {why}")
            hint = hints.question(name, known) or f" See lottery-ticket {command} --help."
            if name == "--version":
                hint = " Did you mean lottery-ticket --version?"
            raise UsageError(f"`lottery-ticket {command}` has no option {name}.{hint}")
        if name in given and name not in repeatable and takes_several(types.get(name)):
            # The parser would only use the last values.
            together = " ".join([name, *given[name], *values])
            raise UsageError(f"{name} is given twice. Give all values at once ({together}).")
        given[name] = values
        _check_unit(name, values, types.get(name))
        if types.get(name) is bool and values and values[0].lower() in _FLAGS:
            other = f"--no-{name.removeprefix('--')}"
            raise UsageError(f"{name} takes no value: give {name} or {other} alone.")


def _check_unit(name: str, values: Sequence[str], type_: object) -> None:
    """Raises a UsageError for a unit after a number, which would be taken for another argument."""
    number, unit = [*values, "", ""][:2]
    short = _UNITS.get(unit.lower())
    if short is None or not _fits(number, float) or takes_several(type_) or Path(unit).exists():
        return
    expected = "a number without a unit"
    if short == "%" and _plain(type_) is float:
        expected = f"a share: {float(number) / 100:g}"
    elif short != "%" and _plain(type_) is str:
        expected = f"no space before the unit: {number}{short}"
    raise UsageError(f"{name} expects {expected}. Received: {number} {unit}.")


def option(name: str) -> str:
    """Returns the name of an option on the command line."""
    return f"--{name.replace('_', '-')}"


def unnamed_options(kind: type[Any]) -> list[str]:
    """Returns the options of a command whose values are given alone."""
    return _marked(kind, "Positional")


def choices_of(type_: Any) -> tuple[str, ...]:
    """Returns the names that an option of a type takes, which may be left out. Empty for others."""
    plain = _plain(type_)
    inner = typing.get_args(plain)[0] if typing.get_origin(plain) is tuple else plain
    return typing.get_args(inner) if typing.get_origin(inner) is typing.Literal else ()


def takes_several(type_: object) -> bool:
    """Returns whether an option of a type takes more than one value."""
    return typing.get_origin(type_) is tuple or any(map(takes_several, typing.get_args(type_)))


def reason(kind: type[Any], arguments: Sequence[str], said: str) -> str:
    """Returns why arguments were refused.

    Args:
        kind: Class of the options.
        arguments: The arguments.
        said: What the parser says, which is used if nothing clearer can be said.
    """
    fields = {option(field.name): field for field in dataclasses.fields(kind)}
    types = typing.get_type_hints(kind)
    for name, values in _given(arguments):
        field = fields.get(name)
        if field is None:
            continue
        found = _fault(name, values, _plain(types[field.name]))
        if found:
            return found
    missing = [
        field.name.upper()
        for field in fields.values()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing and "Missing from" in said:
        return f"Expected {' '.join(missing)}."
    text = _text_of(said)
    # A name that needs its option, such as that of a network.
    for name, there in (("--network", names.NETWORKS), ("--data", names.DATASETS)):
        for value in arguments:
            if name in fields and text == f"Unexpected: {value}." and value in there:
                return f"{text} Did you mean {name} {value}?"
    for value in arguments:
        if "--over" in fields and "=" in value and text == f"Unexpected: {value}.":
            return f"{text} Did you mean --over {value}?"
        is_model = value.endswith((".keras", ".h5")) and text == f"Unexpected: {value}."
        if is_model and "--network" in fields:
            prune = f"lottery-ticket prune {value}"
            return f"{text} Did you mean --network {value}, or, of a trained model, {prune}?"
    return text


def _fault(name: str, values: Sequence[str], type_: Any) -> str | None:
    """Returns what is wrong with the values of an option, if it can be seen."""
    several = typing.get_origin(type_) is tuple
    inner = typing.get_args(type_)[0] if several else type_
    choices = choices_of(type_)
    expected = f"one of {', '.join(choices)}" if choices else _EXPECTED.get(inner, "a value")
    if not values:
        return None if several or inner is bool else f"{name} expects {expected}."
    for value in values if several else values[:1]:
        if choices and value not in choices:
            hint = hints.question(value, choices)
            return f"{name} expects {expected}. Received: {value!r}.{hint}"
        if inner in (int, float) and not _fits(value, inner):
            shown = ", as in {name} 0.1 0.2" if inner is float else ", as in {name} 0 1"
            more = f" Separate several by spaces{shown.format(name=name)}." if several else ""
            if inner is float and value.endswith("%") and _fits(value[:-1], float):
                more = f" Give a share: {float(value[:-1]) / 100:g}."
            return f"{name} expects {expected}. Received: {value!r}.{more}"
    return None


def _fits(value: str, kind: type[int] | type[float]) -> bool:
    try:
        kind(value)
    except ValueError:
        return False
    return True


def _given(arguments: Sequence[str]) -> Iterable[tuple[str, list[str]]]:
    """Yields each option that is given with its values."""
    found: list[tuple[str, list[str]]] = []
    for argument in arguments:
        name = _name_of(argument)
        if name is not None and not _is_number(argument):
            _, equals, value = argument.partition("=")
            found.append((name, [value] if equals else []))
        elif found:
            found[-1][1].append(argument)
    return found


def _name_of(argument: str) -> str | None:
    """Returns the option that an argument names, with hyphens."""
    if not re.match(r"--?[A-Za-z]", argument):
        return None
    return argument.partition("=")[0].replace("_", "-")


def _is_number(argument: str) -> bool:
    return _fits(argument, float)  # Such as -1, and -inf.


def _option_names(kind: type[Any]) -> list[str]:
    names = ["--help", "-h"]
    types = typing.get_type_hints(kind)
    unnamed = unnamed_options(kind)
    for field in dataclasses.fields(kind):
        if option(field.name) in unnamed:
            continue
        names.append(option(field.name))
        if types[field.name] is bool:
            names.append(f"--no-{field.name.replace('_', '-')}")
    return names


def _marked(kind: type[Any], marker: str) -> list[str]:
    """Returns the options whose types have a marker of tyro."""
    import tyro

    types = typing.get_type_hints(kind, include_extras=True)
    wanted = getattr(tyro.conf, marker)
    marked = {name for name, type_ in types.items() if wanted in getattr(type_, "__metadata__", ())}
    return [option(field.name) for field in dataclasses.fields(kind) if field.name in marked]


def _plain(type_: Any) -> Any:
    """Returns a type without None and annotations."""
    kinds = [one for one in typing.get_args(type_) if one is not NoneType]
    optional = typing.get_origin(type_) is not tuple and NoneType in typing.get_args(type_)
    return kinds[0] if optional and len(kinds) == 1 else type_


def _text_of(said: str) -> str:
    """Returns the first paragraph of a message in a box, whose title may be a line of its own."""
    lines = [line.strip("│ ") for line in said.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("╭", "╰"))]
    rules = [i for i, line in enumerate(lines) if set(line) <= set("─-")]
    first = 2 if rules[:1] == [1] and "╭" not in said else 0
    last = next((i for i in rules if i > first), len(lines))
    text = " ".join(lines[first:last]).replace("Unrecognized options: ", "Unexpected: ")
    return text.rstrip(".") + "."
