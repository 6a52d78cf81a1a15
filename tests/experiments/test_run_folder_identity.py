"""Run folders identify custom criteria and treatments by their code, not by their names."""

import json
import threading
import types

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import criteria, treatments
from lottery_ticket_pruner.commands.repeat import RepeatConfig
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.identifiers import code_of
from lottery_ticket_pruner.experiments.run_folder import RunFolder, restored

pytestmark = pytest.mark.once

DATA = types.SimpleNamespace(digest="0", x_train=range(1318))


@pytest.fixture(autouse=True)
def _own_registries(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
    monkeypatch.setattr(treatments, "_KEPT", treatments._KEPT.copy())


def register(k, lock=None):
    """Registers a criterion and a treatment whose code depends on a number, but not their names."""

    @criteria.register("mine", needs={"final"})
    def mine(group):
        return k * np.abs(group.final) if lock is None or lock else None

    @treatments.register_kept("mine")
    def mine_kept(kernel):
        return k * kernel.initial


def opened(folder, **options):
    """Opens a folder for a run, and returns whether an interrupted run is resumed."""
    config = RunConfig(out=folder, **options).resolve(1318)
    with RunFolder("run", config, DATA) as place:
        found = place.is_interrupted
        place.begin((), keep=("results.csv",))
        (folder / "results.csv").write_text("round,arm\n0,dense\n")
    return found


@pytest.mark.parametrize("option", ["strategy", "kept"])
def test_an_interrupted_run_is_resumed_only_with_the_same_code(tmp_path, option):
    register(1)
    assert not opened(tmp_path, **{option: "mine"})
    assert json.loads((tmp_path / "config.json").read_text())["code"].startswith("mine python3.")
    register(1)
    assert opened(tmp_path, **{option: "mine"})
    assert getattr(RepeatConfig(tmp_path).configuration(), option) == "mine"
    register(2)
    with pytest.raises(ValueError, match=r"interrupted run of the same options with another code"):
        opened(tmp_path, **{option: "mine"})
    with pytest.raises(ValueError, match="functions with other code"):
        RepeatConfig(tmp_path).configuration()


def test_runs_that_cannot_be_identified_are_not_resumed(tmp_path):
    register(1, threading.Lock())
    opened(tmp_path, strategy="mine")
    with pytest.raises(ValueError, match=r"as far as can be determined. mine cannot .*`lock`"):
        opened(tmp_path, strategy="mine")


def test_folders_with_built_in_criteria_keep_their_format(tmp_path):
    opened(tmp_path, strategy="movement", kept="constant")
    stored = json.loads((tmp_path / "config.json").read_text())
    assert "code" not in stored
    assert code_of(stored) == ""
    assert restored(RunConfig, stored | {"code": "x", "masks_digest": "y"}).strategy == "movement"
