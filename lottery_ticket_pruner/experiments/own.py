"""Custom objects of the user's modules, given as `module:name` or `path/to/file.py:name`."""

import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

import lottery_ticket_pruner
from _lottery_ticket import hints
from lottery_ticket_pruner.compression import split_off_test
from lottery_ticket_pruner.training import pair_of

_Value = TypeVar("_Value")

_SHOWN = 4
_MOST_PARTS = 3
# The module of each file, with the bytes that it was made from.
_LOADED: dict[Path, tuple[bytes, Any]] = {}
_DATA = "load data with"
_HERE = Path(lottery_ticket_pruner.__file__).resolve().parent


class DatasetNotFoundError(FileNotFoundError):
    """An error for a data set that is not in the given folder and could not be downloaded."""


class UserCodeError(ValueError):
    """An error for an exception in the user's own code, which is its cause.

    The first line of the message says where and what. The user's part of the traceback follows.
    """


def parts_of(name: str) -> list[tuple[Any, Any]]:
    """Calls a function and returns its data as pairs: training, validation if given, and test.

    If it returns a single pair, the test data are those that `prune` splits off, and a warning says
    so.

    Args:
        name: `module:function` or `path/to/file.py:function`.

    Raises:
        DatasetNotFoundError: If the file or module does not exist.
        UserCodeError: If the function or its module raises an exception.
        ValueError: If the function does not exist, or returns something else.
    """
    with _returned(name, _DATA) as (folder, returned):
        if _is_pair(returned):
            return _split(name, folder, returned)
        parts = returned if isinstance(returned, tuple | list) else [returned]
        pairs = [_pair(name, folder, part, returned) for part in parts[: _MOST_PARTS + 1]]
        if len(pairs) == 1:
            return _split(name, folder, pairs[0])
        if len(pairs) not in (2, _MOST_PARTS):
            raise _unexpected(name, returned)
        return pairs


def value_of(name: str, purpose: str, read: Callable[[Any], _Value]) -> _Value:
    """Calls a function without arguments, and returns what `read` makes of its result.

    Args:
        name: `module:function` or `path/to/file.py:function`.
        purpose: What the function is for, for messages, such as `"load data with"`.
        read: Function that checks or converts the result. Modules of the user can still be
            imported while it runs. Its ValueErrors say what is wrong with the result.

    Raises:
        DatasetNotFoundError: If the file or module does not exist.
        UserCodeError: If the function, its module or code that `read` calls raises an exception.
        ValueError: If the function does not exist, takes arguments, or `read` refuses its result.
    """
    with _returned(name, purpose) as (folder, returned), _named_results(name, folder):
        return read(returned)


def object_of(name: str, purpose: str, read: Callable[[Any], _Value]) -> _Value:
    """Imports an object, and returns what `read` makes of it.

    Args:
        name: `module:name` or `path/to/file.py:name`.
        purpose: What the object is for, for messages, such as `"use as --strategy"`.
        read: Function that checks or converts the object, as for `value_of`.

    Raises:
        DatasetNotFoundError: If the file or module does not exist.
        UserCodeError: If the module or code that `read` calls raises an exception.
        ValueError: If the module has no such object, or `read` refuses it.
    """
    folder = _folder_of(name)
    with _importing_from(folder):
        found = _attribute(name, folder, purpose, lambda found: found is not None)
        with _named_results(name, folder):
            return read(found)


@contextlib.contextmanager
def named_errors_of(names: Iterable[str]) -> Iterator[None]:
    """Raises a UserCodeError for an exception in code of the modules of some objects."""
    try:
        yield
    except UserCodeError:
        raise
    except Exception as error:
        found = [(name, _frames_in(_folder_of(name), error)) for name in names]
        found = [(name, frames) for name, frames in found if frames]
        if not found:
            raise
        # Of objects in one folder, the one whose own code was running.
        ran = [
            name
            for name, frames in found
            if any(frame.name == name.rpartition(":")[2] for frame in frames)
        ]
        name = (ran or [found[0][0]])[0]
        raise UserCodeError(_described(name, _folder_of(name), error)) from error


