"""The command `compare`: what it reads, and its messages."""

import json

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.compression import comparing

pytestmark = pytest.mark.once

SOURCE = """
import keras
import numpy as np

def load():
    x = np.random.default_rng(0).normal(size=(90, 4)).astype("float32")
    return (x, x.argmax(-1)), (x[:50], x[:50].argmax(-1))

def make():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4)])

def wide():
    return keras.Sequential([keras.Input((9,)), keras.layers.Dense(4)])
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing, "_ROUNDS", (2, 2))
    (tmp_path / "mine.py").write_text(SOURCE)
    return tmp_path


def numbers(capsys):
    """Returns the cells of each line by the name of the model."""
    lines = capsys.readouterr().out.splitlines()
    return {line.split()[0]: line.split()[1:] for line in lines}


def test_files_and_folders_of_one_ticket_are_the_same_model(here, capsys, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, use_bias=False)])
    model.set_weights([np.eye(4, dtype="float32") + 0.25])
    masked = ml.convert_to_masked(model)
    ml.set_masks(masked, {path: np.eye(4, dtype=bool) for path in ml.get_masks(masked)})
    (here / "run").mkdir()
    ml.save_ticket(masked, here / "run" / "ticket.safetensors")
    masked.save(here / "run" / "model.keras")
    stored = ml.export_sparse_saved_model(masked, here / "run" / "served" / "1")
    config = {"command": "run", "data": "mine.py:load", "network": "lenet-300-100"}
    (here / "run" / "config.json").write_text(json.dumps(config))
    # Of the same ticket: an export of each model takes longest.
    monkeypatch.setattr(ml, "export_sparse_saved_model", lambda *_: stored)
    same = ["run", "run/ticket.safetensors", "run/served/1", "run/model.keras"]
    assert cli.main(["compare", *same, "mine.py:make", "--data", "mine.py:load"]) == 0
    found = numbers(capsys)
    for name in same:
        accuracy, *rest = found[name]
        assert accuracy == "100.00%"
        assert {"75.00%", "4"} <= set(rest)
    for name in ("run", "run/served/1"):
        assert f"{stored.disk_nbytes:,}" in found[name]
    for name in same[1:]:
        assert found[name][1:6] == ["0.00", *found[name][2:5], "100.00%"]
    assert found["mine.py:make"][0] != "100.00%"
    assert found["50"] == ["examples;", "differences", "in", "points"]
    graph = here / "run" / "served" / "1" / "saved_model.pb"
    graph.write_bytes(graph.read_bytes().replace(b"MatMul", b"MatMuL", 1))
    for name in ("run", "run/served/1"):  # TensorFlow does not load it.
        assert cli.main(["compare", name, "--data", "mine.py:load"]) == 2
        assert "saved_model.pb' does not have the checksum" in capsys.readouterr().err
    graph.write_bytes(graph.read_bytes().replace(b"MatMuL", b"MatMul", 1))
    (here / "run" / "config.json").write_text(json.dumps(config | {"command": "prune"}))
    assert cli.main(["compare", "run", "--json", "--data", "mine.py:load"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["metric"], document["examples"]) == ("accuracy", 50)
    (row,) = document["rows"]
    assert (row["model"], row["value"], row["sparsity"]) == ("run", 1.0, 0.75)


def test_a_page_shows_the_intervals_of_differences(here, capsys):
    for name, kernel in (("right", np.eye(4)), ("same", 2 * np.eye(4)), ("wrong", -np.eye(4))):
        model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, use_bias=False)])
        model.set_weights([kernel.astype("float32")])
        model.save(here / f"{name}.keras")
    named = ["right.keras", "same.keras", "wrong.keras"]
    assert cli.main(["compare", *named, "--data", "mine.py:load", "--page", "all.html"]) == 0
    assert "Page: all.html" in capsys.readouterr().out
    page = (here / "all.html").read_text()
    assert (
        "from right.keras is below zero for wrong.keras; on both sides of zero for same.keras."
    ) in page
    assert "<title>wrong.keras: -100.00 points (" in page
    assert "<td" in page
    assert page.count("<svg") == 1
    assert "http" not in page.replace("http://www.w3.org/", "")


def test_the_data_of_a_folder_is_used_as_there(here, capsys, monkeypatch):
    monkeypatch.setattr(ml, "export_sparse_saved_model", lambda *_: 1 / 0)
    source = SOURCE.replace("(x, x.argmax(-1)), (x[:50], x[:50].argmax(-1))", "pixels(x)")
    source += """
def pixels(x):
    x = (40 * (x - x.min())).astype("uint8")
    return (x, x[:, 0] > 127), (x[:50], x[:50, 0] > 127)
"""
    (here / "mine.py").write_text(source)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    # The first pixel divided by 255, as `run` does, is above one half.
    model.set_weights([np.float32([[0, 1], [0, 0], [0, 0], [0, 0]]), np.float32([0.5, 0])])
    for name, data in (("run", "mine.py:load"), ("other", "digits")):
        (here / name).mkdir()
        model.save(here / name / "ticket.keras")
        config = {"command": "run", "data": data, "network": "lenet-300-100"}
        (here / name / "config.json").write_text(json.dumps(config))
    for arguments in (["run"], ["run", "other"]):
        assert cli.main(["compare", *arguments, "--data", "mine.py:load"]) == 0
        printed = capsys.readouterr().out
        assert printed.splitlines()[1].split()[1] == "100.00%"
        note = "Some of these models were made with digits, but all are compared on mine.py:load."
        assert (note in printed) == ("other" in arguments)


def test_code_that_a_folder_names_is_only_executed_if_the_command_names_it(here, capsys):
    (here / "theirs").mkdir()
    (here / "theirs" / "evil.py").write_text("open('executed', 'w')")
    config = {"command": "run", "data": "theirs/evil.py:load", "network": "theirs/evil.py:make"}
    (here / "theirs" / "config.json").write_text(json.dumps(config))
    assert cli.main(["compare", "theirs"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "add --data theirs/evil.py:load if you want that" in line
    assert cli.main(["report", "theirs"]) == 2
    assert not (here / "executed").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mine.py:make"], "--data is missing: name a data set"),
        (["none.keras", "--data", "mine.py:load"], "There is no file or folder 'none.keras'"),
        (["empty", "--data", "mine.py:load"], "'empty' is neither a SavedModel folder nor one of"),
        (["mine.py", "--data", "mine.py:load"], "Expected a .keras, .h5 or .safetensors file"),
        (["mine.py:load", "--data", "mine.py:load"], "Expected a Keras model. Received: tuple"),
        (["mine.py:wide", "--data", "mine.py:load"], "'mine.py:wide' does not take the inputs"),
        (["mine.py:make", "--data", "mnst"], "Unknown data set 'mnst'. Did you mean 'mnist'"),
        (["mine.py:make", "--data", "digits", "--batch-size", "0"], "--batch-size must be"),
    ],
)
def test_mistakes_get_one_line(here, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(ml, "export_sparse_saved_model", lambda *_: 1 / 0)
    (here / "empty").mkdir()
    assert cli.main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
