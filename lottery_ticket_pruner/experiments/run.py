"""Runs one configuration for all seeds, and writes a run folder."""

import contextlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner.divergence import SeedFailures
from lottery_ticket_pruner.experiments import datasets, devices, progress, results, saved_tickets
from lottery_ticket_pruner.experiments.config import RunConfig, chosen, parse_steps
from lottery_ticket_pruner.experiments.reports import figures, statistics, tables
from lottery_ticket_pruner.experiments.run_folder import RunFolder
from lottery_ticket_pruner.experiments.tensorboard import ArmFolders
from lottery_ticket_pruner.experiments.workbench import compiled_network, make_deterministic
from lottery_ticket_pruner.experiments.written import SEEDS_FOLDER
from lottery_ticket_pruner.loggers import RunLogger, SearchLog, opened
from lottery_ticket_pruner.search_plans import Listeners
from lottery_ticket_pruner.tickets import SearchData, search
from masked_layers.serving import export_sparse_saved_model


def run(config: RunConfig, data: datasets.Dataset, console: Console | None = None) -> Path:
    """Runs a resolved experiment (see `workbench.load_and_resolve`) and returns its folder.

    The folder contains `config.json` (all options), `results.csv` (a row per round, arm and
    replicate, written as they are known), `accuracy.png`, `ticket.safetensors` (the last ticket of
    the first seed, for `masked_layers.load_ticket`; `ticket-1.safetensors` and so on for the
    others), this ticket as a sparse SavedModel in `served/1` if the backend can write one,
    `rounds/<replicate>` with the masks of every round (for `masked_layers.load_masks`) and the
    initial weights of the seed, and TensorBoard's `logs` of the rows and of all evaluations on the
    validation data, unless `log` names another tool. An interrupted run is resumed after its last
    complete round. If the run is finished, its results are shown.

    If the training of a seed diverges, the other seeds go on.

    Warns:
        UserWarning: If a ticket is written as a `.keras` file (see `saved_tickets.save`).

    Raises:
        DivergenceError: If it happened, at the end. The run is then not finished.
        ValueError: If the folder holds another run (see `RunFolder`).
        FolderInUseError: If another process is writing in it.
        OSError: If it cannot be written, or is removed in the meantime.
    """
    console = console or progress.console(quiet=config.quiet)
    return RunFolder("run", config, data).carry_out(
        lambda folder: _carry_out(config, data, folder, console),
        lambda rows: console.print(tables.summary_table(rows)),
        console,
    )


def _carry_out(
    config: RunConfig, data: datasets.Dataset, folder: RunFolder, console: Console
) -> None:
    if (folder.path / SEEDS_FOLDER).is_dir():
        raise ValueError(
            f"The interrupted run in '{folder.path}' was begun with --executor. Resume it with "
            "this option, or choose another folder with --out."
        )
    if config.deterministic:
        make_deterministic()
    with devices.scope(config.devices):
        model = ml.convert_to_masked(compiled_network(config, data, config.seeds[0]))
    if _prunes_nothing(config):
        warnings.warn(
            "With these rates nothing is pruned, so that every round trains the dense network.",
            stacklevel=2,
        )
    folder.begin(
        f"{config.data}: {len(data.x_train):,} training, {len(data.x_validation):,} validation, "
        f"{len(data.x_test):,} test examples\n"
        f"{config.network}: {ml.sparsity_report(model).size:,} weights; {keras.backend.backend()}\n"
        f"{_runs(config):,} runs per seed; {config.steps:,} steps of {config.batch_size:,} "
        "examples per run",
        keep=["rounds/*/*"],
    )
    rows: list[dict[str, Any]] = []
    failures = SeedFailures()
    said = ""
    with (
        contextlib.closing(writer(config, folder)) as written,
        _Progress(config, console) as display,
    ):

        def record(row: dict[str, Any]) -> None:
            folder.check()
            rows.append(row)
            written.write(row | results.identity(config, config.seeds[row["replicate"]]))

        for replicate, seed in enumerate(config.seeds):
            if replicate:
                model.set_weights(compiled_network(config, data, seed).get_weights())
            with failures.seed(seed):
                said += _carry_out_seed(config, data, folder, model, replicate, record, display)
    if said:  # Below the table that grew.
        progress.say(console, said)
    failures.check()
    draw(config, rows, folder)


def draw(config: RunConfig, rows: list[dict[str, Any]], folder: RunFolder) -> None:
    """Writes the figure of a run with all its rows."""
    names = (config.data, config.network, config.strategy, config.structure)
    figure = figures.accuracy_figure(rows, ", ".join(filter(None, names)))
    results.write_figure(folder.path / "accuracy.png", figure)