def is_location(name: object) -> bool:
    """Returns True for a text such as `module:name`, unlike 2:4."""
    return isinstance(name, str) and ":" in name and name.rpartition(":")[2].isidentifier()


@contextlib.contextmanager
def _returned(name: str, purpose: str) -> Iterator[tuple[Path, Any]]:
    """Yields the folder of a function and what it returns.

    In the scope, modules that the result may still import can be found.
    """
    folder = _folder_of(name)
    with _importing_from(folder):
        make = _function(name, folder, purpose)
        _check_callable(name, make)
        with _named_errors(name, folder):
            returned = make()
        yield folder, returned


def import_module_of(name: str) -> None:
    """Imports the module of a function, which may register criteria, structures and treatments.

    Raises:
        UserCodeError: If it raises an exception.
        DatasetNotFoundError: If it does not exist.
        ValueError: If the function does not exist.
    """
    folder = _folder_of(name)
    with _importing_from(folder):
        _function(name, folder, _DATA)


def _folder_of(name: str) -> Path:
    source, _, function = name.rpartition(":")
    if not source or not function:
        raise ValueError(
            f"Expected module:function or path/to/file.py:function. Received: {name!r}."
        )
    return (Path(source).parent if source.endswith(".py") else Path.cwd()).resolve()


def _pair(name: str, folder: Path, part: object, returned: object) -> tuple[Any, Any]:
    """Returns one part of the returned data as inputs and labels."""
    with _named_results(name, folder):
        pair = pair_of(part)
    # An array, or a data set of inputs alone, has no labels.
    if pair is None or len(pair) != 2 or pair[1] is None:
        raise _unexpected(name, returned)
    return pair[0], pair[1]


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """Temporarily makes modules in a folder importable, like those next to a script."""
    before = sys.path[:]
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path[:] = before


@contextlib.contextmanager
def _named_errors(name: str, folder: Path) -> Iterator[None]:
    """Raises a UserCodeError for an exception of the user's code, with its location."""
    try:
        yield
    # If the user's module ended the process, the command would end with its status, silently.
    except (Exception, SystemExit) as error:
        raise UserCodeError(_described(name, folder, error)) from error


@contextlib.contextmanager
def _named_results(name: str, folder: Path) -> Iterator[None]:
    """Names the function in errors about what it returned, which may run the user's code."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError) and not _frames_in(folder, error):
            raise ValueError(f"{name}: {error}") from error  # What it returned is wrong.
        raise UserCodeError(_described(name, folder, error)) from error


def _described(name: str, folder: Path, error: BaseException) -> str:
    """Returns a line about the exception and its location, and the user's part of the traceback."""
    kind = traceback.format_exception_only(error)
    if isinstance(error, SyntaxError) and error.filename:
        place = f"'{error.filename}', line {error.lineno}"
        return "".join([f"{name} raised {kind[-1].strip()} ({place})\n", *kind]).rstrip()
    frames = traceback.extract_tb(error.__traceback__)
    first = 0
    while first < len(frames) - 1 and _is_above(frames[first].filename):
        first += 1
    # The last line of the user's code: for an error inside a library, this is the call.
    frame = (_frames_in(folder, error) or frames)[-1]
    place = f"'{frame.filename}', line {frame.lineno}, in {frame.name}"
    lines = [
        f"{name} raised {kind[-1].strip()} ({place})\n",
        "Traceback (most recent call last):\n",
        *traceback.StackSummary.from_list(frames[first:]).format(),
        *kind,
    ]
    return "".join(lines).rstrip()


def _frames_in(folder: Path, error: BaseException) -> list[traceback.FrameSummary]:
    """Returns the lines of a traceback that belong to files in a folder, without our own."""
    frames = traceback.extract_tb(error.__traceback__)
    return [
        frame
        for frame in frames
        if Path(frame.filename).parent == folder and not _is_ours(frame.filename)
    ]


