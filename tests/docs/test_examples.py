"""The examples run unchanged, on the embedded data."""

import csv
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("sklearn")

from lottery_ticket_pruner import criteria, find_ticket
from lottery_ticket_pruner.experiments import datasets

pytestmark = pytest.mark.once

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def rounds_of(file, number):
    """Checks the rows of so many rounds, each of which halves the weights."""
    with Path(file).open() as lines:
        rows = list(csv.DictReader(lines))
    stages = ["untrained", "dense", *["untrained-pruned", "trained-pruned"] * number]
    assert [row["stage"] for row in rows] == stages
    sparsities = [0, 0, *np.repeat(1 - 0.5 ** np.arange(1, number + 1), 2)]
    assert [float(row["sparsity"]) for row in rows] == pytest.approx(sparsities, abs=1e-4)
    accuracies = [float(row["accuracy"]) for row in rows]
    assert accuracies[1] > 0.8
    assert accuracies[3] > 0.7
    return stages


def test_example_rescales_and_takes_criteria_that_look_at_the_model(capsys, monkeypatch):
    example = load("example")
    monkeypatch.setattr(example, "ROUNDS", 2)
    example.main(["--quick", "--dwr", "--prune_strategy", "saliency"])
    stages = rounds_of("results_digits_saliency_dwr.csv", 2)
    printed = capsys.readouterr().out
    averages = printed[printed.index("Averages over 1 iterations") :]
    assert [line.split()[0] for line in averages.splitlines()[1:7]] == stages


def test_lenet_mnist(capsys):
    pytest.importorskip("tensorboard")
    load("lenet_mnist").main(["--quick", "--prune_pc", "0.5", "--logs", "logs"])
    printed = capsys.readouterr().out
    rounds = re.findall(r"round (\d): +([\d.]+)% pruned, .*accuracy ([\d.]+)", printed)
    # Half of 49 200 hidden and a quarter of 1 000 output weights are pruned, twice.
    assert [(number, share) for number, share, _ in rounds] == [
        ("0", "0.00"), ("1", "49.50"), ("2", "74.38"),
    ]  # fmt: skip
    assert float(rounds[0][2]) > 0.6
    assert "fc_1/kernel" in printed
    assert list(Path("logs").glob("events.out.tfevents.*"))


@pytest.mark.slow
def test_transfer_learning_example(capsys, monkeypatch):
    example = load("transfer_learning_example")
    monkeypatch.setattr(example, "SPARSITIES", (0.5, 0.95))
    example.main(["--quick"])
    printed = capsys.readouterr().out
    shares = re.findall(r"([\d.]+)% of the base pruned", printed)
    assert shares == ["0.0", "50.0", "95.0"] * 2
    accuracies = [float(text) for text in re.findall(r"accuracy ([\d.]+)", printed)]
    assert min(accuracies[0], accuracies[1]) > 0.8
    rows = [f"| {share:.0f}% | {100 * one:.2f} | {100 * other:.2f} |" for share, one, other in
            zip(map(float, shares[:3]), accuracies[:3], accuracies[3:], strict=True)]  # fmt: skip
    assert "\n".join(rows) in printed
    model = keras.models.load_model("transferred.keras")
    assert "Masked" not in model.to_json()
    kernels = [w for layer in model.layers[:-1] for w in layer.get_weights() if w.ndim > 1]
    zeros = sum(int((w == 0).sum()) for w in kernels) / sum(w.size for w in kernels)
    assert zeros == pytest.approx(0.95, abs=1e-3)
    data = datasets.load("digits")
    new = data.y_test >= 5
    outputs = model.predict(data.x_test[new], verbose=0)
    accuracy = np.mean(outputs.argmax(-1) == data.y_test[new] - 5)
    assert accuracy == pytest.approx(accuracies[2], abs=1e-4)

    seeds = [{"a": dict.fromkeys((0.0, *example.SPARSITIES), share)} for share in (0.5, 0.7)]
    assert "| 95% | 60.00 ± 14.14 |" in example.table(seeds)


def test_example_refuses_an_unknown_strategy_before_it_trains(capsys):
    with pytest.raises(SystemExit) as caught:
        load("example").main(["--quick", "--prune_strategy", "biggest"])
    assert caught.value.code == 2
    assert "large_final" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_example_sh_runs_the_matrix(tmp_path):
    """Uses a stand-in for Python that writes down its arguments."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nshift\necho "$@" >> calls\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python)}
    command = ["sh", str(EXAMPLES / "example.sh"), "--data-dir", "DIR"]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    pattern = r"--which_set (\w+) --prune_strategy (\w+) --data-dir DIR"
    pairs = [re.fullmatch(pattern, call).groups() for call in calls]
    assert len(set(pairs)) == len(pairs) == 33
    from lottery_ticket_pruner import criteria

    assert {strategy for _, strategy in pairs} <= set(criteria.names())
    assert {name for name, _ in pairs} <= set(datasets.NAMES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("sh") is None, reason="needs a POSIX shell")
def test_example_sh_quick(tmp_path):
    path = os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": path}
    environment["STRATEGIES"] = "large_final"
    command = ["sh", str(EXAMPLES / "example.sh"), "--quick"]
    done = subprocess.run(
        command, check=True, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert "== digits, large_final" in done.stdout
    rounds_of(tmp_path / "results_digits_large_final.csv", 4)


def test_a_search_with_optuna_is_resumed_from_its_file(capsys, monkeypatch):
    pytest.importorskip("optuna")
    example = load("optuna_search")
    losses = iter((0.5, 0.25))

    def stand_in(*args, **options):
        called = inspect.signature(find_ticket).bind(*args, **options).arguments
        assert called["strategy"] in criteria.names()
        row = {"validation_loss": next(losses), "test_accuracy": called["rounds"] / 4}
        return types.SimpleNamespace(rows=[row])

    monkeypatch.setattr(example, "find_ticket", stand_in)
    assert len(example.main(["--trials", "1"]).trials) == 1
    study = example.main(["--trials", "2"])
    assert [trial.value for trial in study.trials] == [0.5, 0.25]
    assert study.trials[0].params != study.trials[1].params
    printed = capsys.readouterr().out.splitlines()
    assert printed[-2].startswith("2 trials; the best: strategy ")
    accuracy = study.best_params["rounds"] / 4
    assert printed[-1] == f"validation loss 0.2500, test accuracy {accuracy:.2%}"
    example.main(["--trials", "2"])  # Nothing is left to do.
