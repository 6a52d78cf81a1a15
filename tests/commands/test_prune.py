"""The command `prune`: models and data of users, its folder, resuming, and messages."""

import csv
import hashlib
import io
import json
import types
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner import Latency, cli
from lottery_ticket_pruner.commands import prune, prune_again, served_latency
from lottery_ticket_pruner.experiments import own
from lottery_ticket_pruner.experiments.reports import pruning
from lottery_ticket_pruner.fingerprints import of_json

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

def wide():
    model = keras.Sequential([keras.Input((5, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile(loss="mse")
    return model

def square():
    model = keras.Sequential([keras.Input((2, 2)), keras.layers.Flatten(), keras.layers.Dense(2)])
    model.compile(loss="mse")
    return model

def flat():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(10)])
    model.compile(loss="mse")
    return model

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
    few = "examples is worth"
    with pytest.warns(UserWarning, match=few):
        assert run("own.py:make", "--max-drop", "0.03", "--out", "out") == 0
    printed = capsys.readouterr().out
    assert few not in printed  # It is a note of the result, too, but was said before.
    assert few in (here / "out" / "result.json").read_text()
    assert "The model was not trained. It was trained for 6 epochs first." in printed
    assert "Served: " in printed
    names = {path.name for path in (here / "out").iterdir()}
    assert names == {
        *("SHA256SUMS", "config.json", "model.keras", "model_card.md", "report.html"),
        *("result.json", "results.csv", "search", "sensitivity.csv", "served"),
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
        assert "milliseconds per call as served, batch 1" in text
        assert f"{float(rows[1]['sparsity']):.2%}" in text
        assert "Zeros save bytes where they are exported sparsely (served/1), but no time" in text
        assert text.index(few) < text.index("Dense and pruned")  # Next to the conclusion.
        assert text.count(few) == 1
    assert "How much each kernel may lose alone" in page
    assert '<span class="whole">--latency</span>' in page  # It does not break after a dash.

    # The report is written again from the stored results.
    for name in ("report.html", "model_card.md"):
        (here / "out" / name).unlink()
    assert cli.main(["report", "out", "--quiet"]) == 0
    assert (here / "out" / "report.html").read_text() == page
    assert (here / "out" / "model_card.md").read_text() == card
    lines = (here / "out" / "SHA256SUMS").read_text().splitlines()
    files = {path for path in (here / "out").rglob("*") if path.is_file()}
    unsigned = {here / "out" / "SHA256SUMS", *(here / "out" / "search").iterdir()}
    assert sorted(lines) == sorted(
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(here / 'out')}"
        for path in files - unsigned
    )

    # No changed number gets into a report, and no other kind of content causes other errors.
    def of_other_kinds(stored):
        stored["findings"]["rows"] = [{"sparsity": {}}]
        del stored["checksum"]
        return stored | {"checksum": of_json(stored)}

    stored = (here / "out" / "result.json").read_text()
    written = json.loads(stored)
    for wrong in (
        stored.replace('"accepted": true', '"accepted": false', 1),
        stored.replace('"checksum"', '"checksun"'),
        json.dumps(of_other_kinds(written)),
        '{"findings": ' + "[" * 100_000,
    ):
        (here / "out" / "result.json").write_text(wrong)
        assert cli.main(["report", "."]) == 2
        assert "result.json' is missing or damaged" in capsys.readouterr().err
    (here / "out" / "result.json").write_text(stored)
    options = (here / "out" / "config.json").read_text()
    (here / "out" / "config.json").write_text(options.replace("0.03", "0.02"))
    assert cli.main(["report", "out"]) == 2
    assert "config.json' does not have the checksum" in capsys.readouterr().err

    # A mistake beside --overwrite costs nothing.
    state = (here / "out" / "search" / "state.json").read_text()
    assert run("own.py:make", "--metric", "auc", "--out", "out", "--overwrite") == 2
    assert (here / "out" / "search" / "state.json").read_text() == state
    # The same command shows the results again, without another training. If TensorFlow cannot write
    # the model, everything else is there, and nothing else is claimed.
    before = (here / "out" / "results.csv").read_text()
    (here / "out" / "model.keras").unlink()
    with monkeypatch.context() as patched:
        patched.setattr(prune.served_latency.ml, "export_sparse_saved_model", _fail)
        assert run("own.py:make", "--max-drop", "0.03", "--out", "out") == 0
    assert (here / "out" / "results.csv").read_text() == before
    printed = capsys.readouterr().out
    assert "No SavedModel: KeyError: 'no kernel'" in printed
    assert "is not this model, but from an earlier search" in printed
    for name in ("model_card.md", "SHA256SUMS"):
        assert "served/1" not in (here / "out" / name).read_text()
    assert (here / "out" / "model.keras").is_file()
    # Other options are refused, unless the earlier search is discarded.
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 2
    error = capsys.readouterr().err
    assert "There: --max-drop 0.03, --sparsity None. Here: --max-drop None, --sparsity 0.5" in error
    assert "pass --overwrite to start over" in error
    assert cli.main(["inspect", "out"]) == cli.main(["export", "out", "file"]) == 2
    assert capsys.readouterr().err.count(f" Its models: {Path('out', 'model.keras')}.\n") == 2
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out", "--overwrite") == 0
    assert float(rows_of(here / "out")[-1]["sparsity"]) == 0.5


def _fail(model, path):
    raise KeyError("no kernel")


def test_a_served_folder_that_cannot_be_timed_is_that_of_this_model(tmp_path):
    written = served_latency.Served((1, 2), None)
    dense = types.SimpleNamespace(compare=lambda *_: written, timed=lambda *_: _fail(None, None))
    result, parts = types.SimpleNamespace(model=None), types.SimpleNamespace(test=(None, None))
    said = io.StringIO()
    assert prune._export(result, dense, tmp_path, Console(file=said), parts) is written
    assert said.getvalue() == "The served models were not timed: KeyError: 'no kernel'\n"


def test_only_lost_values_of_an_optimizer_are_warned_of(here, monkeypatch):
    model = own.value_of("own.py:make", "make a model with", lambda model: model)
    config = prune.PruneConfig(model="new.keras")
    model.save(config.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prune.load(config).optimizer.built

    def three_of(optimizer, store):
        for number in range(3):
            store[str(number)] = optimizer.variables[number].numpy()

    model.optimizer.build(model.trainable_variables)
    monkeypatch.setattr(keras.optimizers.Adam, "save_own_variables", three_of)
    model.save(config.model)
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        prune.load(config)


def test_a_file_of_a_model_is_pruned(here, capsys, monkeypatch):
    trained = own.value_of("own.py:make", "make a model with", lambda model: model)
    x, y = own.value_of("own.py:load", "load data with", lambda data: data)[0]
    trained.fit(x, y, epochs=5, verbose=0)
    trained.save(here / "mine.keras")
    trained.save(here / "mine.h5")
    stored = prune.load(prune.PruneConfig(model="mine.h5"))
    for weights, expected in zip(stored.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, expected)
    monkeypatch.setattr(prune.served_latency.ml, "export_sparse_saved_model", _fail)
    assert run("mine.keras", "--method", "one_shot", "--sparsity", "0.5", "--quiet") == 0
    (folder,) = (here / "runs").iterdir()
    assert folder.name.startswith("prune-mine.keras-own.py-load-")
    model = keras.models.load_model(folder / "model.keras")
    assert ml.sparsity_report(model).sparsity == 0.5
    dense, pruned = (one.predict_on_batch(x).argmax(-1) for one in (trained, model))
    assert (dense == pruned).mean() > 0.9
    capsys.readouterr()
    assert cli.main(["repeat", str(folder), "--out", "again"]) == 0
    assert "models were tried, with the same results." in capsys.readouterr().out
    assert rows_of(here / "again")[1]["validation"] == rows_of(folder)[1]["validation"]
    found, _ = prune_again.prune_folder.read(folder)
    monkeypatch.setattr(prune_again, "prune", lambda *_: found)
    assert cli.main(["repeat", str(folder), "--out", "again"]) == 0
    assert "The search in again is finished. Use --overwrite" in capsys.readouterr().out


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_no_file_is_replaced_that_a_search_did_not_write(here, capsys, overwrite):
    own.value_of("own.py:make", "make a model with", lambda model: model).save(here / "model.keras")
    (here / "of_mine").mkdir()
    (here / "of_mine" / "results.csv").write_text("mine")
    before = {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()}
    for out, reason in (
        (".", "would replace 'model.keras', from which it is made"),
        ("of_mine", "'of_mine' holds no search of `lottery-ticket prune`, but results.csv"),
    ):
        assert run("model.keras", "--out", out, *overwrite) == 2
        said = capsys.readouterr()
        assert reason in said.err
        assert said.err.count("\n") == 1
        assert not said.out
    assert {path: path.read_bytes() for path in here.rglob("*.*") if path.is_file()} == before


def test_targets_that_are_text_are_refused(here, capsys):
    (here / "text.py").write_text(SOURCE.replace('.astype("int32")', '.astype("U5")'))
    assert cli.main(["prune", "own.py:make", "--data", "text.py:load"]) == 2
    assert (
        "Targets must be numbers. Received: text, such as 'False'. Number"
        in capsys.readouterr().err
    )


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
    assert message.count("\n") == 1


def test_a_step_that_was_not_possible_says_why(capsys):
    row = {"step": 3, "method": "channels", "sparsity": 0.5, "validation": None, "drop": None}
    row |= {"elapsed": 65.0, "remaining": 0.0}
    with prune._Display(Console(width=200), Path("out")) as display:
        for share in (0.5, 0.4):
            note = f"The budget {share} cannot be met. Pass larger shares. Or none."
            display.show(row | {"accepted": False, "note": note})
    printed = capsys.readouterr().out
    assert "The budget 0.5 cannot be met. Pass larger shares. Or none.\n" in printed
    assert "The budget 0.4 cannot be met.\n" in printed  # What to do was said.
    assert " 1:05 " in printed
    assert "too much" not in printed


def test_exports_after_the_time_are_said_in_the_files_too(here, capsys):
    run("own.py:make", "--minutes", "1e-6", "--sparsity", "0.5", "--log", "tensorboard")
    (folder,) = (here / "runs").iterdir()
    assert list((folder / "logs").iterdir())
    for content in (
        capsys.readouterr().out,
        (folder / "model_card.md").read_text(),
        (folder / "report.html").read_text(),
    ):
        assert " minutes, more than --minutes 1e-06." in content
        assert "Missed: --sparsity 0.5 (0.00% pruned)." in content


def test_an_interrupted_command_says_how_to_go_on(here, capsys, monkeypatch):
    monkeypatch.setattr(prune._Display, "show", _interrupt)
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 130
    message = capsys.readouterr().err
    assert "What is done so far is in out." in message
    assert "To resume, repeat: lottery-ticket prune own.py:make --sparsity 0.5" in message
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(prune.served_latency.ml, "export_sparse_saved_model", _fail)
    assert run("own.py:make", "--sparsity", "0.5", "--out", "out") == 0
    assert [row["method"] for row in rows_of(here / "out")] == ["dense", "iterative"]


def _interrupt(self, row):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.keras"], "There is no file 'nothing.keras'."),
        (["model.pb"], "Expected as MODEL a .keras or .h5 file"),
        (["trained.kears"], "Received: 'trained.kears'. Did you mean 'trained.keras'?"),
        (["traned.keras"], "There is no file 'traned.keras'. Did you mean 'trained.keras'?"),
        (["own.py:one"], "own.py:one: Expected a Keras model. Received: int."),
        (["ticket.safetensors"], "A ticket file contains no loss: name a function"),
        (["own.py:plain"], "own.py:plain: The model is not compiled"),
        (
            ["own.py:wide"],
            "takes inputs of shape (5, 1), but those of --data own.py:load have (4,).",
        ),
        (["own.py:broken"], "own.py:broken raised KeyError: 'colour'"),
        (["own.py:nothing"], "has no function 'nothing' to make a model with. It has: load, make"),
        (["absent.py:make"], "There is no file 'absent.py' to make a model with."),
        ([], "Name a MODEL for your own data"),
        (["own.py:make", "--size", "big"], "--size expects bytes"),
        (["own.py:make", "--latency", "3"], "For milliseconds, give 3ms."),
        (["own.py:make", "--latency", "fast"], "--latency expects a time, such as 3ms"),
        (["own.py:make", "--latency", "3ms", "--method", "gradual"], "A goal of --latency needs"),
        (
            ["own.py:make", "--macs", "0.5", "--method", "iterative"],
            "--macs needs --method channels. Received: --method iterative.",
        ),
        (["own.py:make", "--metric", "auc"], "--metric must be one of ['loss', 'accuracy']"),
        (["own.py:make", "--metric", "auc", "--log", "tensorboard"], "--metric must be one of"),
        (["own.py:make", "--size", "1kB", "--log", "tensorboard"], "No sparsity makes the served"),
        (["own.py:make", "--metric", "loss"], "--max-drop is missing"),
    ],
)
def test_mistakes_get_one_line_and_leave_no_folder(here, capsys, arguments, message):
    (here / "trained.keras").write_text("")
    assert run(*arguments) == 2
    printed, refused = capsys.readouterr()
    assert message.lower() in refused.lower()
    assert not printed
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("name", "remedy"), [("make", "Name your own data: --data"), ("flat", "Reshape them in a ")]
)
def test_the_default_data_are_named_if_they_do_not_fit(here, capsys, name, remedy):
    assert cli.main(["prune", f"own.py:{name}"]) == 2
    text = f"those of --data digits (the default) have (8, 8, 1). {remedy}"
    assert text in capsys.readouterr().err
    if name == "make":
        other = "(4,). Return others from own.py:load, or name another model."
        for own, text in (("wide", other), ("square", "(4,). Reshape them in own.py:load.")):
            assert cli.main(["prune", f"own.py:{own}", "--data", "own.py:load"]) == 2
            assert text in capsys.readouterr().err