def _is_above(file: str) -> bool:
    return _is_ours(file) or file.startswith("<frozen importlib") or file == importlib.__file__


def _is_ours(file: str) -> bool:
    return Path(file).is_relative_to(_HERE)


def _function(name: str, folder: Path, purpose: str) -> Callable[[], Any]:
    return _attribute(name, folder, purpose, callable)


def _attribute(name: str, folder: Path, purpose: str, fits: Callable[[Any], bool]) -> Any:
    source, _, attribute = name.rpartition(":")
    with _named_errors(name, folder):
        module = _module(source)
    if module is None:
        raise DatasetNotFoundError(
            f"There is no file '{source}' to {purpose}."
            if source.endswith(".py")
            else f"There is no module {source!r} to {purpose}, neither here nor among what is "
            "installed. A file is named by its path, as in path/to/file.py:function."
        )
    found = getattr(module, attribute, None)
    if not fits(found):
        there = [key for key, value in vars(module).items() if _is_own_function(value, module)]
        raise ValueError(
            f"{source} has no function {attribute!r} to {purpose}."
            f"{hints.question(attribute, there)} It has: {', '.join(there) or 'none'}."
        )
    return found


def _module(source: str) -> Any:
    """Imports the module of a file or name. Returns None if it does not exist.

    Like a module, a file is executed only once, unless it has changed.
    """
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if not f"{source}.".startswith(f"{error.name}."):
                raise
            return None
    path = Path(source).resolve()
    if not path.is_file():
        return None
    text = path.read_bytes()
    if path in _LOADED and _LOADED[path][0] == text:
        return _LOADED[path][1]
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_of_data", path)
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # Dataclasses look up their module there.
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    _LOADED[path] = text, module
    return module


def _is_own_function(value: Any, module: Any) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _is_pair(returned: object) -> bool:
    """Returns True for a tuple or list of two arrays, unlike two data sets of batches."""
    return (
        isinstance(returned, tuple | list)
        and len(returned) == 2
        and all(hasattr(part, "__array__") for part in returned)
    )


def _split(name: str, folder: Path, pair: Any) -> list[tuple[Any, Any]]:
    with _named_results(name, folder):
        x, y = (np.asarray(part) for part in pair)
    if not (x.ndim and y.ndim and len(x) == len(y) > 1):
        raise _unexpected(name, pair)
    train, test = split_off_test((x, y))
    warnings.warn(
        f"{name} returned one pair (x, y): a fifth of the examples ({len(test[0]):,}) is the test "
        "data, chosen by a fixed permutation, which is that of `prune`. To choose it yourself, "
        "return ((x_train, y_train), (x_test, y_test)).",
        stacklevel=2,
    )
    return [train, test]


def _unexpected(name: str, returned: object) -> ValueError:
    return ValueError(
        f"{name} must return ((x_train, y_train), (x_test, y_test)), three such pairs, the second "
        "one for validation, one pair of arrays (x, y), or as many data sets of batches (inputs, "
        f"targets). Received: {_in_words(returned)}."
    )


def _in_words(value: object, depth: int = 2) -> str:
    """Describes a value: its type, the shape of an array, the parts of a tuple or list."""
    kind = type(value).__name__
    if isinstance(value, tuple | list) and depth:
        parts = [_in_words(part, depth - 1) for part in value[:_SHOWN]]
        parts += ["..."] if len(value) > _SHOWN else []
        return f"a {kind} of {len(value)} ({', '.join(parts)})"
    shape = getattr(value, "shape", None)
    return f"{kind} of shape {tuple(shape)}" if isinstance(shape, tuple) else kind


def _check_callable(name: str, function: Callable[..., Any]) -> None:
    """Raises ValueError if a function has required arguments."""
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ValueError(
            f"{name} is called without arguments, but takes {inspect.signature(function)}: {error}."
            " Give them defaults, or name a function that calls this one."
        ) from error
    except ValueError:  # Some C functions have no signature.
        return
