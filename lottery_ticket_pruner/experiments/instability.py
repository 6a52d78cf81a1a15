"""The instability experiment: from which step on do two trainings stay linearly connected?"""

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pandas as pd
from rich.console import Console

import masked_layers as ml
from _lottery_ticket import experiments as options
from lottery_ticket_pruner import analyses, divergence, optimizers
from lottery_ticket_pruner.experiments import (
    catalogue,
    datasets,
    devices,
    networks,
    progress,
    results,
)
from lottery_ticket_pruner.experiments.config import (
    Experiment,
    RunConfig,
    chosen,
    parse_steps,
    training_plan,
)
from lottery_ticket_pruner.experiments.reports import figures, run_folders, tables
from lottery_ticket_pruner.experiments.run_folder import RunFolder
from lottery_ticket_pruner.experiments.workbench import compiled_network, make_deterministic
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.tickets import train_to_rewinding_point
from lottery_ticket_pruner.training import ArrayDataset, Listeners

_SHARES = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# Options that must be the same as in the run whose masks are used.
_COMMON = ("data", "network", "batch_size", "optimizer", "learning_rate")
# Options with which its ticket consists of the rewound weights under these masks.
_TICKET = {"retraining": "weight_rewinding", "kept": "rewind", "pruned": "zero"}
# Other entries of its configuration that are used.
_OF_RUN = {"steps": int, "rounds": int, "rewind_to": str, "seeds": list}
_PICTURE = "instability.png"


