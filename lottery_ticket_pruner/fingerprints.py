"""Fingerprints that identify arrays by content, functions by code and objects by configuration.

Work that was interrupted may only be resumed if it is still the same work. Names do not show this:
an edited function keeps its name, and two closures of one factory have the same name. Pickles do
not show it either: they contain line numbers and file names, and imported functions only by name.

The fingerprint of a function covers its instructions, constants and defaults, the values in its
closure, the global values it refers to, and all custom functions and classes among them,
recursively. Comments, line numbers, file names and function names do not count. Objects of an
installed library count by name, not by version. What code refers to by text (`getattr`, `exec`,
files that it opens) is not covered. A fingerprint is the same in every process of one version of
Python, and starts with that version.
"""

import contextlib
import copyreg
import dataclasses
import dis
import functools
import hashlib
import importlib.util
import inspect
import json
import sys
import sysconfig
import types
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import keras
import numpy as np

from lottery_ticket_pruner import _keras
from lottery_ticket_pruner.registry import PACKAGE

_LIBRARIES = {PACKAGE, "masked_layers", "keras", "tensorflow", "jax", "jaxlib", "torch", "numpy"}
_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
# Attributes of a class other than its code: its place in a file, and values derived from the rest.
_NOT_CODE = {
    *("__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__"),
    *("__firstlineno__", "__static_attributes__", "__annotate__", "__annotate_func__"),
    *("__annotations_cache__", "__orig_bases__", "__parameters__", "__match_args__", "_abc_impl"),
    *("__dataclass_fields__", "__dataclass_params__", "__abstractmethods__"),
}
_OF_THE_FILE = {"__name__", "__file__", "__package__", "__spec__", "__loader__", "__builtins__"}
# Our modules that have moved. Objects that code imports from them keep their earlier names.
_EARLIER = {
    "lottery_ticket_pruner.mask_schedules": "lottery_ticket_pruner.callbacks",
    "lottery_ticket_pruner.training.augmentation": "lottery_ticket_pruner.augmentation",
    "lottery_ticket_pruner.training.loading": "lottery_ticket_pruner.data",
    "lottery_ticket_pruner.training.loops": "lottery_ticket_pruner.training",
    "masked_layers.shrinking.smaller_model": "masked_layers.shrinking",
}
# Public names that have changed, after their modules.
_EARLIER_NAMES = {
    "lottery_ticket_pruner.data.to_arrays": "lottery_ticket_pruner.data.arrays_of",
    "lottery_ticket_pruner.training.dataset.ArrayDataset": (
        "lottery_ticket_pruner.training.dataset.Examples"
    ),
}


class UnidentifiedError(ValueError):
    """An error for an object without readable state, such as an open file in a closure."""


class _Named(Protocol):
    """A criterion, a treatment or a structure."""

    @property
    def name(self) -> str: ...


def digest(data: Any) -> str:
    """Returns a hash of nested arrays (lists and dicts of any depth)."""
    found = hashlib.sha256()
    for path, leaf in keras.tree.flatten_with_path(data):
        array = np.asarray(() if leaf is None else leaf)
        found.update(f"{path} {array.shape} {array.dtype}".encode())
        found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.hexdigest()[:16]


