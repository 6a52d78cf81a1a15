"""The command `lottery-ticket`."""

import contextlib
import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from _lottery_ticket import parser, refusals, wording
from lottery_ticket_pruner.checks import reason_in
from lottery_ticket_pruner.experiments.parent import end_with_parent

if TYPE_CHECKING:
    from _lottery_ticket import commands as options_of


def main(arguments: Sequence[str] | None = None, options: Any = None) -> int:
    """Runs the command and returns its exit status; see `lottery-ticket --help`.

    Args:
        arguments: Command-line arguments. None for those of the process.
        options: The same, if they were parsed.
    """
    given = sys.argv[1:] if arguments is None else arguments
    end_with_parent()
    try:
        options = parser.parse(given) if options is None else options
        with _warnings_of(type(options)):
            return _run(options)
    except (refusals.MissingExtraError, refusals.UsageError) as error:
        return parser.refuse(error)
    except KeyboardInterrupt as error:
        words = ["Interrupted.", *getattr(error, "__notes__", ())]
        if len(words) > 1:
            words.append(f"To resume, repeat: {shlex.join(['lottery-ticket', *given])}")
        print(" ".join(words), file=sys.stderr)
        return 130


@contextlib.contextmanager
def _warnings_of(kind: type[Any]) -> Iterator[None]:
    """Formats warnings for users of a command, without the line of code that they come from."""

    def formatted(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        line: str | None = None,
    ) -> str:
        named = "" if category is UserWarning else f"{category.__name__}: "
        text = wording.sentence(wording.of_options(str(message), kind))
        return f"lottery-ticket: warning: {named}{text}\n"

    before = warnings.formatwarning
    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


def _print_error(error: Exception, kind: type[Any]) -> int:
    """Prints an error of a command with a class of options, and returns the exit status."""
    text = reason_in(str(error)) or type(error).__name__
    if isinstance(error, OSError) and error.strerror:  # From the system: "[Errno 13] ...".
        where = "" if error.filename is None else f"'{error.filename}': "
        text = f"{where}{error.strerror}"
    if "\n" not in text:  # Otherwise, with lines of the user's code.
        text = wording.of_options(text, kind)
    print(f"lottery-ticket: {wording.sentence(text)}", file=sys.stderr)
    return 2


def _run(options: Any) -> int:
    from lottery_ticket_pruner.divergence import DivergenceError

    command = next(name for name, kind in parser.commands().items() if type(options) is kind)
    try:
        return _HANDLERS.get(command, _experiment)(command, options)
    except BrokenPipeError:
        raise  # Of the output, not of the command.
    except (DivergenceError, refusals.MissingExtraError, OSError, ValueError) as error:
        return _print_error(error, type(options))


def _experiment(command: str, options: Any) -> int:
    from lottery_ticket_pruner.experiments import catalogue

    kind = catalogue.KINDS[command]
    return _work_on(kind, kind.config(**vars(options)))


def _run_seeds(command: str, options: Any) -> int:
    if options.executor is None:
        for name in ("jobs", "address", "executor_option"):
            if getattr(options, name):
                raise ValueError(f"{refusals.option(name)} needs --executor.")
        return _experiment(command, options)
    from lottery_ticket_pruner.commands import seed_jobs
    from lottery_ticket_pruner.experiments import identifiers, own
    from lottery_ticket_pruner.experiments.config import RunConfig

    config = RunConfig(**vars(options))
    with own.named_errors_of(identifiers.locations(config.to_dict())):
        return _print_failures(seed_jobs.run(config))


def _work_on(kind: Any, config: Any) -> int:
    from lottery_ticket_pruner.experiments import devices, identifiers, own
    from lottery_ticket_pruner.experiments.workbench import load_and_resolve

    with own.named_errors_of(identifiers.locations(config.to_dict())):
        resolved, data = load_and_resolve(config)
        devices.check(resolved.devices, resolved.batch_size)
        kind.run(resolved, data)
    return 0


def _prune(_: str, options: "options_of.PruneOptions") -> int:
    from lottery_ticket_pruner.commands import prune

    prune.prune(prune.PruneConfig(**vars(options)))
    return 0


def _compare(_: str, options: "options_of.CompareConfig") -> int:
    from lottery_ticket_pruner.commands import compare

    if not options.json:
        compare.compare(options)
        return 0
    from rich.console import Console

    with contextlib.redirect_stdout(sys.stderr):
        found = compare.compare(options, Console(quiet=True))
    print(_document(found))
    return 0


def _repeat(_: str, options: "options_of.RepeatOptions") -> int:
    from lottery_ticket_pruner.commands.repeat import RepeatConfig
    from lottery_ticket_pruner.experiments import catalogue
    from lottery_ticket_pruner.experiments.results import is_pruned

    config = RepeatConfig(**vars(options))
    if is_pruned(folder := config.place):
        from lottery_ticket_pruner.commands import prune_again

        again = prune_again.configuration(
            folder, config.out, overwrite=config.overwrite, quiet=config.quiet
        )
        return 0 if prune_again.repeat(folder, again) else 1
    experiment = config.configuration()
    kind = next(kind for kind in catalogue.KINDS.values() if isinstance(experiment, kind.config))
    return _work_on(kind, experiment)


def _report(_: str, options: "options_of.ReportConfig") -> int:
    from lottery_ticket_pruner.commands import report

    report.write_report(options)
    return 0


def _sweep(command: str, options: Any) -> int:
    from lottery_ticket_pruner.commands import sweep

    kind = sweep.SweepConfig if command == "sweep" else sweep.SupermaskSweepConfig
    return _print_failures(sweep.sweep(kind(**vars(options))))


def _print_failures(failures: Sequence[Any]) -> int:
    for failure in failures:
        print(
            f"failed: {failure.child.label}: {failure.message} (see {failure.log})", file=sys.stderr
        )
    return 1 if failures else 0


def _export(_: str, options: "options_of.ExportOptions") -> int:
    from lottery_ticket_pruner.commands.saved_models import ExportConfig

    return _print_report(ExportConfig(**vars(options)))


def _inspect(_: str, options: "options_of.InspectOptions") -> int:
    from lottery_ticket_pruner.commands.saved_models import InspectConfig

    return _print_report(InspectConfig(**vars(options)))


def _print_report(config: Any) -> int:
    try:
        with contextlib.redirect_stdout(sys.stderr) if config.json else contextlib.nullcontext():
            report = config.execute()
        print(_document(report) if config.json else report)
    except BrokenPipeError:
        raise
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return _print_error(error, type(config))
    return 0


def _document(report: Any) -> str:
    """Returns the JSON of a report, in which numbers that are not finite are null."""
    values = json.loads(report.to_json(), parse_constant=lambda _: None)
    return json.dumps(values, indent=2, allow_nan=False)


# The commands that are not experiments of the catalogue.
_HANDLERS: dict[str, Callable[[str, Any], int]] = {
    "run": _run_seeds,
    "prune": _prune,
    "compare": _compare,
    "repeat": _repeat,
    "sweep": _sweep,
    "sweep-supermask": _sweep,
    "report": _report,
    "export": _export,
    "inspect": _inspect,
}


if __name__ == "__main__":
    sys.exit(main())
