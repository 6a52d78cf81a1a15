"""The registry of named things: criteria, structures, distributions, schedules and treatments.

All of them follow the same rules for registration, for functions that were not registered, for
restoring from a configuration and for refusing names. A name stands for one thing: a custom
function is never mistaken for a registered one of the same name.
"""

from collections.abc import Callable, Iterator, Mapping
from types import MethodType
from typing import Any, Generic, TypeVar

from _lottery_ticket.unknown import UnknownNameError

T = TypeVar("T")

# Package under which built-in classes and functions are registered with Keras (`serialization`).
PACKAGE = "lottery_ticket_pruner"


class Registry(Generic[T]):
    """The names of one kind of thing.

    Args:
        kind: Kind of thing as it is called in messages, as in "criterion".
        made: Class of the objects that `get` returns.
        register: Name of the function that users register with, for messages.
        wrap: Creates an object from an unregistered function.
        make: Creates an object from a registered value and the arguments of a configuration. May
            raise a TypeError for arguments that do not fit.
        takes: The argument of functions of this kind, for messages.
        shorthand: Function that splits a text such as "2:4" into a name and arguments. Returns None
            if the text is not a shorthand.
        examples: Examples of such texts, for messages.

    Attributes:
        made: Class of the objects that `get` returns.
    """

    def __init__(
        self,
        kind: str,
        made: type[T],
        *,
        register: str,
        wrap: Callable[[Any], T],
        make: Callable[[Any, dict[str, Any]], T],
        takes: str,
        shorthand: Callable[[str], tuple[str, dict[str, Any]] | None] = lambda text: None,
        examples: str = "",
    ) -> None:
        self._kind = kind
        self.made = made
        self._register = register
        self._wrap = wrap
        self._make = make
        self._takes = takes
        self._shorthand = shorthand
        self._examples = examples
        self._things: dict[str, object] = {}
        self._values: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._things

    def items(self) -> Iterator[tuple[str, object]]:
        """Yields each name with the function or class that was registered under it."""
        yield from self._things.items()

    def copy(self) -> "Registry[T]":
        """Returns an independent copy."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._things, other._values = dict(self._things), dict(self._values)
        return other

    def add(self, name: str, thing: object, value: object = None) -> None:
        """Registers a function or class under a name.

        Args:
            name: The name.
            thing: The function or class.
            value: Value that is passed to `make`. By default `thing`.

        Raises:
            ValueError: If something else has this name, or the name is not valid. Defining the same
                function or class again (a notebook cell run twice) replaces the earlier one.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(
                f"A {self._kind} must be registered under a non-empty name. Received: {name!r}"
            )
        known = self._things.get(name)
        if known is not None and origin(known) != origin(thing):
            raise ValueError(
                f"The {self._kind} name {name!r} is taken by {origin(known)}. Register "
                "under another name."
            )
        if self._shorthand(name) is not None:
            raise ValueError(
                f"The {self._kind} name {name!r} is taken: it is short for "
                f"{self._shorthand(name)}. Register under another name."
            )
        self._things[name] = thing
        self._values[name] = thing if value is None else value

    def get(self, identifier: object) -> T:
        """Resolves an identifier.

        Args:
            identifier: An object of this kind; a registered name; a dict from `get_config()` or
                Keras' `serialize_keras_object`; or a function.

        Raises:
            ValueError: If the name is unknown, the arguments do not fit, an unregistered function
                has a registered name, or the type of `identifier` is not supported.
        """
        if isinstance(identifier, self.made):
            return identifier
        if isinstance(identifier, str):
            return self._from_name(identifier, {})
        if isinstance(identifier, Mapping):
            return self._from_config(identifier)
        if callable(identifier) and not isinstance(identifier, type):
            return self._wrap(identifier)
        raise ValueError(
            f"A {self._kind} must be a name, a configuration dict, a `{self.made.__name__}` "
            f"or a function of {self._takes}. "
            f"Received: {identifier!r} of type {type(identifier).__name__}"
        )

    def value_of(self, function: object) -> Any:
        """Returns the value registered with this function or class, or None."""
        return next((self._values[n] for n, t in self._things.items() if _same(t, function)), None)

    def name_of(self, thing: object) -> str:
        """Returns the name under which `thing` is registered, or else its `__name__`."""
        for name, known in self._things.items():
            if _same(known, thing):
                return name
        return getattr(thing, "__name__", type(thing).__name__)

    def checked(self, name: str, thing: object) -> str:
        """Returns the name if `get` resolves it to this very function or class.

        Raises:
            ValueError: If the name belongs to a different one.
        """
        known = self._things.get(name, self._shorthand(name))
        if known is not None and not _same(known, thing):
            raise ValueError(
                f"The function or class named {name!r} is not the {self._kind} registered under "
                f"that name. Rename it, or `{self._register}` it under a different name. If it "
                "was registered again since, `get` it by its name."
            )
        return name

    def _from_name(self, name: object, arguments: dict[str, Any]) -> T:
        short = self._shorthand(name) if isinstance(name, str) else None
        if short is not None:
            name, arguments = short[0], short[1] | arguments
        if not isinstance(name, str) or name not in self._values:
            known = [*filter(None, self._examples.split(", ")), *self]
            raise UnknownNameError(
                self._kind,
                name,
                known,
                f"Pass a custom function itself, or `{self._register}` it under this name. "
                f"Received: {name!r}",
            )
        try:
            return self._make(self._values[name], arguments)
        except TypeError as error:
            raise ValueError(
                f"The {self._kind} {name!r} cannot be created from the arguments {arguments}: "
                f'{error}. Arguments go next to the name, as in {{"name": {name!r}, ...}}.'
            ) from error

    def _from_config(self, config: Mapping[str, Any]) -> T:
        inner = config.get("config", config)
        if isinstance(inner, str):
            return self._from_keras_function(inner)
        if not isinstance(inner, Mapping):
            raise ValueError(
                f"The configuration of a {self._kind} must have a name. Received: {dict(config)}"
            )
        arguments = dict(inner)
        return self._from_name(arguments.pop("name", None), arguments)

    def _from_keras_function(self, name: str) -> T:
        """Resolves a function as serialized by Keras: its name, with or without its package."""
        package, _, own = name.rpartition(">")
        if package == self.made.__module__:
            return self._from_name(own, {})
        for known, thing in self._things.items():
            of_ours = getattr(thing, "__module__", "").startswith(f"{PACKAGE}.")
            if not of_ours and getattr(thing, "__name__", None) == own:
                return self._from_name(known, {})
        raise ValueError(
            f"The configuration of a function contains only its name, {name!r}, and no custom "
            f"{self._kind} is registered under that name. `{self._register}` it, and serialize "
            f"the result of `get`. Received: {name!r}"
        )


def origin(thing: object) -> str:
    """Returns the module and name of a function or class, or of the class of an object."""
    qualname = getattr(thing, "__qualname__", None)
    if qualname is None:
        thing = type(thing)
        qualname = thing.__qualname__
    return f"{getattr(thing, '__module__', None)}.{qualname}"


def _same(known: object, thing: object) -> bool:
    # A method is another object each time it is read.
    return known is thing or (isinstance(thing, MethodType) and known == thing)