def _carry_out_seed(
    config: RunConfig,
    data: datasets.Dataset,
    folder: RunFolder,
    model: keras.Model,
    replicate: int,
    record: Callable[[dict[str, Any]], None],
    display: "_Progress",
) -> str:
    """Executes the search of a seed, and writes its ticket. Returns what to say of its export."""
    folder.keep_initial_weights(replicate, model)
    with _logger(config, folder, replicate, model) as logger:
        log = SearchLog(logger)

        def on_result(row: dict[str, Any]) -> None:
            record(row)
            log.on_result(row)
            if row["arm"] in ("dense", "ticket"):
                log.on_masks(model, row["round"])
            display.show(row)

        def on_evaluation(evaluation: dict[str, Any]) -> None:
            folder.check()  # Otherwise the log would create a removed folder again.
            log.on_evaluation(evaluation)

        found = search(
            model,
            SearchData(
                (data.x_train, data.y_train),
                (data.x_validation, data.y_validation),
                (data.x_test, data.y_test),
            ),
            config.search_plan(replicate),
            Listeners(
                on_result=on_result,
                on_evaluation=on_evaluation,
                on_progress=display.advance,
            ),
            folder.path / "rounds" / str(replicate),
            keep_rounds=False,
        )
    suffix = f"-{replicate}" if replicate else ""
    saved_tickets.save(found.ticket, folder.path, f"ticket{suffix}")
    if suffix or _is_dropped(folder.final, config.seeds[0]):
        return ""
    return _export(found.ticket, folder)


def _prunes_nothing(config: RunConfig) -> bool:
    """Returns True if all rates of a resolved configuration are 0."""
    given = config.rate if isinstance(config.rate, tuple) else (config.rate,)
    rates = [*given, config.conv_rate, config.output_rate, config.final_sparsity]
    shares = [float(str(rate).rpartition("=")[2]) for rate in rates if rate is not None]
    return bool(shares) and not any(shares)


def writer(config: RunConfig, folder: RunFolder) -> results.CsvWriter:
    """Returns what writes the table of a run, which is begun."""
    more = (results.CHANNELS,) if config.counts_channels else ()
    columns = (*results.COLUMNS, *more, *results.identity(config, 0))
    return results.CsvWriter(folder.path / "results.csv", columns)


def _runs(config: RunConfig) -> int:
    """Returns how often each seed trains: dense, and the ticket and its controls per round."""
    return chosen(results.rows_per_seed(config.to_dict() | {"command": "run"}))


def _is_dropped(folder: Path, seed: int) -> bool:
    """Returns whether a run is that of a seed of which the run of all seeds has no SavedModel."""
    if folder.parent.parent.name != SEEDS_FOLDER:
        return False
    whole = results.read_json(folder.parent.parent.parent / results.CONFIG_FILE) or {}
    return seed != whole.get("seeds", [seed])[0]


def _export(ticket: keras.Model, folder: RunFolder) -> str:
    """Exports the ticket for TensorFlow Serving, with a folder per version, and says so."""
    place = Path("served", "1")
    try:
        stored = export_sparse_saved_model(ticket, folder.path / place)
    except (ArithmeticError, ImportError, OSError, RuntimeError, ValueError) as error:
        return f"No SavedModel: {error}"  # Results do not depend on the export.
    return f"First ticket for serving: {folder.final / place}, {stored.disk_nbytes:,} bytes"


def _logger(config: RunConfig, folder: RunFolder, replicate: int, model: keras.Model) -> RunLogger:
    """Opens the log of a seed in the tool of --log."""
    seed = config.seeds[replicate]
    params = config.to_dict() | {"seed": seed}
    if config.log == "tensorboard":
        logger = ArmFolders(folder.path / "logs", replicate, model)
        logger.params(params)
        return logger
    return opened(config.log, f"{folder.final.name}, seed {seed}", params)


class _Progress:
    """A progress bar for all steps of a run, and a growing table of the rounds above it."""

    def __init__(self, config: RunConfig, console: Console) -> None:
        self._config = config
        self._console = console
        self._arms = ("ticket", *config.controls)
        self._round: dict[str, dict[str, Any]] = {}
        self._bar = progress.bar(console)
        steps = chosen(config.steps)
        rest = steps - parse_steps(config.rewind_to, 1)
        total = len(config.seeds) * (steps + (_runs(config) - 1) * rest)
        self._task = self._bar.add_task("dense", total=total)
        arms = [statistics.arm_label(arm) for arm in self._arms]
        headings = ["seed", "round", "weights left", *arms, "early stop"]
        if config.counts_channels:  # Within 80 columns, with two controls.
            headings = ["seed", "round", "weights", "channels", *arms, "early stop"]
        self._widths = [max(len(heading), 5) for heading in headings]
        self._line(*headings)

    def __enter__(self) -> "_Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, steps: int) -> None:
        self._bar.advance(self._task, steps)

    def show(self, row: dict[str, Any]) -> None:
        self._round[row["arm"]] = row
        if row["arm"] not in ("dense", "ticket"):
            return
        shown = [self._round.get(arm) for arm in self._arms] if row["round"] else [row]
        seed = self._config.seeds[row["replicate"]]
        self._line(
            str(seed),
            str(row["round"]) if row["round"] else "dense",
            f"{1 - row['sparsity']:.2%}",
            *([f"{row['channels']:.2%}"] if "channels" in row else []),
            *(f"{100 * one['test_accuracy']:.2f}" if one else "" for one in shown),
            *[""] * (len(self._arms) - len(shown)),
            f"step {row['early_stop_step']}",
        )
        self._round = {}
        following, rounds = f"seed {seed}", chosen(self._config.rounds)
        if row["round"] < rounds:
            following += f", round {row['round'] + 1} of {rounds}"
        self._bar.update(self._task, description=following)

    def _line(self, *texts: str) -> None:
        cells = [text.rjust(width) for text, width in zip(texts, self._widths, strict=True)]
        self._console.print("  ".join(cells), highlight=False)
