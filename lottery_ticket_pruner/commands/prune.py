"""The command `lottery-ticket prune`: the smallest model that is good enough, in a folder."""

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import keras
import numpy as np
import rich.progress
from rich.console import Console

from _lottery_ticket import commands as options
from _lottery_ticket import unknown, wording
from lottery_ticket_pruner import Latency, notices
from lottery_ticket_pruner.checks import require_extra
from lottery_ticket_pruner.commands import prune_folder, served_latency
from lottery_ticket_pruner.compression import (
    Comparison,
    Goals,
    Options,
    Parts,
    Plan,
    PruneResult,
    parts_of,
    reason_of,
    save_model,
    search,
    verdict_of,
)
from lottery_ticket_pruner.experiments import (
    datasets,
    devices,
    networks,
    own,
    own_networks,
    progress,
)
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.reports import pruning
from lottery_ticket_pruner.experiments.tensorboard import TensorBoardLogger
from lottery_ticket_pruner.experiments.workbench import compiled_network
from lottery_ticket_pruner.fingerprints import of_json
from lottery_ticket_pruner.loggers import PruneLog, opened
from lottery_ticket_pruner.wording import DropText

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 1_000,
    "mb": 1_000_000,
    "gb": 1_000_000_000,
    "kib": 2**10,
    "mib": 2**20,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PruneConfig(options.PruneOptions):
    """Options of `lottery-ticket prune`."""

    @property
    def folder(self) -> Path:
        """Folder that is written."""
        if self.out is not None:
            return self.out
        names = [datasets.label(name) for name in (self.model or "", self.data) if name]
        return Path("runs", "-".join(["prune", *names, of_json(self._choices())[:8]]))

    def to_dict(self) -> dict[str, Any]:
        """Returns the options as JSON data."""
        values = dataclasses.asdict(self)
        del values["overwrite"]
        if not self.devices:  # The form of all folders that were written before this option.
            del values["devices"]
        return json.loads(json.dumps(values, default=str))

    def plan(self, **listeners: Any) -> Plan:
        """Returns the plan of the search.

        Raises:
            ValueError: If an option is out of range or contradicts another one.
        """
        return Plan(
            goals=Goals(
                max_drop=self.max_drop,
                sparsity=self.sparsity,
                size=None if self.size is None else bytes_of(self.size),
                macs=self.macs,
                latency=None if self.latency is None else latency_of(self.latency),
            ),
            options=Options(
                mode=self.mode,
                rate=self.rate,
                scope=self.scope,
                retraining=self.retraining,
                batch_size=self.batch_size,
                seed=self.seed,
                **listeners,
            ),
            method=self.method,
            metric=self.metric,
            epochs=self.epochs,
            minutes=self.minutes,
        )

    def _choices(self) -> dict[str, Any]:
        others = ("out", "quiet", "minutes", "data_dir", "log")
        return {name: value for name, value in self.to_dict().items() if name not in others}


