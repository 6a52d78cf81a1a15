"""The command `lottery-ticket`."""

import importlib.util
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lottery_ticket_pruner.experiments.parent import end_with_parent

if TYPE_CHECKING:
    from lottery_ticket_pruner.commands.compare import CompareConfig
    from lottery_ticket_pruner.commands.processes import Failure
    from lottery_ticket_pruner.commands.prune import PruneConfig
    from lottery_ticket_pruner.commands.repeat import RepeatConfig
    from lottery_ticket_pruner.commands.report import ReportConfig
    from lottery_ticket_pruner.commands.saved_models import ExportConfig, InspectConfig
    from lottery_ticket_pruner.experiments.catalogue import Kind

_EXTRA = ("jinja2", "matplotlib", "pandas", "rich", "scipy", "sklearn", "tensorboard", "tyro")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status; see `lottery-ticket --help`.

    Args:
        arguments: Command-line arguments. None for those of the process.
    """
    format_before = warnings.formatwarning
    warnings.formatwarning = _formatted
    try:
        return _main(arguments)
    except KeyboardInterrupt as error:
        words = ["Interrupted.", *getattr(error, "__notes__", ())]
        if len(words) > 1:
            given = sys.argv[1:] if arguments is None else arguments
            words.append(f"To resume, repeat: {shlex.join(['lottery-ticket', *given])}")
        print(" ".join(words), file=sys.stderr)
        return 130
    finally:
        warnings.formatwarning = format_before


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """Formats a warning for users of a command, without the line of code that it comes from."""
    kind = "" if category is UserWarning else f"{category.__name__}: "
    return f"lottery-ticket: warning: {kind}{message}\n"


def _print_error(error: Exception) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # From the system: "[Errno 13] ...".
        where = "" if error.filename is None else f"'{error.filename}': "
        text = f"{where}{error.strerror.rstrip('.')}."
    print(f"lottery-ticket: {text}", file=sys.stderr)
    return 2


def _main(arguments: Sequence[str] | None) -> int:
    end_with_parent()
    missing = [name for name in _EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        print(
            f"lottery-ticket needs {', '.join(missing)}, which is not installed. Install the "
            'requirements of the command line: pip install "lottery-ticket-pruner[cli]"',
            file=sys.stderr,
        )
        return 1
    import tyro

    from lottery_ticket_pruner.divergence import DivergenceError

    commands = _commands()
    config = tyro.extras.subcommand_cli_from_dict(
        {name: options for name, (options, _) in commands.items()},
        prog="lottery-ticket",
        description="Lottery tickets in Keras 3: the papers' experiments as commands, and serving.",
        args=arguments,
    )
    try:
        return dict(commands.values())[type(config)](config)
    except (DivergenceError, OSError, ValueError) as error:
        return _print_error(error)


def _commands() -> dict[str, tuple[type, Callable[[Any], int]]]:
    """Returns each command with its options and the function that executes it."""
    from lottery_ticket_pruner.commands.compare import CompareConfig
    from lottery_ticket_pruner.commands.prune import PruneConfig
    from lottery_ticket_pruner.commands.repeat import RepeatConfig
    from lottery_ticket_pruner.commands.report import ReportConfig
    from lottery_ticket_pruner.commands.saved_models import ExportConfig, InspectConfig
    from lottery_ticket_pruner.commands.sweep import SupermaskSweepConfig, SweepConfig
    from lottery_ticket_pruner.experiments import catalogue

    kinds = catalogue.KINDS.items()
    return {
        "prune": (PruneConfig, _prune),
        "compare": (CompareConfig, _compare),
        **{command: (kind.config, _work_on(kind)) for command, kind in kinds},
        "repeat": (RepeatConfig, _repeat),
        "sweep": (SweepConfig, _sweep),
        "sweep-supermask": (SupermaskSweepConfig, _sweep),
        "report": (ReportConfig, _report),
        "export": (ExportConfig, _print_report),
        "inspect": (InspectConfig, _print_report),
    }


def _work_on(kind: "Kind") -> Callable[[Any], int]:
    from lottery_ticket_pruner.experiments import identifiers, own
    from lottery_ticket_pruner.experiments.workbench import load_and_resolve

    def work(config: Any) -> int:
        with own.named_errors_of(identifiers.locations(config.to_dict())):
            kind.run(*load_and_resolve(config))
        return 0

    return work


def _prune(config: "PruneConfig") -> int:
    from lottery_ticket_pruner.commands import prune

    prune.prune(config)
    return 0


def _compare(config: "CompareConfig") -> int:
    from lottery_ticket_pruner.commands import compare

    compare.compare(config)
    return 0


def _repeat(config: "RepeatConfig") -> int:
    from lottery_ticket_pruner.experiments.results import is_pruned

    if is_pruned(folder := config.place):
        from lottery_ticket_pruner.commands import prune_again

        options = {"overwrite": config.overwrite, "quiet": config.quiet}
        again = prune_again.configuration(folder, config.out, **options)
        return 0 if prune_again.repeat(folder, again) else 1
    experiment = config.configuration()
    return dict(_commands().values())[type(experiment)](experiment)


def _report(config: "ReportConfig") -> int:
    from lottery_ticket_pruner.commands import report

    report.write_report(config)
    return 0


def _sweep(config: Any) -> int:
    from lottery_ticket_pruner.commands import sweep

    return _print_failures(sweep.sweep(config))


def _print_failures(failures: "Sequence[Failure]") -> int:
    for failure in failures:
        print(
            f"failed: {failure.child.label}: {failure.message} (see {failure.log})", file=sys.stderr
        )
    return 1 if failures else 0


def _print_report(config: "ExportConfig | InspectConfig") -> int:
    try:
        print(config.execute())
    except (ArithmeticError, ImportError, OSError, RuntimeError, TypeError, ValueError) as error:
        return _print_error(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
