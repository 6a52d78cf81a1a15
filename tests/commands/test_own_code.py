"""Runs with networks and criteria of the user: finished, resumed, repeated and swept."""

import json

import pytest

import own_data

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands.repeat import RepeatConfig
from lottery_ticket_pruner.commands.sweep import SweepConfig, plan, sweep
from lottery_ticket_pruner.experiments import workbench

pytestmark = pytest.mark.once

SOURCE = (
    own_data.SOURCE
    + """
import keras

def net():
    return keras.Sequential([keras.Input((4,)), keras.layers.Dense(4, name="only")])

def magnitude(group):
    return np.abs(group.final)

def broken(group):
    return {}["weights"]
"""
)


def test_a_run_of_a_sweep_knows_its_code(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # Networks that do not fit have their own tests.
    monkeypatch.setattr(workbench.own_networks, "check", lambda *_: None)
    (tmp_path / "mine.py").write_text(SOURCE)
    config = SweepConfig(
        data="mine.py:load",
        network="mine.py:net",
        over=("strategy=mine.py:magnitude",),
        rate=("0.25", "only=0.5"),
        **{"rounds": 1, "steps": 2, "controls": (), "seeds": (0,), "quiet": True},
    )
    (child,) = plan(config)
    # What the process of this run would do.
    assert cli.main(child.arguments) == 0
    stored = json.loads((child.folder / "config.json").read_text())
    names = [part.split()[0] for part in stored["code"].split(", ")]
    assert (names, stored["strategy"]) == (["magnitude", "network"], "mine.py:magnitude")
    assert sweep(config) == []
    again = RepeatConfig(child.folder).configuration()
    assert (again.network, again.rate) == ("mine.py:net", ("0.25", "only=0.5"))
    capsys.readouterr()
    for old, new in (("np.abs(group.final)", "group.final"), ("Input((4,))", "Input(shape=(4,))")):
        (tmp_path / "mine.py").write_text(SOURCE.replace(old, new))
        assert cli.main(child.arguments) == 2
        assert "a finished run of the same options with another code" in capsys.readouterr().err
    assert cli.main(["repeat", str(child.folder)]) == 2
    assert "uses functions with other code" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"used other code: magnitude.*Delete it"):
        sweep(config)
    (tmp_path / "mine.py").write_text(SOURCE + "\n# Only a comment.\n")
    assert cli.main(child.arguments) == 0


def test_an_exception_of_a_criterion_is_a_message_with_its_place(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(SOURCE)
    arguments = ["--strategy", "mine.py:broken", "--rounds", "1", "--steps", "1", "--seeds", "0"]
    data = ["--data", "mine.py:load", "--network", "mine.py:net", "--controls", "--quiet"]
    assert cli.main(["run", *data, *arguments]) == 2
    error = capsys.readouterr().err
    line = SOURCE.splitlines().index('    return {}["weights"]') + 1
    place = f"mine.py', line {line}, in broken"
    assert error.startswith("lottery-ticket: mine.py:broken raised KeyError: 'weights' (")
    assert place in error.splitlines()[0]