def of_json(values: object) -> str:
    """Returns a hash of JSON data that does not depend on the order of dicts."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def fingerprint(thing: object) -> str:
    """Returns a hash that changes with the code, configuration or state of an object.

    Args:
        thing: A function, a class, or an object. An object with `get_config()` is identified by its
            class and configuration, any other object by its class and attributes.

    Raises:
        UnidentifiedError: If it contains something without readable state: an open file, a lock, or
            a C function of a custom module.
    """
    name = getattr(thing, "name", None)  # Criteria have one, for example.
    found = _Hasher(name if isinstance(name, str) else _name(thing)).digest(thing, "")
    return f"python{sys.version_info[0]}.{sys.version_info[1]}-{found.hex()[:16]}"


def description(thing: object) -> Any:
    """Describes the configuration of an optimizer, a loss or an augmentation as JSON data.

    Objects of libraries are described by name and configuration. Custom objects also have a
    fingerprint as `"code"`, or the reason why they have none as `"unidentified"`. Names of Keras
    objects are left out, because Keras numbers them per process.
    """
    if thing is None or isinstance(thing, str | int | float):
        return thing
    if isinstance(thing, np.ndarray | np.generic):
        return thing.tolist()
    if isinstance(thing, Mapping):
        if _is_lambda(thing):
            return "<lambda>"
        return {key: description(value) for key, value in thing.items() if key != "name"}
    if isinstance(thing, list | tuple):
        return [description(value) for value in thing]
    if _is_known(thing):
        return _name(thing)
    kind = type(thing)
    if hasattr(thing, "get_config") and not isinstance(thing, type):
        config = {"class_name": kind.__name__, **description(thing.get_config())}
        return config if _is_known(kind) and not _own(thing) else config | _code(thing)
    if dataclasses.is_dataclass(thing) and _is_known(kind):
        return repr(thing)
    return {"name": _name(thing)} | _code(thing)


def identity(made: _Named) -> str | dict[str, str]:
    """Describes a criterion, a treatment or a structure as JSON data.

    Returns the name if it is built in. A custom one is a dict with the name and either a
    fingerprint as `"code"` or the reason why it has none as `"unidentified"`.
    """
    return made.name if _is_known(_code_behind(made)) else {"name": made.name} | _code(made)


def names_with_code(made: Iterable[_Named]) -> str:
    """Returns the names of the custom objects in `made`, each with its fingerprint.

    The result is empty if all are built in.

    Raises:
        UnidentifiedError: If one of them has no fingerprint.
    """
    return ", ".join(
        f"{one.name} {fingerprint(one)}" for one in made if not _is_known(_code_behind(one))
    )


def _code_behind(made: _Named) -> Any:
    """Returns the function of an object that has one, or else its class."""
    return getattr(made, "function", type(made))


def layers(model: keras.Model) -> Any:
    """Returns a hash of the layers of a model, their order and their configuration.

    Names that Keras generates and weights are not included. If a layer cannot be identified, the
    result is a dict with the reasons instead.
    """
    found = _keras.flatten(model)
    places = {layer.name: f"layer {place}" for place, layer in enumerate(found)}
    described = [_placed(_of_layer(layer), places) for layer in found]
    if why := reasons(described):
        return {"unidentified": " ".join(why)}
    return hashlib.sha256(json.dumps(described, default=description).encode()).hexdigest()[:16]


def reasons(described: object) -> list[str]:
    """Returns the reasons why parts of a description are unidentified. Empty if there are none."""
    if isinstance(described, Mapping):
        own = [described["unidentified"]] if "unidentified" in described else []
        return own + [why for value in described.values() for why in reasons(value)]
    if isinstance(described, list):
        return [why for value in described for why in reasons(value)]
    return []


def _code(thing: object) -> dict[str, str]:
    try:
        return {"code": fingerprint(thing)}
    except UnidentifiedError as error:
        return {"unidentified": str(error)}


def _of_layer(layer: keras.layers.Layer) -> Any:
    """Describes a layer by its class and its configuration, if it has one."""
    kind = type(layer)
    described: dict[str, Any] = {"class_name": kind.__name__}
    with contextlib.suppress(NotImplementedError):  # The layers of a subclassed model come later.
        described["config"] = description(layer.get_config())
    for base in kind.__mro__:
        if not _is_known(base):
            described |= {f"code of {base.__name__}": _code(base)}
    if own := _own(layer):
        described["own"] = {name: description(value) for name, value in own.items()}
    return described


def _placed(described: object, places: Mapping[str, str]) -> Any:
    """Returns the description with layer names replaced by the positions of the layers."""
    if isinstance(described, Mapping):
        return {key: _placed(value, places) for key, value in described.items()}
    if isinstance(described, list | tuple):
        return [_placed(value, places) for value in described]
    return places.get(described, described) if isinstance(described, str) else described


def _own(thing: object) -> dict[str, Any]:
    """Returns the custom attributes of a Keras object, such as the function that a loss wraps.

    The configuration of the object contains only their names.
    """

    def is_own(value: object) -> bool:
        if isinstance(value, functools.partial):
            value = value.func
        if isinstance(value, types.FunctionType | types.MethodType):
            # Keras wraps methods of every layer in functions.
            return not _is_library(value.__module__) and getattr(value, "__self__", 0) is not thing
        if isinstance(value, type | keras.Variable | keras.layers.Layer):
            return False
        return hasattr(value, "get_config") and not _is_known(type(value))

    attributes = getattr(thing, "__dict__", {})
    return {name: value for name, value in sorted(attributes.items()) if is_own(value)}


def _name(thing: object) -> str:
    return getattr(thing, "__name__", type(thing).__name__)


def _module_of(thing: object) -> Any:
    module = getattr(thing, "__module__", None)
    if module is None:  # A method of a C class, for example.
        module = getattr(getattr(thing, "__objclass__", type(thing)), "__module__", None)
    return module


def _is_known(thing: object) -> bool:
    """Returns whether something is importable from a library, so that its name identifies it."""
    module = _module_of(thing)
    if not isinstance(module, str) or not _is_library(module):
        return False
    found = sys.modules.get(module)
    for part in getattr(thing, "__qualname__", _name(thing)).split("."):
        found = getattr(found, part, None)
    return found is thing


@functools.cache
def _is_library(module: str) -> bool:
    top = module.partition(".")[0]
    if top == "__main__":
        return False
    if top in _LIBRARIES:
        return True
    # A module that is imported tells its own place: the package around it may have the name of an
    # installed one (`tests` is often taken).
    file = getattr(sys.modules.get(module), "__file__", None)
    path = _place_of(top) if file is None else Path(file)
    if path is None:  # Built into Python, or created by code.
        return top in sys.stdlib_module_names
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    return bool({"site-packages", "dist-packages"} & set(path.parts)) or any(
        path.is_relative_to(folder) for folder in standard
    )


def _place_of(package: str) -> Path | None:
    """Returns the file or folder of a top-level module, which need not be imported yet."""
    found = sys.modules.get(package)
    file, folders = getattr(found, "__file__", None), getattr(found, "__path__", None)
    if found is None:
        with contextlib.suppress(ImportError, ValueError):
            spec = importlib.util.find_spec(package)
            if spec is not None:
                file = spec.origin if spec.has_location else None
                folders = spec.submodule_search_locations
    place = file or next(iter(folders or ()), None)
    return None if place is None else Path(place)


class _Hasher:
    """Hashes objects by their contents, each object once, and cycles by their length."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._done: dict[int, tuple[Any, bytes]] = {}  # Keeps objects alive, so ids stay unique.
        self._active: dict[int, int] = {}
        # One object per module, or modules that import each other would never end.
        self._sources: dict[str, Any] = {}
        self._package = ""  # Package of the current code, for relative imports.

    def digest(self, thing: object, where: str) -> bytes:
        """Returns the hash of an object. `where` says where it was found, for error messages."""
        if id(thing) in self._done:
            return self._done[id(thing)][1]
        if id(thing) in self._active:
            return f"cycle {len(self._active) - self._active[id(thing)]}".encode()
        self._active[id(thing)] = len(self._active)
        found = hashlib.sha256()
        try:
            for part in self._parts(thing, where):
                part = part.encode() if isinstance(part, str) else part
                found.update(len(part).to_bytes(8, "big") + part)
        finally:
            del self._active[id(thing)]
        self._done[id(thing)] = thing, found.digest()
        return found.digest()

    def _parts(self, thing: object, where: str) -> Iterator[str | bytes]:
        if isinstance(thing, types.FunctionType) and not _is_known(thing):
            yield from self._function(thing, where)
        elif isinstance(thing, types.CodeType):
            yield from self._instructions(thing, where)
        elif isinstance(thing, type) and not _is_known(thing):
            yield from self._class(thing, where)
        elif isinstance(thing, types.ModuleType):
            yield from self._module(thing.__name__)
        elif callable(thing) and _is_known(thing):
            module = _EARLIER.get(_module_of(thing), _module_of(thing))
            name = f"{module}.{getattr(thing, '__qualname__', _name(thing))}"
            yield _EARLIER_NAMES.get(name, name)
        elif isinstance(thing, staticmethod | classmethod):
            yield type(thing).__name__
            yield self.digest(thing.__func__, where)
        elif isinstance(thing, property):
            yield "property"
            yield self._all((thing.fget, thing.fset, thing.fdel), where)
        elif isinstance(thing, functools.cached_property):
            yield "cached_property"
            yield self.digest(thing.func, where)
        elif callable(thing) and (inner := _wrapped(thing)) is not None:
            yield type(thing).__qualname__
            yield self.digest(inner, where)
        else:
            yield from self._value(thing, where)

    def _value(self, thing: Any, where: str) -> Iterator[str | bytes]:
        kind = type(thing)
        yield kind.__qualname__
        if kind in _PLAIN:
            yield repr(thing)
        elif kind in (tuple, list):
            yield self._all(thing, where)
        elif kind in (set, frozenset):
            yield b"".join(sorted(self.digest(item, where) for item in thing))
        elif kind in (dict, types.MappingProxyType):
            yield self._all(thing.items(), where)
        elif (array := _array(thing)) is not None:
            yield f"{array.dtype} {array.shape}"
            if array.dtype.hasobject:
                yield self._all(array.ravel().tolist(), where)
            else:
                yield np.ascontiguousarray(array).tobytes()
        elif hasattr(kind, "get_config") and kind.__module__.partition(".")[0] != PACKAGE:
            yield from self._configured(thing, where)
        else:
            yield from self._reduced(thing, where)

    def _all(self, things: Iterable[object], where: str) -> bytes:
        return b"".join([self.digest(thing, where) for thing in things])

    def _configured(self, thing: Any, where: str) -> Iterator[bytes]:
        """Yields the class and configuration of a Keras-like object, and the weights of a layer.

        If a custom class inherits `get_config` from a library, the attributes that its methods use
        are included as well, because such a configuration does not contain added arguments.
        """
        kind = type(thing)
        yield self.digest(kind, where)
        with contextlib.suppress(NotImplementedError):
            yield self.digest(_without_names(thing.get_config()), where)
        yield self.digest(_own(thing), where)
        if isinstance(thing, keras.layers.Layer):
            yield self._all(thing.variables, where)
        if not _is_known(kind) and _is_library(kind.get_config.__module__):
            named: set[str] = set()
            for base in kind.__mro__:
                if not _is_known(base):
                    functions = [f for f in vars(base).values() if inspect.isfunction(f)]
                    named.update(*(_names_in(function.__code__) for function in functions))
            for name in sorted(named & vars(thing).keys()):
                value = vars(thing)[name]
                if not isinstance(value, keras.Variable | keras.layers.Layer):
                    yield self.digest((name, value), f"{where} its attribute `{name}`,")

    def _reduced(self, thing: object, where: str) -> Iterator[bytes]:
        """Yields the parts by which Python copies any other object: its class and its state."""
        try:
            of_others = copyreg.dispatch_table.get(type(thing))  # Compiled patterns, for example.
            reduced = of_others(thing) if of_others else thing.__reduce_ex__(4)
        except Exception as error:  # Classes raise errors of all types here.
            raise self._unidentified(thing, where) from error
        if isinstance(reduced, str):
            if not _is_library(getattr(thing, "__module__", None) or type(thing).__module__):
                raise self._unidentified(thing, where)
            yield reduced.encode()
            return
        make, arguments, state, items, pairs = (*reduced, None, None, None)[:5]
        if make is getattr and isinstance(arguments[0], types.ModuleType):
            raise self._unidentified(thing, where)  # A C function.
        yield self._all((make, arguments, state, list(items or ()), list(pairs or ())), where)

    def _unidentified(self, thing: object, where: str) -> UnidentifiedError:
        kind = type(thing)
        return UnidentifiedError(
            f"{self._root} cannot be told from others of its name: {where.strip() or 'it,'} a "
            f"{kind.__module__}.{kind.__qualname__}, has no readable state. Make it an object of a "
            "class whose `get_config()` returns everything that affects its behavior, or create "
            "such objects inside the function."
        )

    def _class(self, thing: type, where: str) -> Iterator[bytes]:
        yield self._all(thing.__bases__, where)
        yield self.digest(type(thing), where)
        for name, value in sorted(vars(thing).items()):
            if name not in _NOT_CODE:
                yield self.digest((name, value), f"{where} `{name}` of {thing.__name__},")

    def _module(self, name: str) -> Iterator[str | bytes]:
        """Yields the name of a library, or the code of a custom module."""
        yield "module"
        if _is_library(name):
            yield name
            return
        if name not in self._sources:
            self._sources[name] = None, ""
            with contextlib.suppress(AttributeError, ImportError, ValueError):
                spec = importlib.util.find_spec(name)
                if spec is not None:
                    loader: Any = spec.loader  # A loader without code raises the AttributeError.
                    self._sources[name] = loader.get_code(name), spec.parent
        source, package = self._sources[name]
        if source is None:
            yield name
        else:
            with self._within(package):
                yield self.digest(source, f" module {name},")

    @contextlib.contextmanager
    def _within(self, package: str | None) -> Iterator[None]:
        """Temporarily resolves relative imports from this package."""
        before, self._package = self._package, package or ""
        yield
        self._package = before

    def _function(self, function: types.FunctionType, where: str) -> Iterator[str | bytes]:
        code = function.__code__
        with self._within(function.__globals__.get("__package__")):
            yield self.digest(code, where)
        yield self._all((function.__defaults__, function.__kwdefaults__), f"{where} a default,")
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                value = cell.cell_contents
            except ValueError:
                value = "empty"
            yield name
            yield self.digest(value, f"{where} the variable `{name}` in its closure,")
        named = _names_in(code)
        for name in sorted(named & vars(function).keys()):
            yield self.digest((name, vars(function)[name]), f"{where} its attribute `{name}`,")
        for name, value in sorted(_globals_in(code, function.__globals__).items()):
            yield name
            yield self.digest(value, f"{where} the global `{name}`,")

    def _instructions(self, code: types.CodeType, where: str) -> Iterator[str | bytes]:
        arguments = code.co_argcount + code.co_kwonlyargcount
        yield f"{code.co_flags} {code.co_posonlyargcount} {code.co_argcount}"
        yield " ".join(code.co_varnames[:arguments])
        yield getattr(code, "co_exceptiontable", b"")
        left_out = ("NOP", "CACHE", "EXTENDED_ARG")
        instructions = [i for i in dis.get_instructions(code) if i.opname not in left_out]
        for place, one in enumerate(instructions):
            following = instructions[place + 1] if place + 1 < len(instructions) else None
            yield one.opname
            if one.opcode in dis.hasconst:
                # In the body of a class, its line number and docstring are constants.
                if following is None or following.argval not in ("__firstlineno__", "__doc__"):
                    yield self.digest(one.argval, where)
            elif isinstance(one.argval, str | int):
                yield str(one.argval)
            if one.opname == "IMPORT_NAME":
                level, parts = (i.argval for i in instructions[place - 2 : place])
                yield from self._import(one.argval, level, parts or ())

    def _import(self, name: str, level: int, parts: Iterable[str]) -> Iterator[str | bytes]:
        """Yields an imported module, and the modules that may be among the imported names."""
        if level:
            try:
                name = importlib.util.resolve_name("." * level + name, self._package)
            except ImportError:  # Python cannot resolve it either.
                return
        if not _is_library(name):
            for module in (name, *(f"{name}.{part}" for part in parts)):
                yield from self._module(module)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """Yields the code of a function and of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


def _names_in(code: types.CodeType) -> set[str]:
    return {name for inner in _codes(code) for name in inner.co_names}


def _globals_in(code: types.CodeType, known: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the global values that code refers to; of custom modules only the attributes used."""
    found = {}
    for inner in _codes(code):
        instructions = list(dis.get_instructions(inner))
        for place, one in enumerate(instructions):
            if one.opname not in ("LOAD_GLOBAL", "LOAD_NAME") or one.argval in _OF_THE_FILE:
                continue
            name = one.argval
            if name not in known:
                continue  # A built-in name, or one that does not exist (yet).
            value = known[name]
            for following in instructions[place + 1 :]:
                own = isinstance(value, types.ModuleType) and not _is_library(value.__name__)
                attribute = following.argval
                if not own or following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                if not hasattr(value, attribute):
                    break
                name, value = f"{name}.{attribute}", getattr(value, attribute)
            found[name] = value
    return found


