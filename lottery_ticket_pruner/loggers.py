"""Logs of a search in MLflow, Weights & Biases or another tool, with one small interface.

A logger takes parameters and numbers. The functions that search call listeners with results, and
these turn results into numbers, so that names and steps are the same in every tool:

```python
with loggers.MLflowLogger("tickets") as logger:
    log = loggers.SearchLog(logger)
    find_ticket(..., on_result=log.on_result, on_evaluation=log.on_evaluation)
with loggers.WandbLogger("tickets") as logger:
    prune(model, data, on_row=loggers.PruneLog(logger).on_row)
    training.fit(model, x, y, callbacks=[loggers.EpochLog(logger)])
```

TensorBoard's logger is `lottery_ticket_pruner.experiments.tensorboard.TensorBoardLogger`.
"""

from __future__ import annotations

import abc
import importlib
import re
from collections.abc import Mapping
from typing import Any, Self

import keras

import masked_layers as ml
from _lottery_ticket.refusals import MissingExtraError
from lottery_ticket_pruner import notices
from lottery_ticket_pruner.checks import is_number, line_of, require_extra

# MLflow's limit for the value of a parameter.
_LONGEST = 6000


class RunLogger(abc.ABC):
    """The log of one run: parameters, and numbers over an axis. Used as a context manager."""

    @abc.abstractmethod
    def params(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with."""

    @abc.abstractmethod
    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Logs numbers.

        Args:
            values: The numbers by name. Names may have parts, separated by slashes.
            step: Where they are on the axis.
            axis: What is counted, such as rounds. It is always the same for one name.
        """

    @abc.abstractmethod
    def finish(self, *, failed: bool = False) -> None:
        """Ends the log.

        Args:
            failed: Whether the run ended with an error.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=error is not None)


class MLflowLogger(RunLogger):
    """A run of MLflow, in its tracking server or files as the environment says.

    It does not become MLflow's active run, so it does not disturb other logs.

    Args:
        experiment: Name of the experiment, created if it does not exist.
        name: Name of the run. None to let MLflow choose one.
        tracking_uri: Where to log. None for MLflow's own setting (`MLFLOW_TRACKING_URI`).

    Raises:
        ImportError: If MLflow is not installed.
    """

    def __init__(
        self, experiment: str, name: str | None = None, tracking_uri: str | None = None
    ) -> None:
        client = _imported("mlflow").tracking.MlflowClient(tracking_uri)
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        self._client = client
        self._run = client.create_run(place, run_name=name).info.run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with.

        Warns:
            UserWarning: If a value is longer than MLflow takes.
        """
        for name, value in values.items():
            text = str(value)
            if len(text) > _LONGEST:
                notices.warn(
                    f"MLflow takes at most {_LONGEST:,} characters of a parameter, so that only so "
                    f"many of the {len(text):,} of {name!r} are logged."
                )
            self._client.log_param(self._run, _plain(name), text[:_LONGEST])

    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Logs numbers. MLflow's steps have no name."""
        for name, value in values.items():
            self._client.log_metric(self._run, _plain(name), value, step=step)

    def finish(self, *, failed: bool = False) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run, "FAILED" if failed else "FINISHED")


class WandbLogger(RunLogger):
    """A run of Weights & Biases. `WANDB_MODE=offline` keeps it on this machine.

    Args:
        project: Name of the project.
        name: Name of the run. None to let the service choose one.

    Raises:
        ImportError: If wandb is not installed.
    """

    def __init__(self, project: str, name: str | None = None) -> None:
        self._run = _imported("wandb").init(project=project, name=name, reinit="create_new")
        self._known: set[str] = set()

    def params(self, values: Mapping[str, Any]) -> None:
        """Logs what the run was started with."""
        self._run.config.update(dict(values), allow_val_change=True)

    def scalars(self, values: Mapping[str, float], step: int, axis: str = "step") -> None:
        """Logs numbers, with the axis as their own step: the steps of wandb can only grow."""
        for name in values.keys() - self._known:
            self._run.define_metric(name, step_metric=axis)
            self._known.add(name)
        self._run.log({**values, axis: step})

    def finish(self, *, failed: bool = False) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))


