"""A seed whose training diverges does not affect the other seeds of its run."""

import numpy as np
import pandas as pd
import pytest

import masked_layers as ml
import own_data

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli, tickets

pytestmark = pytest.mark.once

RUN = (
    *("run", "--data", "own.py:load", "--steps", "4", "--rounds", "1", "--quiet"),
    "--controls",
)


def test_the_other_seeds_are_the_same_as_without_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(own_data.SOURCE)
    assert cli.main([*RUN, "--seeds", "8", "--out", "alone"]) == 0
    train = tickets.train_stretch

    def poisoned(model, examples, plan, stretch, *args):
        if plan.seed == 7 and stretch[0] == "ticket":
            kernel = ml.masked_refs(model)[0].variable
            kernel.assign(np.full(kernel.shape, np.nan))
        return train(model, examples, plan, stretch, *args)

    monkeypatch.setattr(tickets, "train_stretch", poisoned)
    command = [*RUN, "--seeds", "7", "8", "--out", "both"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "Seed 7: The training diverged in round 1 (ticket, seed 7), after " in error
    assert "or with --seeds without 7." in error
    assert error.count("\n") == 1
    rows = pd.read_csv("both/results.csv").drop(columns="seconds")
    assert list(rows["arm"]) == ["dense", "dense", "ticket"]
    alone = pd.read_csv("alone/results.csv").drop(columns="seconds").assign(replicate=1)
    pd.testing.assert_frame_equal(rows[rows["replicate"] == 1].reset_index(drop=True), alone)
