"""The supermask experiment: accuracy of masks over untrained weights."""

import collections
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from rich.console import Console

import masked_layers as ml
from _lottery_ticket import experiments as options
from _lottery_ticket import names
from lottery_ticket_pruner import divergence, training
from lottery_ticket_pruner.checks import share_meant
from lottery_ticket_pruner.experiments import datasets, devices, progress, results, saved_tickets
from lottery_ticket_pruner.experiments.config import (
    Experiment,
    RunConfig,
    chosen,
    training_plan,
)
from lottery_ticket_pruner.experiments.identifiers import identifier_of, resolved
from lottery_ticket_pruner.experiments.reports import figures, statistics, tables
from lottery_ticket_pruner.experiments.run_folder import RunFolder
from lottery_ticket_pruner.experiments.workbench import compiled_network, make_deterministic
from lottery_ticket_pruner.learned import LearningPlan, learn_by_plan
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.supermasks import evaluate_grid
from lottery_ticket_pruner.training import ArrayDataset, Listeners

_SPARSITIES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
_LEARNING_STEPS = 20_000
_LEARNING_BATCH = 250


@dataclasses.dataclass(frozen=True)
class SupermaskConfig(options.SupermaskOptions, Experiment):
    """Options of `lottery-ticket supermask`."""

    def resolve(self, training_images: int) -> "SupermaskConfig":
        """Returns the same configuration with all choices made.

        Raises:
            ValueError: If options contradict each other, a name is unknown, or a number is out of
                range.
        """
        own = {field.name for field in dataclasses.fields(self)}
        shared = own & {field.name for field in dataclasses.fields(RunConfig)}
        values = {name: getattr(self, name) for name in shared}
        if self.learn:
            # Files contain the default of --criteria here.
            given = self.learning_rate is not None or self.scope is not None
            if given or self.criteria != options.CRITERIA:
                raise ValueError(
                    "--criteria, --learning-rate and --scope have no effect with --learn."
                )
            if self.sparsities and self.learn == "bernoulli":
                raise ValueError("A bernoulli mask learns its sparsity: leave out --sparsities.")
            if self.batch_size is None:
                values["batch_size"] = _LEARNING_BATCH
            if self.epochs is None and self.steps is None:
                values["steps"] = _LEARNING_STEPS
        run = RunConfig(**values).resolve(training_images)
        sparsities = self.sparsities or ((0.5,) if self.learn else _SPARSITIES)
        if not all(0 <= sparsity < 1 for sparsity in sparsities):
            received = " ".join(map(str, sparsities))
            raise ValueError(
                f"--sparsities must be in [0, 1). Received: {received}."
                f"{share_meant(max(sparsities))}"
            )
        for name in ("criteria", "sparsities", "weights", "dwr"):
            chosen = getattr(self, name)
            if not chosen and name != "sparsities":
                raise ValueError(f"Give at least one value for --{name}.")
            if len(set(chosen)) < len(chosen):
                received = " ".join(map(str, chosen))
                raise ValueError(f"Give --{name} each value once. Received: {received}")
        self._check_criteria()
        if self.samples < 1:
            raise ValueError(f"--samples must be positive. Received: {self.samples}.")
        if not self.learn and self.samples != options.SAMPLES:
            raise ValueError("--samples has no effect without --learn.")
        taken = ["network", "steps", "epochs", "batch_size"]
        taken += [] if self.learn else ["learning_rate", "scope"]
        return dataclasses.replace(
            self,
            **{name: getattr(run, name) for name in taken},
            sparsities=() if self.learn == "bernoulli" else sparsities,
        )

    def _check_criteria(self) -> None:
        found = [(name, resolved("criteria", name)) for name in self.criteria]
        for name, criterion in found:
            needs = criterion.needs - {"initial", "final"}
            if needs or criterion.scope is not None:
                why = f"needs {', '.join(sorted(needs))}" if needs else "has a scope of its own"
                raise ValueError(
                    f"--criteria takes those that rank only recorded weights: "
                    f"{', '.join(names.RECORDED)}, or custom ones. {name} {why}."
                )
        called = [criterion.name for _, criterion in found]
        if len(set(called)) < len(called):
            raise ValueError(f"--criteria has two with one name. Received: {', '.join(called)}.")

    @property
    def subject(self) -> str:
        """Kind of the masks."""
        return f"{self.learn or 'untrained'}-masks"

    @property
    def work(self) -> int:
        """Number of training steps of a resolved configuration for each of its seeds."""
        return chosen(self.steps) * (len(_cells(self)) if self.learn else 1)

    def training_config(self) -> RunConfig:
        """Returns the configuration of a run with the same network and training."""
        names = ("data", "network", "steps", "batch_size", "learning_rate", "seeds")
        values = {name: getattr(self, name) for name in names}
        return RunConfig(**values).resolve(chosen(self.batch_size))


