"""Configurations are restored from the files of runs, and only from these."""

import dataclasses
import json

import pytest

import own_data
from lottery_ticket_pruner import cli, criteria
from lottery_ticket_pruner.commands.repeat import RepeatConfig
from lottery_ticket_pruner.experiments import own
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.identifiers import code_of
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("command", "config"),
    [
        ("run", RunConfig()),
        (
            "run",
            RunConfig(network="resnet-20", data="cifar10", final_sparsity=0.9, deterministic=True),
        ),
        ("run", RunConfig(structure="channels", final_sparsity=0.5)),
        ("run", RunConfig(structure="2:4")),
        ("supermask", SupermaskConfig(dwr=(True,), criteria=("random",))),
        ("supermask", SupermaskConfig(learn="bernoulli", epochs=3)),
        ("instability", InstabilityConfig(rewind_to=("0", "2ep"), seeds=(4,))),
    ],
)
def test_a_resolved_configuration_is_restored_and_makes_the_same_choices(tmp_path, command, config):
    config = config.resolve(600)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    again = RepeatConfig(tmp_path, out=tmp_path / "x").configuration()
    assert again.resolve(600).name == config.name
    assert again.out == tmp_path / "x"
    default = RepeatConfig(tmp_path / "config.json").configuration()
    assert default.out == tmp_path.with_name(f"{tmp_path.name}-again")
    if isinstance(config, RunConfig) and config.network == "lenet-300-100":
        old = json.loads((tmp_path / "config.json").read_text()) | {"conv_rate": 0.18}
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert RepeatConfig(tmp_path).configuration().resolve(600).name == config.name
    # Written before these options existed, by a version that did or did not store its number.
    stored = json.loads((tmp_path / "config.json").read_text())
    later = ("deterministic", "quiet", "pruned", "samples", "optimizer")
    older = {name: value for name, value in stored.items() if name not in later}
    for facts in ({}, {"command": command, "finished": True, "versions": {"keras": "3.13"}}):
        (tmp_path / "config.json").write_text(json.dumps(older | facts))
        expected = dataclasses.replace(config, deterministic=False)
        assert RepeatConfig(tmp_path).configuration().resolve(600).name == expected.name
    (tmp_path / "config.json").write_text(json.dumps(stored))
    child = tmp_path / "sweep" / "child"
    child.mkdir(parents=True)
    (tmp_path / "config.json").rename(child / "config.json")
    (child.parent / "sweep.json").touch()
    assert RepeatConfig(child).configuration().out == tmp_path / "child-again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "is not the configuration of a run"),
        ("{", "is not the configuration of a run"),
        (json.dumps(RunConfig().to_dict() | {"colour": "red"}), "unknown options: colour."),
        (None, "is not a run folder: it holds no config.json."),
    ],
)
def test_other_files_are_refused_without_a_traceback(tmp_path, text, message, capsys):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert cli.main(["repeat", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_criteria_that_the_module_of_the_data_registers_are_found(tmp_path, monkeypatch):
    source = (
        "from lottery_ticket_pruner import criteria\n\n"
        '@criteria.register("of_my_data", needs="final")\n'
        "def of_my_data(group):\n    return {}group.final\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
    (tmp_path / "own.py").write_text(own_data.SOURCE + source.format(""))
    with monkeypatch.context() as patch:  # Another process.
        patch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
        patch.setattr(own, "_LOADED", {})
        own.import_module_of("own.py:load")
        config = RunConfig(data="own.py:load", strategy="of_my_data").resolve(60)
        stored = config.to_dict() | {"code": code_of(config.to_dict())}
        assert stored["code"]
    (tmp_path / "config.json").write_text(json.dumps(stored))
    assert RepeatConfig(tmp_path).configuration().strategy == "of_my_data"
    (tmp_path / "own.py").write_text(own_data.SOURCE + source.format("-"))
    with pytest.raises(ValueError, match="uses functions with other code"):
        RepeatConfig(tmp_path).configuration()
