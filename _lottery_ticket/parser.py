"""Reads a command line, and answers `--help` and `--version`, without importing what takes time."""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import platform
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from _lottery_ticket import hints, refusals, wording
from _lottery_ticket.refusals import MissingExtraError, UsageError

_EXTRA = ("jinja2", "matplotlib", "pandas", "rich", "scipy", "sklearn", "tensorboard", "tyro")
_SHELLS = ("bash", "zsh")
# Commands of which the first argument may be repeated, but not left out.
_LISTS = {"compare": "models", "report": "folders"}
_WIDTH = 80
# Command lines of each command, without its name.
EXAMPLES = {
    "prune": [
        "--max-drop 0.02 --minutes 5",
        "model.keras --data own.py:load --sparsity 0.9",
        "lenet-300-100 --data mnist --macs 0.5",
    ],
    "compare": ["model.keras runs/pruned --data digits", "served/1 served/2 --data own.py:load"],
    "run": [
        "--rounds 5 --seeds 0",
        "--network own.py:model --data own.py:load --strategy snip",
    ],
    "supermask": ["--criteria large_final random", "--learn edge_popup --sparsities 0.5"],
    "instability": ["--network conv-2 --rewind-to 0 500it", "--masks runs/conv"],
    "repeat": ["runs/conv --out runs/conv-again"],
    "sweep": [
        "--over rate=0.2,0.4 --over strategy=large_final,random",
        "--over rate=0.1,0.2,0.4 --search optuna --trials 20",
    ],
    "sweep-supermask": ["--over learn=bernoulli,edge_popup --seeds 0 1"],
    "report": ["runs/conv runs/lenet", "runs --out comparison"],
    "export": ["model.keras served/1 --values int8", "model.keras model.onnx --format onnx"],
    "inspect": ["model.keras", "served/1 --json"],
}
_ABOUT = "Lottery tickets in Keras 3: the papers' experiments as commands, and serving."
STATUS = """\
exit status:
  0    all is done
  1    a part is not: a run of a sweep failed, a repetition differs, or nobody
       reads the output any more
  2    an option, a file or the data cannot be used, or a package is missing;
       one line says which and why
  130  interrupted; if something can be resumed, a line says by which command"""


def commands() -> dict[str, type[Any]]:
    """Returns each command with the class of its options."""
    from _lottery_ticket import commands, experiments

    return {
        "prune": commands.PruneOptions,
        "compare": commands.CompareConfig,
        "run": experiments.RunOptions,
        "supermask": experiments.SupermaskOptions,
        "instability": experiments.InstabilityOptions,
        "repeat": commands.RepeatOptions,
        "sweep": experiments.SweepOptions,
        "sweep-supermask": experiments.SupermaskSweepOptions,
        "report": commands.ReportConfig,
        "export": commands.ExportOptions,
        "inspect": commands.InspectOptions,
    }


def parse(arguments: Sequence[str]) -> Any:
    """Returns the options of a command, an instance of the class in `commands()`.

    Raises:
        MissingExtraError: If packages of the command line are not installed.
        SystemExit: If the arguments ask for help, the version or shell completion.
        UsageError: If they cannot be read. The message is one line.
    """
    first = arguments[0] if arguments else ""
    if first == "--version":
        _end(version())
    _check_extra()
    known = commands()
    if first in ("-h", "--help"):
        _end(overview())
    if first == "--print-completion":
        _print_completion(arguments[1:])
    if not first:
        raise UsageError(f"Name a command: {', '.join(known)}. See lottery-ticket --help.")
    if first not in known:
        kind = "option" if first.startswith("-") else "command"
        options = ["--help", "--version", "--print-completion"]
        hint = hints.question(first, [*known, *options])
        there = f" Options: {', '.join(options)}." if kind == "option" else ""
        raise UsageError(f"Unknown {kind} {first!r}.{hint}{there} Commands: {', '.join(known)}.")
    return _options(known[first], first, arguments[1:])


def refuse(error: Exception) -> int:
    """Prints why a command line was refused, and returns the exit status."""
    print(f"lottery-ticket: {wording.sentence(str(error))}", file=sys.stderr)
    return 2


