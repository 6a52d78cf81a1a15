"""The command `prune`: models and data of users, its folder, resuming, and messages."""

import csv
import json

import keras
import pytest

pytest.importorskip("tyro")

from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import prune
from lottery_ticket_pruner.compression import PruneResult
from lottery_ticket_pruner.experiments import own

pytestmark = pytest.mark.once

SOURCE = """
import keras
import numpy as np

def load():
    x = np.random.default_rng(0).normal(size=(900, 4)).astype("float32")
    y = (x[:, 0] + x[:, 1] > 0).astype("int32")
    return (x[:600], y[:600]), (x[600:], y[600:])

def make():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(16, "relu"),
                              keras.layers.Dense(2, "softmax")])
    model.compile(keras.optimizers.Adam(0.03), "sparse_categorical_crossentropy",
                  metrics=["accuracy"], jit_compile=False)
    return model

def one():
    return 1

def plain():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])

def broken():
    raise KeyError("colour")
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(SOURCE)
    return tmp_path


def run(*arguments):
    return cli.main(["prune", *arguments, "--data", "own.py:load", "--epochs", "2"])


def rows_of(folder):
    with (folder / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_model_and_data_of_a_user_become_a_folder(here, capsys, monkeypatch):
    assert run("own.py:make", "--max-drop", "0.03", "--out", "out") == 0
    printed = capsys.readouterr().out
    assert "The model was not trained. It was trained for 6 epochs first." in printed
    assert "Served: " in printed
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {
        *("config.json", "model.keras", "model_card.md", "report.html", "results.csv", "search"),
        "served",
    }
    rows = rows_of(here / "out")
    accepted = [float(row["sparsity"]) for row in rows if row["accepted"] == "True"]
    model = keras.models.load_model(here / "out" / "model.keras")
    assert ml.sparsity_report(model).sparsity == pytest.approx(max(accepted))
    options = json.loads((here / "out" / "config.json").read_text())
    assert (options["command"], options["model"], options["max_drop"]) == (
        "prune",
        "own.py:make",
        0.03,
    )
    page = (here / "out" / "report.html").read_text()
    card = (here / "out" / "model_card.md").read_text()
    for text in (page, card):
        assert "dense_1/kernel" in text
        assert "Dense and pruned" in text
        assert f"{float(rows[1]['sparsity']):.2%}" in text

    # The same command shows the results again, without another training.
    before = (here / "out" / "results.csv").read_text()
    assert run("own.py:make", "--max-drop", "0.03", "--out", "out") == 0
    assert (here / "out" / "results.csv").read_text() == before
    # A mistake beside --overwrite costs nothing.
    state = (here / "out" / "search" / "state.json").read_text()
    assert run("own.py:make", "--metric", "auc", "--out", "out", "--overwrite") == 2
    assert (here / "out" / "search" / "state.json").read_text() == state
    # If TensorFlow cannot write the model, everything else is there, and nothing else is claimed.
    (here / "out" / "model.keras").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(PruneResult, "export", _fail)
        assert run("own.py:make", "--max-drop", "0.03", "--out", "out") == 0
    printed = capsys.readouterr().out
    assert "No SavedModel: KeyError: 'no kernel'" in printed
    assert "is not this model, but from an earlier search" in printed
    assert "served/1" not in (here / "out" / "model_card.md").read_text()
    assert (here / "out" / "model.keras").is_file()
    # Other options are refused, unless the earlier search is discarded.
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 2
    assert "holds another search" in capsys.readouterr().err
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out", "--overwrite") == 0
    assert float(rows_of(here / "out")[-1]["sparsity"]) == 0.5


def _fail(self, path):
    raise KeyError("no kernel")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_a_file_of_a_model_is_pruned(here, suffix):
    trained = own.value_of("own.py:make", "make a model with", lambda model: model)
    x, y = own.value_of("own.py:load", "load data with", lambda data: data)[0]
    trained.fit(x, y, epochs=5, verbose=0)
    trained.save(here / f"mine.{suffix}")
    assert run(f"mine.{suffix}", "--method", "one_shot", "--sparsity", "0.5", "--quiet") == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith(f"prune-mine.{suffix}-own.py-load-")
    model = keras.models.load_model(folder / "model.keras")
    assert ml.sparsity_report(model).sparsity == 0.5
    dense, pruned = (one.predict(x, verbose=0).argmax(-1) for one in (trained, model))
    assert (dense == pruned).mean() > 0.9


def test_a_file_with_a_class_that_is_not_known_asks_for_a_function(here, capsys):
    class Own(keras.layers.Dense):
        pass

    model = keras.Sequential([keras.Input((4,)), Own(2)])
    model.compile("sgd", "mse")
    model.save(here / "mine.keras")
    assert run("mine.keras") == 2
    message = capsys.readouterr().err
    assert "Could not locate class 'Own'" in message
    assert "name a function that loads it: file.py:function" in message


def test_a_step_that_was_not_possible_says_why(capsys):
    row = {"step": 3, "method": "channels", "sparsity": 0.5, "validation": None, "drop": None}
    with prune._Display(Console(width=200)) as display:
        display.show(row | {"accepted": False, "note": "The budget cannot be met."})
    printed = capsys.readouterr().out
    assert "The budget cannot be met." in printed
    assert "too much" not in printed


def test_an_interrupted_command_says_how_to_go_on(here, capsys, monkeypatch):
    monkeypatch.setattr(prune._Display, "show", _interrupt)
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 130
    message = capsys.readouterr().err
    assert "What is done so far is in out." in message
    assert "To resume, repeat: lottery-ticket prune own.py:make --sparsity 0.5" in message
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 0
    assert [row["method"] for row in rows_of(here / "out")] == ["dense", "iterative"]


def _interrupt(self, row):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.keras"], "There is no file 'nothing.keras'."),
        (["model.pb"], "Expected as MODEL a .keras or .h5 file"),
        (["own.py:one"], "own.py:one: Expected a Keras model. Received: int."),
        (["own.py:plain"], "is not compiled"),
        (["own.py:broken"], "own.py:broken raised KeyError: 'colour'"),
        (["own.py:nothing"], "has no function 'nothing' to make a model with. It has: load, make"),
        (["absent.py:make"], "There is no file 'absent.py' to make a model with."),
        ([], "Name a MODEL for your own data"),
        (["own.py:make", "--size", "big"], "--size expects bytes"),
        (["own.py:make", "--macs", "0.5", "--method", "iterative"], "A goal of --macs needs"),
        (["own.py:make", "--metric", "auc"], "--metric must be one of ['loss', 'accuracy']"),
        (["own.py:make", "--metric", "loss"], "--max-drop is missing"),
    ],
)
def test_mistakes_get_one_line_and_leave_no_folder(here, capsys, arguments, message):
    assert run(*arguments) == 2
    assert message.lower() in capsys.readouterr().err.lower()
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("text", "size"),
    [("500kB", 500_000), ("2MB", 2_000_000), ("1.5 MiB", 1_572_864), ("12,345", 12_345)],
)
def test_sizes(text, size):
    assert prune.bytes_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "5 apples", "1.2.3MB", "-5", "1,5MB", "9" * 400])
def test_other_texts_are_not_sizes(text):
    with pytest.raises(ValueError, match="--size expects bytes"):
        prune.bytes_of(text)
