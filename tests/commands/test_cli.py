"""The command: its help, its errors, and its message if the extra is not installed."""

import importlib.util
import json
import sys

import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import datasets
from lottery_ticket_pruner.experiments import run as run_module

pytestmark = pytest.mark.once


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["run", "--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for part in (
        "Without options",
        "--data NAME",
        ", ".join(datasets.NAMES),
        "module:function or path/to/file.py:function",
        "--data-dir PATH",
        "large_final, small_final",
        "--final-sparsity FLOAT",
        "(default: 0 1 2)",
    ):
        assert part in text
    assert "None}" not in text


def test_the_command_lists_its_subcommands(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    words = capsys.readouterr().out.split()
    assert {"run", "sweep", "report", "export", "inspect"} <= set(words)


def test_a_run_from_the_command_line(tmp_path, capsys):
    options = {"rounds": 1, "steps": 4, "seeds": 3, "final-sparsity": 0.9, "out": tmp_path}
    arguments = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    assert cli.main(["run", *arguments, "--controls"]) == 0
    printed = capsys.readouterr().out
    assert "10.00%" in printed
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["seeds"], stored["controls"], stored["final_sparsity"]) == ([3], [], 0.9)
    assert len((tmp_path / "results.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rate", "2"], "--rate must be in [0, 1)"),
        (["--final-sparsity", "95"], "Received: 95.0. For 95 %, give 0.95."),
        (["--strategy", "biggest"], "large_final"),
        (["--steps", "3", "--epochs", "2"], "not both"),
    ],
)
def test_wrong_options_are_explained_without_a_traceback(arguments, message, capsys):
    assert cli.main(["run", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_missing_data_is_explained_without_a_traceback(tmp_path, capsys, monkeypatch):
    import keras

    def fail():
        raise OSError("no network here")

    monkeypatch.setattr(keras.datasets.mnist, "load_data", fail)
    assert cli.main(["run", "--data", "mnist", "--data-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "train-images-idx3-ubyte.gz" in error
    assert "Traceback" not in error


def test_a_folder_that_cannot_be_written_is_explained_without_a_traceback(tmp_path, capsys):
    taken = tmp_path / "taken"
    taken.write_text("a file")
    assert cli.main(["run", "--steps", "4", "--out", str(taken)]) == 2
    error = capsys.readouterr().err
    assert str(taken) in error
    assert "Traceback" not in error


def test_a_missing_extra_is_named(capsys, monkeypatch):
    find_spec = importlib.util.find_spec

    def without(name, *arguments):
        return None if name in ("tyro", "sklearn") else find_spec(name, *arguments)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert cli.main(["run"]) == 2
    error = capsys.readouterr().err
    assert "sklearn, tyro" in error
    assert 'pip install "lottery-ticket-pruner[cli]"' in error


def test_an_interruption_while_modules_are_imported_ends_quietly(capsys, monkeypatch):
    class Slow:
        @staticmethod
        def find_spec(name, *_):
            if name == "lottery_ticket_pruner.commands.repeat":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "lottery_ticket_pruner.commands.repeat", raising=False)
    monkeypatch.setattr(sys, "meta_path", [Slow, *sys.meta_path])
    assert cli.main(["repeat", "nowhere"]) == 130
    assert "Interrupted" in capsys.readouterr().err


def test_an_interrupted_run_ends_quietly(capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_module, "run", interrupt)
    monkeypatch.setattr(sys, "argv", ["lottery-ticket", "run"])
    assert cli.main() == 130
    assert "Interrupted" in capsys.readouterr().err