def opened(tool: str, name: str, params: Mapping[str, Any]) -> RunLogger:
    """Opens the log of a command in MLflow or wandb.

    Args:
        tool: `"mlflow"` or `"wandb"`.
        name: Name of the run.
        params: What the run was started with, which is logged.

    Raises:
        MissingExtraError: If the tool is not installed.
        ValueError: If it refuses to log, for example because nobody is logged in.
    """
    try:
        logger = {"mlflow": MLflowLogger, "wandb": WandbLogger}[tool]("lottery-ticket", name)
        try:
            logger.params(params)
        except BaseException:
            logger.finish(failed=True)
            raise
        return logger
    except MissingExtraError:
        raise
    except Exception as error:  # The tools have errors of their own.
        raise ValueError(f"{tool} cannot log: {line_of(error)}") from error


class SearchLog:
    """Listeners of `find_ticket` that log its results.

    Of each row, `ARM/test_accuracy`, `ARM/test_loss`, `ARM/validation_loss` and `ARM/sparsity` are
    logged over the rounds, and of each evaluation `ARM/round_01/validation_loss`,
    `ARM/round_01/training_loss` and the other metrics, and `ARM/round_01/learning_rate`, over the
    steps of training. The dense run is round 0 of the ticket. Values that a search lacks are left
    out.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: RunLogger) -> None:
        self._logger = logger

    def on_result(self, row: Mapping[str, Any]) -> None:
        """Logs a row of the results."""
        names = ("test_accuracy", "test_loss", "validation_loss", "sparsity")
        self._log(_arm_of(row), {name: row.get(name) for name in names}, row["round"], "round")

    def on_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """Logs an evaluation on the validation data, and the training before it."""
        values = {
            f"round_{evaluation['round']:02}/{name}": value
            for name, value in evaluation.items()
            if name.startswith(("validation_", "training_", "learning_rate"))
        }
        self._log(_arm_of(evaluation), values, evaluation["step"], "training_step")

    def on_masks(self, model: keras.Model, round_: int) -> None:
        """Logs the sparsity of each masked weight of a ticket, as `ticket/sparsity/PATH`."""
        self._log("ticket", sparsities(model), round_, "round")

    def _log(self, arm: str, values: Mapping[str, Any], step: int, axis: str) -> None:
        named = {f"{arm}/{name}": value for name, value in values.items()}
        self._logger.scalars(numbers(named), step, axis)


class PruneLog:
    """A listener of `prune` that logs its rows, and its result.

    `validation`, `drop`, `sparsity`, `accepted` (0 or 1), `steps`, `seconds` and, if there are
    any, `macs` and `latency` are logged over the numbers of the models that were tried.

    Args:
        logger: The logger.
    """

    _NAMES = ("validation", "drop", "sparsity", "accepted", "steps", "seconds", "macs", "latency")

    def __init__(self, logger: RunLogger) -> None:
        self._logger = logger
        self._last = 0

    def on_row(self, row: Mapping[str, Any]) -> None:
        """Logs a row as soon as it is known."""
        self._last = row["step"]
        self._logger.scalars(numbers({name: row.get(name) for name in self._NAMES}), self._last)

    def on_numbers(self, values: Mapping[str, Any]) -> None:
        """Logs further numbers at the last model."""
        self._logger.scalars(numbers(values), self._last)


class EpochLog(keras.callbacks.Callback):
    """A callback for `fit` and `training.fit` that logs the results of each epoch.

    Args:
        logger: The logger.
    """

    def __init__(self, logger: RunLogger) -> None:
        super().__init__()
        self._logger = logger

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Logs the results of an epoch."""
        self._logger.scalars(numbers(logs or {}), epoch, "epoch")


def sparsities(model: keras.Model) -> dict[str, float]:
    """Returns the share of pruned weights for every mask of a model, and in total."""
    report = ml.sparsity_report(model)
    shares = {f"sparsity/{row.path}": row.sparsity for row in report}
    return shares | {"sparsity/total": report.sparsity}


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Returns the numbers among values, truth values as 0 and 1."""
    return {
        name: float(value)
        for name, value in values.items()
        if is_number(value) or isinstance(value, bool)
    }


def _arm_of(row: Mapping[str, Any]) -> str:
    """Returns the arm whose curve a row of a search belongs to. The ticket's begins dense."""
    return str(row["arm"]) if row["round"] else "ticket"


def _plain(name: str) -> str:
    """Returns a name with characters that MLflow allows."""
    return re.sub(r"[^\w\-. /]", "_", name)


def _imported(name: str) -> Any:
    require_extra(name)
    return importlib.import_module(name)