def bytes_of(text: str) -> int:
    """Parses a size such as 500kB or 2MB.

    Raises:
        ValueError: If the text is not one.
    """
    # Commas separate thousands. In other places, they may be meant as decimal points.
    number = r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|[\d_.]+"
    match = re.fullmatch(rf"\s*({number})\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"--size expects bytes, such as 500kB or 2MB. Received: {text!r}.")
    try:
        return int(float(match[1].replace(",", "").replace("_", "")) * unit)
    except (OverflowError, ValueError) as error:
        raise ValueError(
            f"--size expects bytes, such as 500kB or 2MB. Received: {text!r}."
        ) from error


def latency_of(text: str) -> float | Latency:
    """Parses a latency such as 3ms, or a share such as 0.5.

    Raises:
        ValueError: If the text is neither.
    """
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(ms|s|us|)\s*", text)
    if match is None or float(match[1]) == 0:
        raise ValueError(
            f"--latency expects a time, such as 3ms, or a share, such as 0.5. Received: {text!r}."
        )
    number = float(match[1])
    if not match[2]:
        if number > 1:
            raise ValueError(
                f"--latency without a unit is a share of at most 1. Received: {text!r}. For "
                f"milliseconds, give {number:g}ms."
            )
        return number
    return Latency(milliseconds=number * {"s": 1e3, "ms": 1.0, "us": 1e-3}[match[2]])


def prune(config: PruneConfig, console: Console | None = None) -> PruneResult:
    """Executes the search, writes the folder and prints the result.

    Raises:
        ValueError: If an option, the model or the data cannot be used, or the folder holds another
            search.
        OSError: If a file is missing, or the folder is in use or cannot be written.
    """
    console = console or progress.console(quiet=config.quiet)
    started = time.perf_counter()
    config.plan()  # Raises errors of options before anything is loaded.
    if config.log not in (None, "tensorboard"):
        require_extra(config.log)
    if config.devices and config.latency is not None:
        raise ValueError("--latency is measured on one device: leave out --devices.")
    devices.check(config.devices, config.batch_size)
    prune_folder.check_that_nothing_is_lost(config.folder, config.model)
    parts = load_data(config)
    with devices.scope(config.devices):
        model = load(config)
    _check_inputs(config, model, parts)
    folder = config.folder
    with served_latency.DenseFolder(model) as dense, _Log(config) as log:
        reserve = 0.0 if config.minutes is None else dense.seconds_to_compare()
        times = {"started": started, "reserve": reserve}
        with notices.said_once() as said:
            result = _search(config, model, parts, console, log, times)
        prune_folder.begin(folder)
        save_model(
            result.model, folder / prune_folder.MODEL_FILE
        )  # Before exports, which may fail.
        served = _export(result, dense, folder, console, parts)
        log.on_end(result.test, served)
    result = _with_time(result, config, started)
    facts = pruning.Facts(
        name=model.name,
        data=config.data,
        counts=parts.counts(),
        dense_sizes=pruning.kernel_sizes(model),
        kept_sizes=pruning.kernel_sizes(result.model),
        served=None if served is None else served.nbytes,
        latencies=None if served is None else served.milliseconds,
        labels=_labels(parts),
        options={k: v for k, v in config.to_dict().items() if v is not None and k != "quiet"},
    )
    prune_folder.write(result, facts, folder)
    notes = [note for note in result.notes if note not in said]  # What was not a warning before.
    progress.say(console, "\n".join([f"test: {result.test}", result.conclusion, *notes]))
    if facts.served is not None:
        pruned, whole = facts.served
        progress.say(
            console,
            f"Served: {pruned:,} bytes; dense {whole:,}, {whole / pruned:.1f} times as much. "
            f"{pruning.use_of_zeros(result, facts)}".rstrip(),
        )
    seconds = time.perf_counter() - started
    progress.say(console, f"{seconds:.0f} s. Report: {folder / 'report.html'}")
    return result


def _with_time(result: PruneResult, config: PruneConfig, started: float) -> PruneResult:
    """Adds to the conclusion that the exports ended after --minutes, if they did.

    The goals in it are named as on the command line.
    """
    text = wording.of_options(result.conclusion, PruneConfig)
    minutes = (time.perf_counter() - started) / 60
    if config.minutes is not None and minutes > config.minutes:
        text += (
            f" With the exports it took {minutes:.2g} minutes, more than --minutes "
            f"{config.minutes:g}."
        )
    return dataclasses.replace(result, conclusion=text)


def _search(
    config: PruneConfig,
    model: keras.Model,
    parts: Parts,
    console: Console,
    log: "_Log",
    times: Mapping[str, float],
) -> PruneResult:
    """Executes the search, and shows and logs its rows."""
    with _Display(console, config.folder) as display:

        def on_row(row: dict[str, Any]) -> None:
            display.show(row)
            log.on_row(row)

        def on_training(row: dict[str, Any], steps: int) -> None:
            log.begin()
            display.begin(row, steps)

        plan = config.plan(on_row=on_row, on_training=on_training, on_progress=display.advance)
        place = config.folder / prune_folder.SEARCH
        try:
            return search(model, parts, plan, place, overwrite=config.overwrite, **times)
        except KeyboardInterrupt as error:
            error.add_note(f"What is done so far is in {config.folder}.")
            raise


class _Log:
    """The log of a search in the tool of --log, if there is one, and what the command adds.

    It is opened before the first training or row, when nothing can be refused any more. Used as a
    context manager.

    Args:
        config: The configuration.
    """

    def __init__(self, config: PruneConfig) -> None:
        self._config = config
        self._opened = contextlib.ExitStack()
        self._log: PruneLog | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._opened.__exit__(*error)

    def begin(self) -> None:
        """Opens the log, if that was not done before."""
        config = self._config
        if config.log is None or self._log is not None:
            return
        params = config.to_dict()
        if config.log == "tensorboard":
            board = TensorBoardLogger(config.folder / "logs")
            self._log = PruneLog(self._opened.enter_context(board))
            board.params(params)
        else:
            tool = opened(config.log, config.folder.name, params)
            self._log = PruneLog(self._opened.enter_context(tool))

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Logs a model that was tried."""
        self.begin()
        if self._log is not None:
            self._log.on_row(row)

    def on_end(self, test: Comparison, served: served_latency.Served | None) -> None:
        """Logs the result at the last model."""
        values = {f"test_{name}": getattr(test, name) for name in ("dense", "pruned", "drop")}
        if served is not None:
            values |= {"served_bytes": served.nbytes[0], "served_bytes_dense": served.nbytes[1]}
        if self._log is not None:
            self._log.on_numbers(values)


def load_data(config: PruneConfig) -> Parts:
    """Loads the data of a configuration.

    Raises:
        ValueError: If the name is unknown, or the data has another form.
        UserCodeError: If the user's function raises an exception.
    """
    if datasets.is_own(config.data):
        datasets.warn_of_folder(config.data, config.data_dir)
        keras.utils.set_random_seed(config.seed)  # Of examples that are drawn, see `load`.
        return own.value_of(config.data, "load data with", parts_of)
    return parts_of(datasets.load(config.data, config.data_dir))


def load(config: PruneConfig) -> keras.Model:
    """Returns the compiled model of a configuration.

    Raises:
        FileNotFoundError: If there is no such file or module.
        ValueError: If the name is unknown, or the model is not compiled.
        UserCodeError: If the user's function raises an exception.
    """
    name = config.model
    if name is None or name in networks.NAMES:
        return _network(config)
    if datasets.is_own(name) and not Path(name).is_file():
        # With other initial weights, the same command could not resume its search.
        keras.utils.set_random_seed(config.seed)
        return own.value_of(name, "make a model with", _compiled)
    unknown.check_model(name)
    return _compiled(own_networks.load_file(Path(name), compiled=True), f"{name}: ")


def _network(config: PruneConfig) -> keras.Model:
    """Returns a network of the papers, compiled by its recipe."""
    if datasets.is_own(config.data) and config.model is None:
        raise ValueError("Name a MODEL for your own data: a file, module:function, or a network.")
    data = datasets.load(config.data, config.data_dir)
    run = RunConfig(data=config.data, network=config.model).resolve(len(data.x_train))
    return compiled_network(run, data, config.seed)


def _compiled(model: object, where: str = "") -> keras.Model:
    if not isinstance(model, keras.Model):
        raise ValueError(f"{where}Expected a Keras model. Received: {type(model).__name__}.")
    if not getattr(model, "compiled", False):
        raise ValueError(
            f"{where}The model is not compiled, so its loss and metrics are not known. Save it "
            "after compile(), or name a function that returns it compiled: file.py:function."
        )
    return model


def _check_inputs(config: PruneConfig, model: keras.Model, parts: Parts) -> None:
    """Raises an error if a single input has another shape than the model takes."""
    x, shape = parts.train[0], getattr(model, "input_shape", None)
    if not (isinstance(x, np.ndarray) and isinstance(shape, tuple)):
        return
    wanted, given = shape[1:], x.shape[1:]
    if not all(size is None or isinstance(size, int) for size in wanted) or _goes(given, wanted):
        return
    default = " (the default)" if config.data == options.PruneOptions.data else ""
    same_size = None not in wanted and np.prod(wanted) == np.prod(given)
    raise ValueError(
        f"{config.model} takes inputs of shape {wanted}, but those of --data {config.data}"
        f"{default} have {given}. {_remedy_of_inputs(config.data, same_size)}"
    )


def _remedy_of_inputs(data: str, same_size: bool) -> str:
    """Returns what to do about inputs of another shape, perhaps with as many values."""
    form = "--data module:function or path/to/file.py:function."
    if datasets.is_own(data):
        others = f"Return others from {data}, or name another model."
        return f"Reshape them in {data}." if same_size else others
    if same_size:
        return f"Reshape them in a function that returns the data, and name your own data: {form}"
    return f"Name your own data: {form}"


def _goes(given: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    """Returns whether Keras takes a shape, perhaps with a last axis of size 1 more or less."""
    forms = [given]
    if wanted[-1:] == (1,):
        forms.append((*given, 1))
    if given[-1:] == (1,):
        forms.append(given[:-1])
    return any(
        len(form) == len(wanted) and all(w in (None, g) for w, g in zip(wanted, form, strict=True))
        for form in forms
    )


def _labels(parts: Parts) -> list[int] | None:
    """Returns the classes of the test examples, or None for other targets."""
    y = parts.test[1]
    if not isinstance(y, np.ndarray):
        return None
    if y.ndim == 2 and y.shape[1] > 1:
        return y.argmax(-1).tolist()
    y = y.reshape(len(y), -1)
    whole = y.shape[1] == 1 and np.array_equal(y, np.round(y))
    return y[:, 0].astype(int).tolist() if whole else None


def _export(
    result: PruneResult,
    dense: served_latency.DenseFolder,
    folder: Path,
    console: Console,
    parts: Parts,
) -> served_latency.Served | None:
    """Writes the folder for serving, and compares it with that of the dense model."""
    place = folder / "served" / "1"
    try:
        served = dense.compare(result.model, place)
    except Exception as error:  # TensorFlow's own, too. The rest of the folder is written.
        text = f"No SavedModel: {type(error).__name__}: {error}"
        if place.exists():
            text += f"\nWhat is in {place} is not this model, but from an earlier search."
        progress.say(console, text)
        return None
    try:
        return dense.timed(served, place, parts.test[0])
    except Exception as error:  # The folder is written nevertheless.
        progress.say(console, f"The served models were not timed: {type(error).__name__}: {error}")
        return served


class _Display:
    """A growing table of the models that were tried, and a bar for the current training.

    Args:
        console: Where it is printed.
        folder: Folder of the results. It is named before the first training or row, when nothing
            can be refused any more.
    """

    def __init__(self, console: Console, folder: Path) -> None:
        self._console = console
        self._folder = folder
        self._is_open = False
        self._bar = progress.bar(console)
        self._task: rich.progress.TaskID | None = None
        self._said: set[str] = set()
        self._told = DropText(in_points=False)  # Until the dense model is shown.

    def __enter__(self) -> "_Display":
        return self

    def __exit__(self, *_: object) -> None:
        if self._is_open:
            self._bar.stop()

    def begin(self, row: dict[str, Any], steps: int) -> None:
        self._open()
        what = f"step {row['step']}, {row['sparsity']:.2%}"
        self._task = self._bar.add_task(what if row["step"] else "dense", total=steps)

    def advance(self, steps: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, steps)

    def show(self, row: dict[str, Any]) -> None:
        self._open()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        if not row["step"]:
            self._told = DropText.of(row["metric"], row["validation"])
            headings = ("step", "method", "pruned", "validation", self._told.heading)
            self._line(*headings, "elapsed", "left", "")
        value, drop = row["validation"], row["drop"]
        self._line(
            str(row["step"]),
            row["method"].replace("_", " "),
            f"{row['sparsity']:.2%}",
            "" if value is None else f"{value:.4f}",
            "" if drop is None else self._told.number(drop),
            _minutes(row["elapsed"]),
            _minutes(row["remaining"]),
            verdict_of(row),
        )
        if row["note"]:
            progress.say(self._console, reason_of(row, self._said))

    def _open(self) -> None:
        if not self._is_open:
            progress.say(self._console, f"Results go to {self._folder}")
            self._bar.start()
            self._is_open = True

    def _line(self, *texts: str) -> None:
        widths = (4, 11, 7, 10, len(self._told.heading), 7, 6, 8)
        cells = [text.rjust(width) for text, width in zip(texts, widths, strict=True)]
        self._console.print("  ".join(cells).rstrip(), highlight=False, soft_wrap=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
