"""Puts messages that name arguments of Python into the words of a command line."""

import dataclasses
import re
import typing
from typing import Any

from _lottery_ticket.refusals import choices_of, option, unnamed_options

# A name in backticks, other code, a text in quotes, and an argument with its value. What looks like
# an argument is one of a function in code, and part of a path or a value in quotes.
_PARTS = re.compile(
    r"`(?P<name>\w+)`"
    r"|`[^`]*`|\w\([^()]*\)"
    r"|(?<![\w=])'[^']*'"
    r"|(?<![^\s(])(?<!--over )(?P<argument>[a-z_]+)="
    r"""(?P<value>"[^"]*"|'[^']*'|-?\w[\w.,+-]*(?<![.,]))(?![\w(]|\.\w)"""
)
_ENDS_WITH_COMMAND = re.compile(r": (pip install|lottery-ticket) [^:]*$")


def of_options(text: str, kind: type[Any]) -> str:
    """Returns a message with options of a command in place of arguments of Python.

    Names in backticks and arguments with values, such as `method="channels"`, are replaced if the
    command takes them.

    Args:
        text: The message.
        kind: Class of the options of the command.
    """
    types = typing.get_type_hints(kind)
    unnamed = unnamed_options(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    names = {name for name in names if option(name) not in unnamed}

    def worded(found: re.Match[str]) -> str:
        if found["name"] in names:
            return option(found["name"])
        if found["argument"] not in names:
            return found[0]
        name, value = option(found["argument"]), found["value"].strip("\"'")
        if value == "None":
            return f"no {name}"
        if types[found["argument"]] is bool:
            return name if value == "True" else f"--no-{name.removeprefix('--')}"
        choices = choices_of(types[found["argument"]])
        return found[0] if choices and value not in choices else f"{name} {value}"

    return _PARTS.sub(worded, text)


def sentence(text: str) -> str:
    """Returns a message with a full stop, unless it ends with a command line or has several lines.

    In Python, messages may end with the value that was received.
    """
    text = text.rstrip()
    if "\n" in text or text.endswith((".", "?", "!")) or _ENDS_WITH_COMMAND.search(text):
        return text
    return f"{text}."