def run(config: SupermaskConfig, data: datasets.Dataset, console: Console | None = None) -> Path:
    """Runs a resolved experiment (see `workbench.load_and_resolve`) and returns its folder.

    The folder contains `config.json`, `results.csv` (a row per mask) and `curves-<number>.png`; for
    untrained masks also `heat-map.png`; for learned masks, binary masks over their weights,
    `supermask-<weights>-<dwr>-<replicate>.safetensors`, for `masked_layers.load_ticket`. Complete
    seeds of an interrupted run are kept. If the run is finished, its results are shown.

    If the training of a seed diverges, the other seeds go on.

    Warns:
        UserWarning: If masks are written as a `.keras` file (see `saved_tickets.save`).

    Raises:
        DivergenceError: If it happened, at the end. The run is then not finished.
        ValueError: If the folder holds another run (see `RunFolder`).
        FolderInUseError: If another process is writing in it.
        OSError: If it cannot be written, or is removed in the meantime.
    """
    console = console or progress.console(quiet=config.quiet)
    return RunFolder("supermask", config, data).carry_out(
        lambda folder: _carry_out(config, data, folder, console),
        lambda rows: _show(config, _table(config, rows), console),
        console,
    )


def _carry_out(
    config: SupermaskConfig, data: datasets.Dataset, folder: RunFolder, console: Console
) -> None:
    if config.deterministic:
        make_deterministic()
    found = results.read_parts(folder.path, results.RESULTS_FILE) if folder.is_interrupted else []
    rows = _whole(config, found)
    folder.begin(
        f"{config.data}, {config.network}, {config.learn or 'untrained'} masks; "
        f"{keras.backend.backend()}",
        keep=[results.RESULTS_FILE, "supermask-*"],
    )
    done = {row["replicate"] for row in rows}
    one_seed = _learned if config.learn else _untrained
    failures = divergence.SeedFailures()
    bar = progress.bar(console)
    with bar:
        task = bar.add_task("", total=config.work * (len(config.seeds) - len(done)))
        for replicate, seed in enumerate(config.seeds):
            if replicate not in done:
                bar.update(task, description=f"seed {seed}")
                advance = lambda steps: bar.advance(task, steps)  # noqa: E731
                with failures.seed(seed):
                    found = one_seed(config, data, seed, replicate, advance, folder.path)
                    names = results.identity(config, seed)
                    rows += [{"replicate": replicate, **row, **names} for row in found]
                    folder.check()
                    results.write_parts(folder.path, {results.RESULTS_FILE: rows})
    failures.check()
    table = _table(config, rows)
    shown = table.drop(columns=["dense_accuracy"], errors="ignore")
    if not config.learn:
        results.write_figure(folder.path / "heat-map.png", figures.heat_map(shown))
    for number, (title, lines, label) in enumerate(figures.charts(shown), 1):
        figure = figures.line_figure(lines, x_label=label)
        figure.suptitle(figures.titled(title, lines), fontsize=10)
        results.write_figure(folder.path / f"curves-{number}.png", figure)