def overview() -> str:
    """Returns the help of `lottery-ticket` itself."""
    rows = {name: _first_line(kind) for name, kind in commands().items()}
    indent = 4 + max(map(len, rows))
    lines = [
        "usage: lottery-ticket COMMAND [OPTIONS]\n",
        f"{_ABOUT}\n",
        "commands:",
        *(_row(name, text, indent) for name, text in rows.items()),
        "\noptions:",
        _row("-h, --help", "Show this help. lottery-ticket COMMAND --help explains a command.", 22),
        _row("--version", "Show the versions of this package, Python and the backends.", 22),
        _row("--print-completion", f"Print the completion for {' or '.join(_SHELLS)}.", 22),
        f"\n{STATUS}",
    ]
    return "\n".join(lines)


def version() -> str:
    """Returns the version, and those of the packages that a report of a fault should name."""
    packages = ("keras", "tensorflow", "jax", "torch")
    others = [f"{name} {there}" for name in packages if (there := _version_of(name))]
    text = ", ".join([f"Python {platform.python_version()}", *others])
    return f"lottery-ticket-pruner {_version_of('lottery-ticket-pruner')}\n{_filled(text)}"


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_extra() -> None:
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"The packages {', '.join(missing)} are missing. Install the "
            'requirements of the command line: pip install "lottery-ticket-pruner[cli]"'
        )


def _options(kind: type[Any], command: str, arguments: Sequence[str]) -> Any:
    import tyro

    refusals.check_names(kind, command, arguments)
    printed, refused = io.StringIO(), io.StringIO()
    try:
        # Its help and errors are captured, to be wrapped and put into one line.
        with (
            _page(),
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(refused),
        ):
            options = tyro.cli(kind, args=list(arguments), prog=f"lottery-ticket {command}")
    except SystemExit as end:
        if not end.code:
            _end(f"{_wrapped(printed.getvalue())}\n\n{_examples(command)}\n\n{STATUS}")
        reason = refusals.reason(kind, arguments, refused.getvalue() + printed.getvalue())
        raise UsageError(f"{reason} See lottery-ticket {command} --help.") from None
    if not getattr(options, _LISTS.get(command, ""), True):
        raise UsageError(f"Name at least one {_LISTS[command].rstrip('s')} to {command}.")
    return options


def _print_completion(arguments: Sequence[str]) -> NoReturn:
    import tyro

    shell = arguments[0] if arguments else ""
    if shell not in _SHELLS:
        raise UsageError(f"--print-completion takes {' or '.join(_SHELLS)}.")
    tyro.extras.subcommand_cli_from_dict(
        commands(), prog="lottery-ticket", args=["--tyro-print-completion", shell]
    )
    raise AssertionError("tyro prints the completion and ends")


def _first_line(kind: type[Any]) -> str:
    return (kind.__doc__ or "").partition("\n")[0]


def _examples(command: str) -> str:
    lines = [f"  lottery-ticket {command} {line}" for line in EXAMPLES[command]]
    return "\n".join(["examples:", *lines])


def _filled(text: str) -> str:
    return textwrap.fill(text, _WIDTH, break_on_hyphens=False)


def _row(name: str, text: str, indent: int) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=f"  {name}".ljust(indent),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
    )


@contextlib.contextmanager
def _page() -> Iterator[None]:
    """Makes tyro's help as wide on every terminal. On wide ones it would have several columns."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(_WIDTH)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _wrapped(text: str) -> str:
    """Returns a help text within the page, without the frame of its table."""
    usage, _, text = text.strip().partition("\n\n")
    lines = [line.rstrip("│ ").lstrip("│╭─").rstrip("─╮ ") for line in text.splitlines()]
    lines = [line for line in lines if not line or set(line) - set(" -─╭╮╰╯")]
    wrapped = "\n".join(
        f"{line.strip()}:"
        if line.startswith((" options", " positional"))
        else _filled(line)
        if len(line) > _WIDTH
        else line
        for line in lines
    )
    wrapped = wrapped.replace("show this help message and exit", "Show this help.")
    # A help that ends at the edge of the page is followed by an empty line.
    wrapped = re.sub(r"\n\n(?=  -)", "\n", wrapped)
    return f"{_usage(usage)}\n\n{wrapped}"


def _usage(text: str) -> str:
    """Returns a usage on one line, with one word for all options, as where there are many."""
    whole = " ".join(text.split())
    short = re.sub(r" \[--[^\]]*\]", "", whole)
    return short if short == whole else short.replace("[-h]", "[-h] [OPTIONS]")


def _end(text: str) -> NoReturn:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()  # Here, where a closed pipe is noticed.
    raise SystemExit(0)
