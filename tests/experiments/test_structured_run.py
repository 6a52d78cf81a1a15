"""Runs with a structure: the column of channels, the ticket, the report and the sweep."""

import json
import shutil

import keras
import pandas as pd
import pytest

pytest.importorskip("tyro")
pytest.importorskip("tensorboard")

import masked_layers as ml
from lottery_ticket_pruner.cli import main
from lottery_ticket_pruner.experiments import results

pytestmark = pytest.mark.once
SHORT = ["--rounds", "1", "--steps", "4", "--seeds", "0", "--controls", "random_mask"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "channels"
    options = ["--structure", "channels", "--rate", "0.5", "--out", str(out)]
    assert main(["run", *SHORT, *options]) == 0
    return out


def test_the_results_say_what_share_of_channels_is_left(folder):
    rows = results.read_rows(folder / "results.csv")
    assert [row["channels"] for row in rows] == [1.0, 0.5, 0.5]
    left = (150 * 64 + 150 * 50 + 50 * 10) / 50_200
    assert rows[-1]["sparsity"] == pytest.approx(1 - left, abs=1e-5)
    assert json.loads((folder / "config.json").read_text())["structure"] == "channels"


def test_the_ticket_becomes_a_smaller_network(folder):
    smaller = ml.shrink(ml.load_ticket(folder / "ticket.safetensors"))
    units = [layer.units for layer in smaller.layers if isinstance(layer, keras.layers.Dense)]
    assert units == [150, 50, 10]


def test_reports_show_channels_only_where_they_were_pruned(folder, tmp_path):
    plain = tmp_path / "plain"  # As written before there were structures.
    shutil.copytree(folder, plain)
    (plain / "SHA256SUMS").unlink()
    config = json.loads((plain / "config.json").read_text())
    del config["structure"]
    (plain / "config.json").write_text(json.dumps(config))
    pd.read_csv(plain / "results.csv").drop(columns="channels").to_csv(
        plain / "results.csv", index=False
    )
    assert main(["report", str(plain), "--out", str(tmp_path / "one")]) == 0
    assert "channels" not in (tmp_path / "one" / "tables.md").read_text()
    assert main(["report", str(plain), str(folder), "--out", str(tmp_path / "two")]) == 0
    text = (tmp_path / "two" / "tables.md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines()]
    # The line of the overview: seeds, weights, channels.
    assert any(line[:4] == ["channels", "1", "35.06%", "50.00%"] for line in lines), text