def test_a_function_makes_the_same_model_each_time(here):
    (here / "drawn.py").write_text(SOURCE.replace("keras.utils.set_random_seed(0)", "pass"))
    config = prune.PruneConfig(model="drawn.py:make")
    np.testing.assert_array_equal(*(prune.load(config).get_weights()[0] for _ in range(2)))


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


@pytest.mark.parametrize(
    ("text", "latency"),
    [
        ("3ms", Latency(milliseconds=3.0)),
        ("1.5 s", Latency(milliseconds=1500.0)),
        ("250us", Latency(milliseconds=0.25)),
        ("0.5", 0.5),
    ],
)
def test_latencies(text, latency):
    assert prune.latency_of(text) == latency


@pytest.mark.parametrize("text", ["", "ms", "-3ms", "0ms", "3 hours", "nan"])
def test_other_texts_are_not_latencies(text):
    with pytest.raises(ValueError, match="--latency expects a time"):
        prune.latency_of(text)


def test_rows_of_two_searches_are_compared():
    rows = [
        {"method": "dense", "sparsity": 0.0, "validation": 0.9, "seconds": 1.0},
        {"method": "iterative", "sparsity": 0.5, "validation": 0.88, "seconds": 1.0},
    ]
    later = [rows[0] | {"seconds": 2.0}, rows[1] | {"validation": 0.87}, rows[1]]
    assert prune_again.differences(rows, rows) == []
    assert prune_again.differences(rows, later) == [
        ("1", "iterative 0.5 0.88", "iterative 0.5 0.87"),
        ("2", "-", "iterative 0.5 0.88"),
    ]


