"""Criteria, structures and treatments of a configuration: by name, or by location in a module."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from _lottery_ticket.refusals import option
from _lottery_ticket.unknown import UnknownNameError, named_by
from lottery_ticket_pruner import criteria, structures, treatments
from lottery_ticket_pruner.experiments import networks, own, own_networks
from lottery_ticket_pruner.fingerprints import fingerprint, names_with_code

_GETTERS: dict[str, Callable[[Any], Any]] = {
    "strategy": criteria.get,
    "kept": treatments.get_kept,
    "pruned": treatments.get_pruned,
    "structure": structures.get,
    "criteria": criteria.get,
}


def resolved(field: str, name: str, get: Callable[[Any], Any] | None = None) -> Any:
    """Returns the object that an option names.

    Args:
        field: Name of the option, such as `"strategy"`.
        name: A registered name, or the location of a function or object, such as
            `path/to/file.py:name`.
        get: Function that resolves names and objects. By default that of the option.

    Raises:
        FileNotFoundError: If the file or module does not exist.
        UserCodeError: If the module raises an exception.
        ValueError: If the name is unknown, or the object is of another kind.
    """
    get = get or _GETTERS[field]
    if own.is_location(name):
        return own.object_of(name, f"use as {option(field)}", get)
    try:
        return get(name)
    except UnknownNameError as error:
        raise named_by(field, error) from error


def identifier_of(field: str, name: str) -> Any:
    """Returns the object at a location, or a registered name unchanged."""
    return resolved(field, name) if own.is_location(name) else name


def locations(values: Mapping[str, Any]) -> list[str]:
    """Returns the locations of functions and objects in the options of an experiment."""
    fields = ("data", "network", *_GETTERS)
    return [name for _, name in _named(values, fields) if own.is_location(name)]


def code_of(values: Mapping[str, Any]) -> str:
    """Returns the custom objects in the options of an experiment with hashes of their code.

    These are criteria, treatments and structures, and the network. The result is empty if there are
    none.

    Raises:
        UnidentifiedError: If one of them cannot be identified.
        FileNotFoundError: If its file or module does not exist.
        ValueError: If it is unknown.
    """
    made = [(name, resolved(field, name)) for field, name in _named(values, _GETTERS)]
    found = [names_with_code([one]) for _, one in made]
    # What is built in has no code, but an object at a location has arguments.
    found += [
        f"{one.name} {fingerprint(one)}"
        for (name, one), code in zip(made, found, strict=True)
        if own.is_location(name) and not code
    ]
    if networks.is_own(network := values.get("network") or ""):
        found.append(f"network {own_networks.identity(network)}")
    return ", ".join(filter(None, found))


def _named(values: Mapping[str, Any], fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields each name that is given for one of the options, which may take several."""
    for field in fields:
        given = values.get(field)
        for name in given if isinstance(given, list | tuple) else (given,):
            if name is not None:
                yield field, name