def _whole(config: SupermaskConfig, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows of the seeds whose rows are complete."""
    wanted = results.rows_per_seed(config.to_dict() | {"command": "supermask"})
    found = collections.Counter(row["replicate"] for row in rows)
    return [row for row in rows if found[row["replicate"]] == wanted]


def _table(config: SupermaskConfig, rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).drop(columns=results.identity(config, 0), errors="ignore")
    table["seed"] = [config.seeds[replicate] for replicate in table["replicate"]]
    return table


def _show(config: SupermaskConfig, table: pd.DataFrame, console: Console) -> None:
    if not config.learn:
        dense = statistics.accuracy_text(table.groupby("replicate")["dense_accuracy"].first())
        console.print(f"trained, all weights: {dense} %", highlight=False)
    shown = table.drop(columns=["dense_accuracy"], errors="ignore")
    console.print(tables.best_sheet(shown).table())


def _untrained(
    config: SupermaskConfig,
    data: datasets.Dataset,
    seed: int,
    replicate: int,
    advance: Callable[[int], None],
    folder: Path,
) -> list[dict[str, Any]]:
    with devices.scope(config.devices):
        model = ml.convert_to_masked(compiled_network(config.training_config(), data, seed))
    pruner = LotteryTicketPruner(model)
    plan = training_plan(config, seed)
    training.train_by_plan(
        model,
        ArrayDataset.of(data.x_train, data.y_train, None, plan.augment),
        plan,
        listeners=Listeners(on_progress=advance),
    )
    divergence.check_weights(model, f"after {plan.steps} steps")
    pruner.set_pretrained_weights()
    dense = training.evaluate(model, data.x_test, data.y_test)
    divergence.check_loss(model, dense["loss"], f"after {plan.steps} steps")
    grid = evaluate_grid(
        pruner,
        data.x_test,
        data.y_test,
        criteria=[identifier_of("criteria", name) for name in config.criteria],
        sparsities=config.sparsities,
        weights=config.weights,
        dwr=config.dwr,
        scope=config.scope,
        seed=seed,
    )
    return [
        {
            **{key: row[key] for key in ("criterion", "sparsity", "weights", "dwr")},
            "test_accuracy": row["accuracy"],
            "test_loss": row["loss"],
            "dense_accuracy": dense["accuracy"],
        }
        for row in grid
    ]


def _cells(config: SupermaskConfig) -> list[tuple[str, bool, float | None]]:
    return list(itertools.product(config.weights, config.dwr, config.sparsities or (None,)))


def _learned(
    config: SupermaskConfig,
    data: datasets.Dataset,
    seed: int,
    replicate: int,
    advance: Callable[[int], None],
    folder: Path,
) -> list[dict[str, Any]]:
    rows = []
    for weights, dwr, sparsity in _cells(config):
        mask = (
            ml.BernoulliMask(rescale=dwr, seed=seed)
            if sparsity is None
            else ml.EdgePopupMask(sparsity=sparsity, rescale=dwr, seed=seed)
        )
        plan = training_plan(config, seed)
        with devices.scope(config.devices):
            found = learn_by_plan(
                compiled_network(config.training_config(), data, seed),
                data.x_train,
                data.y_train,
                LearningPlan(training=plan, mask=mask, weights=weights, samples=config.samples),
                test_data=(data.x_test, data.y_test),
                listeners=Listeners(on_progress=advance),
            )
        # Not the supermask: a score that is NaN is a pruned weight there.
        divergence.check_weights(found.model, f"with {weights} weights, after {plan.steps} steps")
        scaled = "rescaled" if dwr else "plain"
        asked = "" if sparsity is None else f"-{sparsity:g}"
        name = f"supermask-{weights}-{scaled}{asked}-{replicate}"
        saved_tickets.save(found.supermask, folder, name)
        rows.append(
            {
                "weights": weights,
                "dwr": dwr,
                # That of the sampled masks, like the test accuracy.
                "sparsity": float(np.mean(found.samples["sparsity"])),
                "test_accuracy": float(np.mean(found.samples["accuracy"])),
                "test_loss": float(np.mean(found.samples["loss"])),
                "accuracy_of_samples_deviation": float(np.std(found.samples["accuracy"])),
                "deterministic_accuracy": found.deterministic["accuracy"],
                "deterministic_sparsity": ml.sparsity_report(found.supermask).sparsity,
                "seconds": found.history.seconds,
            }
        )
    return rows
