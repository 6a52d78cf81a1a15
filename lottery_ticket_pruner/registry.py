"""One rule for what is known by name: criteria, structures, distributions, schedules, treatments.

What a user registers, what a function that was never registered goes by, how a configuration finds
its way back, and which names are refused is the same for all of them. A name stands for one thing:
a custom function is never taken for a registered one of the same name.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MethodType
from typing import Any, Generic, TypeVar

T = TypeVar("T")

# Under this package, what is built in is known to Keras (see `serialization`).
PACKAGE = "lottery_ticket_pruner"


class UnknownNameError(ValueError):
    """A name that none of its kind has.

    Args:
        kind: What one of them is called, as in "criterion".
        name: The name that was given.
        known: Those that there are.
        remedy: What to do where none of those is meant, as a sentence.
    """

    def __init__(self, kind: str, name: Any, known: Sequence[str], remedy: str = "") -> None:
        close = difflib.get_close_matches(name, known, 1) if isinstance(name, str) else []
        hint = f" Did you mean {close[0]!r}?" if close else ""
        self.without_remedy = f"Unknown {kind} {name!r}.{hint} Known are: {', '.join(known)}."
        super().__init__(f"{self.without_remedy} {remedy}".rstrip())


class Registry(Generic[T]):
    """The names of one kind of thing.

    Args:
        kind: What one of them is called in messages, as in "criterion".
        made: The class of what `get` returns.
        register: The function that users register with, as messages name it.
        wrap: Makes one from a function that was not registered.
        make: Makes one from what was registered and the arguments of a configuration. It may raise
            a TypeError for arguments that do not fit.
        takes: What a function of this kind is a function of, in messages.
        shorthand: Gives for a text that stands for a name with arguments both of them, else None.
        examples: Such texts, for messages.
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
        self._made = made
        self._register = register
        self._wrap = wrap
        self._make = make
        self._takes = takes
        self._shorthand = shorthand
        self._examples = examples
        self._things: dict[str, Any] = {}
        self._values: dict[str, Any] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._things)

    def copy(self) -> "Registry[T]":
        """Returns an independent copy."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._things, other._values = dict(self._things), dict(self._values)
        return other

    def add(self, name: str, thing: Any, value: Any = None) -> None:
        """Registers a function or class under a name.

        Args:
            name: The name.
            thing: The function or class.
            value: What `make` is given, by default the thing itself.

        Raises:
            ValueError: If another one has that name, or it is none. The same one defined again (a
                notebook cell run twice) replaces the earlier one.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"A {self._kind} is registered under a name. Received: {name!r}")
        known = self._things.get(name)
        if known is not None and origin(known) != origin(thing):
            raise ValueError(
                f"The {self._kind} name {name!r} is taken by {origin(known)}. Register under "
                "another name."
            )
        if self._shorthand(name) is not None:
            raise ValueError(
                f"The {self._kind} name {name!r} is taken: it is short for "
                f"{self._shorthand(name)}. Register under another name."
            )
        self._things[name] = thing
        self._values[name] = thing if value is None else value

    def get(self, identifier: Any) -> T:
        """Resolves an identifier.

        Args:
            identifier: One of this kind; a known name; a dict from `get_config()` or Keras'
                `serialize_keras_object`; or a function.

        Raises:
            ValueError: An unknown name, arguments that do not fit it, a function that has the name
                of another one, or something that is none of these.
        """
        if isinstance(identifier, self._made):
            return identifier
        if isinstance(identifier, str):
            return self._from_name(identifier, {})
        if isinstance(identifier, Mapping):
            return self._from_config(identifier)
        if callable(identifier) and not isinstance(identifier, type):
            return self._wrap(identifier)
        raise ValueError(
            f"A {self._kind} is given as a name, a configuration dict, a `{self._made.__name__}` "
            f"or a function of {self._takes}. "
            f"Received: {identifier!r} of type {type(identifier).__name__}"
        )

    def value_of(self, function: Any) -> Any:
        """Returns what was registered with this very function or class, or None."""
        return next((self._values[n] for n, t in self._things.items() if _same(t, function)), None)

    def name_of(self, thing: Any) -> str:
        """Returns the name that something was registered under, else its own."""
        for name, known in self._things.items():
            if _same(known, thing):
                return name
        return getattr(thing, "__name__", type(thing).__name__)

    def checked(self, name: str, thing: Any) -> str:
        """Returns the name if `get` resolves it to this very thing.

        Raises:
            ValueError: If it is the name of another one.
        """
        known = self._things.get(name, self._shorthand(name))
        if known is not None and not _same(known, thing):
            raise ValueError(
                f"A function or class named {name!r} was given that is not the {self._kind} known "
                f"by that name. Rename it, or `{self._register}` it under a name of its own; if it "
                "was registered again since, `get` it by its name."
            )
        return name

    def _from_name(self, name: Any, arguments: dict[str, Any]) -> T:
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
                f"The {self._kind} {name!r} cannot be made from the arguments {arguments}: "
                f'{error}. They go beside the name, as in {{"name": {name!r}, ...}}.'
            ) from error

    def _from_config(self, config: Mapping[str, Any]) -> T:
        inner = config.get("config", config)
        if isinstance(inner, str):
            return self._from_keras_function(inner)
        if not isinstance(inner, Mapping):
            raise ValueError(
                f"A {self._kind} has a name in its configuration. Received: {dict(config)}"
            )
        arguments = dict(inner)
        return self._from_name(arguments.pop("name", None), arguments)

    def _from_keras_function(self, name: str) -> T:
        """Resolves what Keras serializes a function to: its name, with or without its package."""
        package, _, own = name.rpartition(">")
        if package == self._made.__module__:
            return self._from_name(own, {})
        for known, thing in self._things.items():
            of_ours = getattr(thing, "__module__", "").startswith(f"{PACKAGE}.")
            if not of_ours and getattr(thing, "__name__", None) == own:
                return self._from_name(known, {})
        raise ValueError(
            f"The configuration of a function says no more than its name, {name!r}, and no "
            f"{self._kind} of that name was registered by you. `{self._register}` it and give the "
            f"configuration of what `get` makes of it. Received: {name!r}"
        )


def origin(thing: Any) -> str:
    """Returns the module and name of a function, of a class or of the class of an object."""
    qualname = getattr(thing, "__qualname__", None)
    if qualname is None:
        thing = type(thing)
        qualname = thing.__qualname__
    return f"{getattr(thing, '__module__', None)}.{qualname}"


def _same(known: Any, thing: Any) -> bool:
    # A method is another object each time it is read.
    return known is thing or (isinstance(thing, MethodType) and known == thing)
