"""Refuses names that do not exist, where no import could make them known."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _lottery_ticket import hints, names
from _lottery_ticket.refusals import option

# What the names of an option stand for. Registered ones are known only after imports.
_REGISTERED = {
    "strategy": ("criterion", (*names.CRITERIA, *names.CHANNEL_CRITERIA)),
    "criteria": ("criterion", (*names.CRITERIA, *names.CHANNEL_CRITERIA)),
    "kept": ("treatment of kept weights", names.KEPT),
    "pruned": ("treatment of pruned weights", names.PRUNED),
}


class UnknownNameError(ValueError):
    """An error for a name that is not registered.

    Args:
        kind: Kind of thing, as in "criterion".
        name: The name that was given.
        known: The known names.
        remedy: A sentence that says what to do if none of the known names is meant.
    """

    def __init__(self, kind: str, name: object, known: Sequence[str], remedy: str = "") -> None:
        hint = hints.question(name, known) if isinstance(name, str) else ""
        self.without_remedy = f"Unknown {kind} {name!r}.{hint} Known are: {', '.join(known)}."
        super().__init__(f"{self.without_remedy} {remedy}".rstrip())


def check(options: Any) -> None:
    """Raises an error for a name in the options of a command that cannot exist.

    Names of criteria and treatments are left for later if any option names a module, because the
    module may register them.

    Args:
        options: The parsed options of a command.

    Raises:
        ValueError: If a name does not exist. The message is that of the command itself.
    """
    given = {name: value for name, value in vars(options).items() if value is not None}
    if "data" in given:
        check_data(given["data"])
    if "network" in given:
        check_network(given["network"])
    if "model" in given and hasattr(options, "max_drop"):  # Of `prune`; others take more models.
        check_model(given["model"])
    values = {name: _listed(value) for name, value in given.items()}
    if any(":" in value for listed in values.values() for value in listed):
        return
    for field, (kind, known) in _REGISTERED.items():
        for name in values.get(field, ()):
            if name not in known:
                raise named_by(field, UnknownNameError(kind, name, known))


def check_data(name: str) -> None:
    """Raises an error if a name is neither that of a data set nor a location."""
    if ":" in name or name in names.DATASETS:
        return
    path = Path(name)
    if path.suffix != ".py" and (path.exists() or path.suffix in names.DATA_FILES):
        raise _error_of_data(path)
    hint = f" Name its function, too: {name}:FUNCTION." if name.endswith(".py") else ""
    raise UnknownNameError(
        "data set",
        name,
        names.DATASETS,
        "Or name a function that loads custom data: module:function or "
        f"path/to/file.py:function.{hint}",
    )


def _error_of_data(path: Path) -> ValueError:
    """Returns an error for data in a file or folder."""
    what = "folder" if path.is_dir() else "file"
    name, hint = path.name.partition(".")[0], ""
    if name in names.DOWNLOADED:
        folder = path if path.is_dir() else path.parent
        hint = f" Of the published files, name the folder: --data {name} --data-dir {folder}."
    return ValueError(
        f"--data expects one of the data sets {', '.join(names.DATASETS)}, or a function that "
        "loads your files and returns (x, y): write it as `def load():` into a file own.py, and "
        f"give --data own.py:load. Received: the {what} '{path}'.{hint}"
    )


def check_network(name: str) -> None:
    """Raises an error if a name is neither that of a network, nor a location, nor a model file."""
    if ":" in name or name in names.NETWORKS or Path(name).suffix in names.MODEL_FILES:
        return
    if Path(name).suffix == names.TICKET_FILE:
        raise ValueError(
            f"--network: '{name}' is a ticket, which has its masks and weights already. An "
            "experiment draws new weights and finds masks: name the network of the ticket. "
            "The commands compare, inspect and export take tickets."
        )
    raise UnknownNameError(
        "network",
        name,
        names.NETWORKS,
        "For a network of your own, give module:function, path/to/file.py:function or a "
        f".keras file.{hints.inside_question(Path(name), names.MODEL_FILES)}",
    )


def check_model(name: str) -> None:
    """Raises an error if a model of `prune` is none of those that `check_network` takes."""
    path = Path(name)
    if ":" in name or name in names.NETWORKS or path.suffix in names.MODEL_FILES:
        return
    loss = " A ticket file contains no loss: name a function that loads and compiles the model."
    hint = (
        hints.inside_question(path, names.MODEL_FILES)
        or hints.file_question(path, names.MODEL_FILES)
        or hints.question(name, names.NETWORKS)
    )
    raise ValueError(
        "Expected as MODEL a .keras or .h5 file, module:function or file.py:function, or one "
        f"of {', '.join(names.NETWORKS)}. Received: {name!r}."
        f"{loss if path.suffix == names.TICKET_FILE else hint}"
    )


def named_by(field: str, error: UnknownNameError) -> ValueError:
    """Returns an error that names the option of a name, and what to give for a custom object."""
    return ValueError(
        f"{option(field)}: {error.without_remedy} Name a custom one by its location, "
        "module:name or path/to/file.py:name."
    )


def _listed(value: Any) -> tuple[str, ...]:
    """Returns the texts in the value of an option."""
    values = value if isinstance(value, tuple) else (value,)
    return tuple(one for one in values if isinstance(one, str))