@pytest.mark.parametrize(("tolerance", "lines"), [(None, 0), (0.0, 1), (0.01, 1)])
def test_the_curve_has_a_line_for_the_least_that_is_accepted(tolerance, lines):
    def row(method, sparsity, validation):
        return {
            "method": method,
            "sparsity": sparsity,
            "validation": validation,
            "accepted": True,
            "note": "",
        }

    result = types.SimpleNamespace(
        rows=[row("dense", 0.0, 0.9), row("magnitude", 0.5, 0.9)],
        tolerance=tolerance,
        higher_is_better=True,
        test=types.SimpleNamespace(metric="accuracy"),
    )
    (axes,) = pruning.curve(result).axes
    dashed = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert len(dashed) == lines
    assert [float(line.get_ydata()[0]) for line in dashed] == [0.9 - (tolerance or 0)] * lines
    (handle,), _ = axes.get_legend_handles_labels()
    assert handle.get_marker() == "o"  # As the points.


def test_only_zeros_are_said_to_save_no_time():
    facts = types.SimpleNamespace(dense_sizes={"a": 4}, kept_sizes={"a": 2}, served=None)
    dense = {"method": "dense", "accepted": True}
    tries = ("magnitude", True, True), ("channels", True, False), ("channels", False, True)
    for method, accepted, said in tries:
        row = {"method": method, "accepted": accepted}
        result = types.SimpleNamespace(rows=[dense, row])
        assert bool(pruning.use_of_zeros(result, facts)) == said
    facts.kept_sizes = facts.dense_sizes  # Nothing was pruned.
    assert not pruning.use_of_zeros(types.SimpleNamespace(rows=[]), facts)


def test_a_kernel_may_lose_what_no_smaller_share_contradicts():
    scan = [
        {"path": path, "density": density, "drop": drop}
        for path, drops in (("a", (0.0, 0.02, 0.0)), ("b", (0.5, 0.0, 0.0)), ("c", (0, 0, 0.01)))
        for density, drop in zip((0.5, 0.25, 0.125), drops, strict=True)
    ]
    assert pruning.may_lose(scan, 0.01, dense=0.9) == {"a": 0.5, "b": 0.0, "c": 0.875}
