"""Logs of searches: what is logged under which name and step, and what each tool is told."""

import importlib.machinery
import math
import types

import numpy as np
import pytest

from _lottery_ticket.refusals import MissingExtraError
from lottery_ticket_pruner import find_ticket, loggers, training
from small_classifier import DATA, make_model

pytestmark = pytest.mark.once


class Recorder(loggers.RunLogger):
    """A logger that keeps everything."""

    def __init__(self):
        self.logged, self.ended = [], None

    def params(self, values):
        self.logged.append(dict(values))

    def scalars(self, values, step, axis="step"):
        self.logged += [(name, value, step, axis) for name, value in values.items()]

    def finish(self, *, failed=False):
        self.ended = "failed" if failed else "finished"

    def curve(self, name):
        return [(step, value) for known, value, step, _ in self.logged if known == name]


def test_a_search_is_logged_by_arm_and_round():
    recorder = Recorder()
    log = loggers.SearchLog(recorder)
    (x, y), validation, test = DATA
    search = {"rounds": 1, "rate": 0.5, "steps": 4, "eval_every": 2, "controls": ("random_mask",)}
    data = {"validation_data": validation, "test_data": test}
    listeners = {"on_result": log.on_result, "on_evaluation": log.on_evaluation}
    result = find_ticket(make_model(), x, y, batch_size=50, **search, **data, **listeners)
    log.on_masks(result.ticket, 1)
    rows = {(row["arm"], row["round"]): row for row in result.rows}
    dense, ticket, control = rows["dense", 0], rows["ticket", 1], rows["random_mask", 1]
    for name in ("test_accuracy", "test_loss", "validation_loss"):
        assert recorder.curve(f"ticket/{name}") == [(0, dense[name]), (1, ticket[name])]
        assert recorder.curve(f"random_mask/{name}") == [(1, control[name])]
    assert recorder.curve("ticket/sparsity") == [(0, 0), (1, 0.5)]
    assert recorder.curve("ticket/sparsity/hidden/kernel") == [(1, 0.5)]
    curve = recorder.curve("random_mask/round_01/validation_loss")
    assert [step for step, _ in curve] == [2, 4]
    axes = {axis for name, _, _, axis in recorder.logged if "round_" in name}
    assert axes == {"training_step"}
    assert [step for step, _ in recorder.curve("ticket/round_00/training_loss")] == [2, 4]


def test_rows_of_prune_and_epochs_are_logged():
    recorder = Recorder()
    log = loggers.PruneLog(recorder)
    log.on_row({"step": 3, "method": "iterative", "drop": 0.5, "accepted": True, "macs": None})
    log.on_numbers({"test_drop": 0.25})
    assert recorder.logged == [
        ("drop", 0.5, 3, "step"),
        ("accepted", 1.0, 3, "step"),
        ("test_drop", 0.25, 3, "step"),
    ]
    (x, y), *_ = DATA
    model = make_model()
    history = training.fit(model, x, y, epochs=2, callbacks=[loggers.EpochLog(recorder)])
    assert recorder.curve("loss") == list(enumerate(history.history["loss"]))
    # What diverges is shown.
    assert math.isnan(loggers.numbers({"loss": np.float32("nan"), "name": "x"})["loss"])


def test_a_log_says_how_the_run_ended():
    recorder = Recorder()
    with recorder:
        pass
    assert recorder.ended == "finished"
    with pytest.raises(KeyError), recorder:
        raise KeyError
    assert recorder.ended == "failed"


@pytest.fixture
def tool(monkeypatch):
    """Installs a module that records calls of its functions and of their results."""
    calls = []

    class Called:
        def __init__(self, name):
            self._name = name

        def __getattr__(self, name):
            return Called(f"{self._name}.{name}")

        def __call__(self, *args, **kwargs):
            given = [arg for arg in args if not isinstance(arg, Called)]
            calls.append((self._name, *given, *kwargs.values()))
            return Called(self._name)

    def install(name):
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__getattr__ = lambda attribute: Called(attribute)
        monkeypatch.setitem(loggers.importlib.sys.modules, name, module)
        return calls

    return install


def test_wandb_gets_an_axis_for_each_name_because_its_steps_only_grow(tool):
    calls = tool("wandb")
    with loggers.WandbLogger("project", "name") as logger:
        logger.params({"rate": 0.5})
        logger.scalars({"loss": 1.0}, 5, "round")
        logger.scalars({"loss": 2.0}, 2, "round")
    assert calls == [
        ("init", "project", "name", "create_new"),
        ("init.config.update", {"rate": 0.5}, True),
        ("init.define_metric", "loss", "round"),
        ("init.log", {"loss": 1.0, "round": 5}),
        ("init.log", {"loss": 2.0, "round": 2}),
        ("init.finish", 0),
    ]


def test_mlflow_gets_names_that_it_allows(tool):
    calls = tool("mlflow")
    logger = loggers.MLflowLogger("tickets")
    logger.params({"rate": 0.5})
    with pytest.warns(UserWarning, match="6,000 characters.* of the 6,001 of 'over' are logged"):
        logger.params({"over": "x" * 6001})
    logger.scalars({"sparsity/a(b)/kernel": 1.0}, 5)
    logger.finish(failed=True)
    run = "tracking.MlflowClient"
    assert [call for call in calls if call[0].startswith(f"{run}.log_")] == [
        (f"{run}.log_param", "rate", "0.5"),
        (f"{run}.log_param", "over", "x" * 6000),
        (f"{run}.log_metric", "sparsity/a_b_/kernel", 1.0, 5),
    ]
    assert calls[-1] == (f"{run}.set_terminated", "FAILED")


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_missing_tool_names_its_extra(name, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=rf"lottery-ticket-pruner\[{name}\]"):
        loggers.opened(name, "run", {})


def test_a_log_that_refuses_its_parameters_is_ended(tool, monkeypatch):
    calls = tool("mlflow")

    def refuse(self, values):
        raise TypeError("no such value")

    monkeypatch.setattr(loggers.MLflowLogger, "params", refuse)
    with pytest.raises(ValueError, match="mlflow cannot log: TypeError: no such value"):
        loggers.opened("mlflow", "run", {"rate": 0.5})
    assert calls[-1] == ("tracking.MlflowClient.set_terminated", "FAILED")