def _wrapped(thing: object) -> Any:
    """Returns the function wrapped by a library's decorator (cache, compiler), or None."""
    if isinstance(thing, types.FunctionType | type) or not _is_library(type(thing).__module__):
        return None
    return getattr(thing, "__wrapped__", None) or getattr(thing, "python_function", None)


def _array(thing: object) -> np.ndarray | None:
    """Returns the values of an array, variable or tensor of any backend, or None."""
    if isinstance(thing, np.ndarray | np.generic):
        return np.asarray(thing)
    if isinstance(thing, keras.Variable) or keras.ops.is_tensor(thing):
        return keras.ops.convert_to_numpy(thing)
    top = type(thing).__module__.partition(".")[0]
    if top not in ("jax", "jaxlib", "torch", "tensorflow") or not hasattr(thing, "__array__"):
        return None
    return np.asarray(thing.detach().cpu() if hasattr(thing, "detach") else thing)


def _without_names(config: object) -> Any:
    if isinstance(config, Mapping):
        if _is_lambda(config):
            return "<lambda>"
        return {key: _without_names(value) for key, value in config.items() if key != "name"}
    if isinstance(config, list | tuple):
        return [_without_names(value) for value in config]
    return config


def _is_lambda(config: Mapping[str, Any]) -> bool:
    """Returns whether this is a serialized lambda, whose bytes contain its file and lines."""
    return config.get("class_name") == "__lambda__"
