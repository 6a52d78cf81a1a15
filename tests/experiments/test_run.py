"""Runs, reports and logs: the results of one short run."""

import csv
import dataclasses
import io
import json
from pathlib import Path

import keras
import numpy as np
import pytest

import made_up_runs
import own_data

pytest.importorskip("tyro")
pytest.importorskip("tensorboard")

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import masked_layers as ml
from lottery_ticket_pruner import training
from lottery_ticket_pruner.cli import main
from lottery_ticket_pruner.experiments import datasets, results
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.run import _Progress, _prunes_nothing, run
from lottery_ticket_pruner.experiments.tensorboard import layer_graph
from lottery_ticket_pruner.experiments.workbench import compiled_network, load_and_resolve
from masked_layers import ticket_format

_LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
ARMS = ["random_reinit", "random_mask", "ticket"]
LEFT_BY_AN_EARLIER_RUN = (
    "logs/ticket-0/events.out.tfevents.1.stale",
    "logs/ticket-2/events.out.tfevents.1.stale",
    "ticket-2.keras",
    "rounds/2/initial.npz",
    "rounds/0/initial.npz",
    "served/1/variables/variables.data-00000-of-00002",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two rounds and two seeds: its folder, its configuration, its output.

    The folder also contains files of an earlier run with more seeds, and a file of the user.
    """
    out = tmp_path_factory.mktemp("run") / "folder"
    for name in (*LEFT_BY_AN_EARLIER_RUN, "notes.txt", "config.json"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(b"{}")
    config, data = load_and_resolve(
        RunConfig(rounds=2, steps=40, rate=0.5, seeds=(4, 5), out=out, deterministic=True)
    )
    console = Console(file=io.StringIO(), width=80)
    folder = run(config, data, console)
    assert folder == out
    return folder, config, console.file.getvalue()


def test_results_hold_a_row_per_round_arm_and_replicate(finished):
    folder, _, _ = finished
    with (folder / "results.csv").open() as file:
        header = next(csv.reader(file))
    assert header[:8] == [
        "round", "arm", "replicate", "sparsity", "test_accuracy", "test_loss", "early_stop_step",
        "seconds",
    ]  # fmt: skip
    assert header[-4:] == ["data", "network", "strategy", "seed"]
    rows = results.read_rows(folder / "results.csv")
    per_replicate = [(0, "dense"), *[(1, arm) for arm in ARMS], *[(2, arm) for arm in ARMS]]
    expected = [(*one, replicate) for replicate in (0, 1) for one in per_replicate]
    assert [(row["round"], row["arm"], row["replicate"]) for row in rows] == expected
    for row in rows:
        assert 0.1 < row["test_accuracy"] <= 1
        assert row["early_stop_step"] in range(4, 41, 4)
    # Half of the hidden weights and a quarter of the output weights are pruned in each round.
    sparsity = 1 - (0.5 * 49_200 + 0.75 * 1_000) / 50_200
    assert rows[1]["sparsity"] == pytest.approx(sparsity, abs=1e-4)


def test_the_ticket_is_a_masked_model_that_scores_what_the_table_says(finished):
    folder, _, _ = finished
    rows = results.read_rows(folder / "results.csv")
    data = datasets.load("digits")
    for name, row in (("ticket.safetensors", rows[6]), ("ticket-1.safetensors", rows[13])):
        model = ml.load_ticket(folder / name)
        model.compile(loss=_LOSS, metrics=["accuracy"])
        assert ml.sparsity_report(model).sparsity == pytest.approx(row["sparsity"], abs=1e-5)
        metrics = training.evaluate(model, data.x_test, data.y_test)
        assert metrics["accuracy"] == pytest.approx(row["test_accuracy"], abs=1e-5)


def test_the_configuration_on_file_repeats_the_run(finished):
    folder, config, _ = finished
    stored = json.loads((folder / "config.json").read_text())
    assert stored["steps"] == 40
    assert stored["learning_rate"] == 2e-3
    assert stored.pop("backend") == keras.backend.backend()
    assert stored.pop("data_digest") == datasets.load("digits").digest
    assert (stored.pop("command"), stored.pop("finished")) == ("run", True)
    assert stored.pop("versions")["keras"] == keras.__version__
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    again = RunConfig(**stored | {"out": config.out})
    assert again.resolve(1318) == config


def test_the_folder_holds_the_initial_weights_of_every_seed(finished):
    folder, config, _ = finished
    data = datasets.load("digits")
    for replicate, seed in enumerate(config.seeds):
        stored = results.initial_weights(folder, replicate)
        drawn = compiled_network(config, data, seed)
        assert len(stored) == len(drawn.weights)
        for ref in ml.weight_refs(drawn):
            np.testing.assert_array_equal(stored[ref.path], ref.variable.numpy())
    assert results.initial_weights(folder, 2) is None


def test_files_of_an_earlier_run_are_removed(finished):
    folder, _, _ = finished
    there = [name for name in LEFT_BY_AN_EARLIER_RUN if (folder / name).exists()]
    assert there == ["rounds/0/initial.npz"]  # Of this run, as another test shows.
    assert (folder / "notes.txt").exists()
    if keras.backend.backend() == "tensorflow":
        assert (folder / "served" / "1" / "saved_model.pb").exists()


def test_output_of_a_run(finished):
    folder, _, printed = finished
    assert "1,318 training, 120 validation, 359 test examples" in " ".join(printed.split())
    rows = results.read_rows(folder / "results.csv")
    lines = [line.split() for line in printed.splitlines()]
    ticket, mask, reinit = rows[6], rows[5], rows[4]
    accuracies = [f"{100 * row['test_accuracy']:.2f}" for row in (ticket, reinit, mask)]
    left = f"{1 - ticket['sparsity']:.2%}"
    assert ["4", "2", left, *accuracies, "step", f"{ticket['early_stop_step']:.0f}"] in lines
    # Lines with a path are not broken.
    assert max(len(line) for line in printed.splitlines() if str(folder) not in line) <= 80
    assert "mean ± standard deviation of 2 replicates" in printed
    assert "…" not in printed
    assert f"Results in {folder}, drawn in accuracy.png\n" in printed


def test_the_picture_is_there(finished):
    folder, _, _ = finished
    assert (folder / "accuracy.png").read_bytes().startswith(b"\x89PNG")


def stored_arrays(file):
    """Returns the masks and values in a ticket file by path."""
    entries = ticket_format.unpack(file.read_bytes()).entries
    return {entry.path: (entry.kept, entry.values) for entry in entries}


@pytest.mark.slow
@pytest.mark.once
def test_an_interrupted_run_is_resumed(finished, monkeypatch):
    straight, config, _ = finished
    elsewhere = straight.parent / "again"
    config = dataclasses.replace(config, out=elsewhere, quiet=True)
    data = datasets.load("digits")
    trained, seen = [], []
    train = training.train_by_plan

    def interrupted(*args):
        trained.append(args)
        *others, listeners = args
        if len(trained) == 11:  # in the first round of the second seed
            listeners = dataclasses.replace(listeners, on_progress=interrupt)
        return train(*others, listeners)

    def interrupt(_):
        log = load_log(elsewhere / "logs" / "random_reinit-1" / "round_01")
        seen.append([s.step for s in log.Scalars("validation_accuracy")])
        if len(seen) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "train_by_plan", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(config, data)
    assert seen == [[4], [4, 8]]  # as the arm trained
    assert len(results.read_rows(elsewhere / "results.csv")) == 8
    trained.clear()
    with monkeypatch.context() as patch:
        patch.setattr(training, "train_by_plan", lambda *a: (trained.append(a), train(*a))[1])
        run(config, data)
    assert len(trained) < 8
    both = [results.read_rows(out / "results.csv") for out in (elsewhere, straight)]
    for ours, theirs in zip(*both, strict=True):
        assert {**ours, "seconds": 0} == {**theirs, "seconds": 0}
    for name in ("ticket.safetensors", "ticket-1.safetensors"):
        ours, theirs = (stored_arrays(out / name) for out in (elsewhere, straight))
        assert len(theirs) == 6  # Kernels and biases.
        assert set(ours) == set(theirs)
        for path, arrays in theirs.items():
            np.testing.assert_equal(ours[path], arrays, err_msg=path)
    files = {file.name for file in (elsewhere / "rounds" / "1").iterdir()}
    assert files == {"initial.npz", "masks-00.npz", "masks-01.npz", "masks-02.npz"}
    for run_name in ("ticket-0", "random_mask-1"):
        log, other = (load_log(out / "logs" / run_name) for out in (elsewhere, straight))
        tags = log.Tags()["scalars"]
        assert tags == other.Tags()["scalars"]
        for tag in tags:
            both = [[(s.step, s.value) for s in each.Scalars(tag)] for each in (log, other)]
            assert both[0] == both[1], tag


@pytest.mark.once
@pytest.mark.slow  # An interruption during the training is quicker.
def test_a_run_is_resumed_if_it_was_interrupted_while_loading_data(tmp_path, monkeypatch):
    config, data = load_and_resolve(
        RunConfig(rounds=1, steps=8, seeds=(0,), controls=(), out=tmp_path)
    )
    other = dataclasses.replace(data, x_train=data.x_train[:, ::-1])
    # A file of another command, which is not the state of a run.
    (tmp_path / "state.json").write_text('{"choices": {}}')
    train = training.train_by_plan
    found = []
    for trainings in (2, 0):  # two for the dense run
        left = iter(range(trainings))

        def counted(*args, left=left, **kwargs):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return train(*args, **kwargs)

        monkeypatch.setattr(training, "train_by_plan", counted)
        with pytest.raises(KeyboardInterrupt):
            run(config, data, Console(quiet=True))
        found.append([row["arm"] for row in results.read_rows(tmp_path / "results.csv")])
    assert found == [["dense"], ["dense"]]
    monkeypatch.setattr(training, "train_by_plan", train)
    with pytest.raises(ValueError, match=r"interrupted run .* another data_digest .*--out"):
        run(config, other, Console(quiet=True))
    assert [row["arm"] for row in results.read_rows(tmp_path / "results.csv")] == ["dense"]
    run(config, data, Console(quiet=True))
    assert len(results.read_rows(tmp_path / "results.csv")) == 2
    with pytest.raises(ValueError, match=r"finished run .* another data_digest .*--overwrite"):
        run(config, other, Console(quiet=True))
    run(dataclasses.replace(config, overwrite=True), other, Console(quiet=True))
    assert len(results.read_rows(tmp_path / "results.csv")) == 2
    assert json.loads((tmp_path / "config.json").read_text())["data_digest"] == other.digest
    assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


@pytest.mark.once
def test_a_run_on_custom_data_repeats_from_its_configuration(tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(own_data.SOURCE)
    monkeypatch.chdir(tmp_path)
    options = ["--rounds", "1", "--steps", "4", "--seeds", "0", "--controls", "random_mask"]
    assert main(["run", "--data", "own.py:load", *options, "--quiet", "--out", "first"]) == 0
    stored = json.loads(Path("first/config.json").read_text())
    assert stored["data"] == "own.py:load"
    assert main(["repeat", "first", "--quiet"]) == 0
    rows, again = (results.read_rows(Path(n) / "results.csv") for n in ("first", "first-again"))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in again]
    model = ml.load_ticket("first/ticket.safetensors")
    assert (model.input_shape, model.output_shape) == ((None, 4), (None, 4))
    assert main(["run", "--data", "own.py:lode", "--quiet"]) == 2


def load_log(folder):
    log = EventAccumulator(str(folder))
    log.Reload()
    return log


def test_tensorboard_shows_accuracy_and_sparsity_per_round(finished):
    folder, _, _ = finished
    rows = results.read_rows(folder / "results.csv")
    assert not (folder / "logs" / "ticket-0" / "events.out.tfevents.1.stale").exists()
    log = load_log(folder / "logs" / "ticket-1")
    shown = [(s.step, pytest.approx(s.value)) for s in log.Scalars("test_accuracy")]
    own = [r for r in rows if r["replicate"] == 1 and r["arm"] in ("dense", "ticket")]
    assert shown == [(row["round"], row["test_accuracy"]) for row in own]
    sparsity = [(s.step, pytest.approx(s.value)) for s in log.Scalars("sparsity/fc_1/kernel")]
    assert sparsity == [(0, 0), (1, 0.5), (2, 0.75)]
    total = [pytest.approx(s.value, abs=1e-5) for s in log.Scalars("sparsity/total")]
    assert total == [row["sparsity"] for row in own]
    for row in own:
        of_round = load_log(folder / "logs" / "ticket-1" / f"round_{row['round']:02}")
        curve = of_round.Scalars("validation_loss")
        assert [s.step for s in curve] == list(range(4, 41, 4))
        assert [s.step for s in of_round.Scalars("training_accuracy")] == list(range(4, 41, 4))
        losses = [s.value for s in of_round.Scalars("training_loss")]
        assert 0 < losses[-1] < losses[0]
        rates = [s.value for s in of_round.Scalars("learning_rate")]
        assert rates == pytest.approx([0.002] * 10)
        best = min(curve, key=lambda s: s.value)
        assert best.step == row["early_stop_step"]
        assert best.value == pytest.approx(row["validation_loss"], abs=1e-6)
    tables = [e.tensor_proto.string_val[0].decode() for e in log.Tensors("params")]
    assert "| strategy | large_final |" in tables[0]
    content = log.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    given = HParamsPluginData.FromString(content).session_start_info.hparams
    assert given["strategy"].string_value == "large_final"
    assert given["rounds"].number_value == 2
    control = load_log(folder / "logs" / "random_mask-0")
    assert [s.step for s in control.Scalars("test_loss")] == [1, 2]


def test_tensorboard_shows_the_graph(finished):
    folder, _, _ = finished
    graph = load_log(folder / "logs" / "ticket-0").Graph()
    nodes = {node.name.split("/", 1)[1]: node for node in graph.node}
    assert {"flatten", "fc_1", "fc_2", "output", "fc_1/kernel", "fc_1/kernel_mask"} <= set(nodes)
    inputs = [name.split("/", 1)[1] for name in nodes["fc_2"].input]
    assert inputs == ["fc_1", "fc_2/kernel", "fc_2/kernel_mask"]
    assert nodes["fc_1"].op == "Dense"
    shape = nodes["fc_1/kernel_mask"].attr["_output_shapes"].list.shape[0]
    assert [dim.size for dim in shape.dim] == [64, 300]


@pytest.mark.once
def test_the_graph_of_a_branching_model():
    x = keras.Input((4,), name="x")
    left = keras.layers.Dense(3, name="left")(x)
    right = keras.layers.Dense(3, name="right")(x)
    model = ml.convert_to_masked(keras.Model(x, keras.layers.Add(name="sum")([left, right])))
    nodes = {node.name.rpartition("/")[2]: node for node in layer_graph(model).node}
    assert [name.rpartition("/")[2] for name in nodes["sum"].input] == ["left", "right"]


def test_rates_of_zero_are_noticed():
    for rates, nothing in (
        ({"rate": 0.0}, True),
        ({"final_sparsity": 0.0}, True),
        ({"rate": 0.0, "output_rate": 0.1}, False),
        ({"rate": ("0", "fc_1=0.1")}, False),
        ({"structure": "2:4"}, False),
        ({}, False),
    ):
        assert _prunes_nothing(RunConfig(**rates).resolve(100)) == nothing, rates


def test_the_bar_counts_no_round_beyond_the_last():
    config = RunConfig(rounds=1, controls=()).resolve(100)
    display = _Progress(config, Console(quiet=True))
    said = []
    for number, arm in enumerate(("dense", "ticket")):
        display.show(made_up_runs.row(number, arm, 0, 0.9, 0.5))
        said.append(display._bar.tasks[0].description)
    assert said == ["seed 0, round 1 of 1", "seed 0"]
