"""The command `lottery-ticket export --format torch`."""

import importlib.util
import json

import keras
import pytest

import masked_layers as ml
from lottery_ticket_pruner import cli

pytestmark = pytest.mark.once


@pytest.fixture
def saved(tmp_path):
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(6), keras.layers.Dense(2)])
    model = ml.convert_to_masked(model)
    masks = ml.get_masks(model)
    masks["dense/kernel"][:, :4] = False
    ml.set_masks(model, masks)
    model.save(tmp_path / "ticket.keras")
    return tmp_path / "ticket.keras"


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="requires PyTorch")
def test_a_file_and_its_report_are_written(saved, tmp_path, capsys):
    out = tmp_path / "model.pt"
    command = ["export", str(saved), str(out), "--format", "torch", "--threads", "1"]
    assert cli.main(command) == 0
    assert "dense/kernel:matmul" in capsys.readouterr().out
    first = out.read_bytes()
    assert json.loads(out.with_name("model.pt.json").read_bytes())["threads"] == 1
    assert cli.main(command) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == first


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "torch", "--level", "9", "--values", "float16"], "--values, --level cannot"),
        (["--batch-size", "8"], "--batch-size cannot be used with --format saved_model"),
    ],
)
def test_options_of_the_other_format_are_refused(options, message, saved, tmp_path, capsys):
    assert cli.main(["export", str(saved), str(tmp_path / "out"), *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()