@dataclasses.dataclass(frozen=True)
class InstabilityConfig(options.InstabilityOptions, Experiment):
    """Options of `lottery-ticket instability`."""

    def resolve(self, training_images: int) -> "InstabilityConfig":
        """Returns the same configuration with all choices made.

        Raises:
            ValueError: If options contradict each other, a name is unknown, a number is out of
                range, or the masks belong to another kind of run.
        """
        names = ("data", "network", "steps", "epochs", "batch_size", "optimizer", "learning_rate")
        values = {name: getattr(self, name) for name in names}
        stored = {} if self.masks is None else _config_of_run(self.masks)
        if stored and self.steps is None and self.epochs is None:
            values["steps"] = stored["steps"]
        run = RunConfig(**values, seeds=self.seeds).resolve(training_images)
        if self.points < 2:
            raise ValueError(f"--points must be at least 2. Received: {self.points}.")
        if self.round is not None and self.masks is None:
            raise ValueError("--round selects from the masks of --masks: pass that option as well.")
        for name in _COMMON if stored else ():
            if stored.get(name) != getattr(run, name):
                raise ValueError(
                    f"'{self.masks}' has {name} {stored.get(name)!r}, not {getattr(run, name)!r}: "
                    "its masks do not apply to this training. Use the same options."
                )
        for name, wanted in _TICKET.items():
            if stored.get(name, wanted) != wanted:
                raise ValueError(
                    f"'{self.masks}' has {name} {stored[name]!r}, not {wanted!r}: its ticket does "
                    "not consist of the weights of the rewinding point under masks."
                )
        steps = chosen(run.steps)
        default = [f"{round(share * steps)}it" for share in _SHARES]
        points = self.rewind_to or ([stored["rewind_to"]] if stored else default)
        steps_per_epoch = -(-training_images // chosen(run.batch_size))
        found = sorted({parse_steps(text, steps_per_epoch) for text in points})
        if found[-1] >= steps:
            raise ValueError(f"--rewind-to {found[-1]} is not before the end, step {steps}.")
        resolved = dataclasses.replace(
            self,
            **{name: getattr(run, name) for name in names},
            round=stored.get("rounds") if self.round is None else self.round,
            rewind_to=tuple(f"{step}it" for step in found),
        )
        for seed in self.seeds if stored else ():
            if seed not in stored["seeds"] or not resolved.masks_file(seed, stored).is_file():
                raise ValueError(
                    f"'{self.masks}' has no masks of round {resolved.round} for seed {seed}. Its "
                    f"seeds: {stored['seeds']}, its rounds: 0 (dense) to {stored['rounds']}."
                )
        return resolved

    @property
    def subject(self) -> str:
        """Name of the experiment."""
        return "instability"

    def training_config(self) -> RunConfig:
        """Returns the configuration of a run with the same network and training."""
        names = ("data", "network", "steps", "batch_size", "optimizer", "learning_rate", "seeds")
        values = {name: getattr(self, name) for name in names}
        return RunConfig(**values).resolve(chosen(self.batch_size))

    def masks_file(self, seed: int, stored: dict[str, Any]) -> Path:
        """Returns the file of this seed's masks in a run with the configuration `stored`."""
        replicate = stored["seeds"].index(seed)
        return chosen(self.masks) / "rounds" / str(replicate) / f"masks-{self.round:02}.npz"

    @property
    def work(self) -> int:
        """Number of training steps of a resolved configuration for each of its seeds."""
        return sum(self.work_of(parse_steps(text, 1)) for text in self.rewind_to)

    def work_of(self, point: int) -> int:
        """Returns the training steps of a point: up to it once, and from there to the end twice."""
        return point + 2 * (chosen(self.steps) - point)


def run(config: InstabilityConfig, data: datasets.Dataset, console: Console | None = None) -> Path:
    """Runs a resolved experiment (see `workbench.load_and_resolve`) and returns its folder.

    The folder contains `config.json`, `results.csv` (a row per point and replicate), `lines.csv`
    (the metrics along every line) and `instability.png`. Results of an interrupted run are kept. If
    the run is finished, its results are shown.

    If the training of a seed diverges, the other seeds go on.

    Raises:
        DivergenceError: If it happened, at the end. The run is then not finished.
        ValueError: If the folder holds another run (see `RunFolder`).
        FolderInUseError: If another process is writing in it.
        OSError: If it cannot be written, or is removed in the meantime.
    """
    console = console or progress.console(quiet=config.quiet)
    if config.deterministic:
        make_deterministic()
    trainer = _Trainer(config, data)
    return RunFolder("instability", config, data, trainer.masks).carry_out(
        lambda folder: _carry_out(config, trainer, folder, console),
        lambda rows: console.print(tables.instability_sheet(_table(config, rows)).table()),
        console,
    )


def _carry_out(
    config: InstabilityConfig, trainer: "_Trainer", folder: RunFolder, console: Console
) -> None:
    rows, lines = _measured(folder.path, config.points) if folder.is_interrupted else ([], [])
    under = f" under the masks of {config.masks}, round {config.round}" if config.masks else ""
    folder.begin(
        f"{config.data}, {config.network}: instability{under}; {keras.backend.backend()}",
        keep=[results.RESULTS_FILE, results.LINES_FILE],
    )
    done = {(row["replicate"], row["rewind_to"]) for row in rows}
    failures = divergence.SeedFailures()
    bar = progress.bar(console)
    points = [parse_steps(text, 1) for text in config.rewind_to]
    with bar:
        task = bar.add_task("", total=config.work * len(config.seeds))
        bar.advance(task, sum(config.work_of(point) for _, point in done))
        for (replicate, seed), point in itertools.product(enumerate(config.seeds), points):
            if (replicate, point) in done:
                continue
            bar.update(task, description=f"seed {seed}, {point} steps before")
            with failures.seed(seed):
                row, line = trainer.measure(seed, point, lambda n: bar.advance(task, n))
                place = {"replicate": replicate, "rewind_to": point}
                rows.append(place | row | results.identity(config, seed))
                lines += [place | of_share for of_share in line.to_dict("records")]
                folder.check()
                # The line is written first, so that every row has its line.
                parts = {results.LINES_FILE: lines, results.RESULTS_FILE: rows}
                results.write_parts(folder.path, parts)
    failures.check()
    found = figures.interpolations([pd.DataFrame(lines)])
    results.write_figure(folder.path / _PICTURE, analyses.plot_instability(found))


def _table(config: InstabilityConfig, rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows)
    table["seed"] = [config.seeds[replicate] for replicate in table["replicate"]]
    return table


def _config_of_run(folder: Path) -> dict[str, Any]:
    """Returns the configuration of a run with saved masks."""
    stored = run_folders.read_run(folder).config
    if catalogue.command_of(stored) != "run":
        raise ValueError(
            f"'{folder}' is the folder of another command and has no masks of rounds. Pass a "
            "folder of `lottery-ticket run` to --masks."
        )
    for name, kind in _OF_RUN.items():
        if not isinstance(stored.get(name), kind):
            raise ValueError(
                f"'{folder / results.CONFIG_FILE}' is damaged: it has {name} {stored.get(name)!r}."
            )
    return stored


def _measured(folder: Path, points: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns the rows and lines of an interrupted run for which both are complete."""
    names = (results.RESULTS_FILE, results.LINES_FILE)
    if not all((folder / name).is_file() for name in names):
        return [], []
    rows, lines = (results.read_parts(folder, name) for name in names)

    def of_row(row: Mapping[str, Any]) -> tuple[Any, Any]:
        return row["replicate"], row["rewind_to"]

    found = collections.Counter(map(of_row, lines))
    rows = [row for row in rows if found[of_row(row)] == points]
    done = set(map(of_row, rows))
    return rows, [line for line in lines if of_row(line) in done]


class _Trainer:
    """A model that is trained repeatedly, so that nothing is compiled twice.

    Attributes:
        masks: Masks of every seed, read once at the beginning, so that masks of a concurrent run
            are not mixed in. None without `--masks`.
    """

    def __init__(self, config: InstabilityConfig, data: datasets.Dataset) -> None:
        self._config = config
        self._data = data
        with devices.scope(config.devices):
            self._model = ml.convert_to_masked(
                compiled_network(config.training_config(), data, config.seeds[0])
            )
        self._fresh = LotteryTicketPruner(self._model)
        self.masks: dict[int, dict[str, np.ndarray]] | None = None
        if config.masks is not None:
            stored, self.masks = _config_of_run(config.masks), {}
            for seed in config.seeds:
                ml.load_masks(self._model, config.masks_file(seed, stored))
                self.masks[seed] = ml.get_masks(self._model)
        augment = networks.augmentation(chosen(config.network))
        self._examples = ArrayDataset.of(data.x_train, data.y_train, None, augment)

    def measure(
        self, seed: int, point: int, on_progress: Callable[[int], None]
    ) -> tuple[dict[str, Any], pd.DataFrame]:
        """Returns the row of a point, and the metrics along its line."""
        started = time.perf_counter()
        config, data, model = self._config, self._data, self._model
        plan = training_plan(config, seed)
        start = compiled_network(config.training_config(), data, seed).get_weights()
        self._fresh.reset_masks()
        self._restart(start)
        if point:
            # The weights that `lottery-ticket run` rewinds to, to which its masks belong.
            train_to_rewinding_point(
                model,
                self._examples,
                dataclasses.replace(plan, steps=point),
                listeners=Listeners(on_progress=on_progress),
            )
            start = model.get_weights()
        if self.masks is not None:
            ml.set_masks(model, self.masks[seed])
        self._restart(start)
        optimizers.advance_schedule(model.optimizer, point)
        line = analyses.instability(
            model,
            data.x_train,
            data.y_train,
            steps=chosen(config.steps) - point,
            batch_size=plan.batch_size,
            test_data=(data.x_test, data.y_test),
            points=config.points,
            seed=seed,
            augment=plan.augment,
            deterministic=plan.deterministic,
            on_progress=on_progress,
        )
        accuracy = line.metrics["accuracy"]
        row = {
            "sparsity": ml.sparsity_report(model).sparsity,
            "instability": line.barrier,
            "loss_barrier": dataclasses.replace(line, metric="loss").barrier,
            "test_accuracy": float(np.mean(accuracy[[0, -1]])),
            "lowest_accuracy": float(accuracy.min()),
            "seconds": time.perf_counter() - started,
        }
        return row, pd.DataFrame({"share": line.shares, **line.metrics})

    def _restart(self, weights: list[np.ndarray]) -> None:
        self._fresh.rewind()  # for the optimizer
        self._model.set_weights(weights)
