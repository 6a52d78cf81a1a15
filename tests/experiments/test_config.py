"""Configurations: recipes fill in what is left open, and invalid options are refused."""

import dataclasses
import math
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.experiments.config import RunConfig, parse_steps

pytestmark = pytest.mark.once


def test_the_default_run_goes_down_to_two_percent():
    config = RunConfig().resolve(1318)
    assert config.network == "lenet-300-100"
    assert len(config.seeds) == 3
    assert config.rounds == 9
    assert config.amount == {"rate": {"^output/": 0.18, "default": 0.36}}
    left = (19_200 + 30_000) * 0.64**9 + 1_000 * 0.82**9
    assert left / 50_200 == pytest.approx(0.021, abs=0.0005)


@pytest.mark.parametrize(
    ("data", "network", "expected"),
    [
        ("mnist", None, ("lenet-300-100", 1.2e-3, 50_000, None)),
        ("cifar10", None, ("conv-2", 2e-4, 20_000, 0.1)),
        ("cifar10", "conv-4", ("conv-4", 3e-4, 25_000, 0.1)),
        ("cifar10", "conv-6", ("conv-6", 3e-4, 30_000, 0.15)),
    ],
)
def test_recipes_of_the_paper(data, network, expected):
    config = RunConfig(data=data, network=network).resolve(45_000)
    name, learning_rate, steps, conv_rate = expected
    assert (config.network, config.learning_rate, config.steps) == (name, learning_rate, steps)
    assert config.batch_size == 60
    rates = config.amount["rate"]
    assert rates["default"] == 0.2
    assert rates["^output/"] == 0.1
    assert rates.get("^conv_") == pytest.approx(conv_rate)


def test_the_recipe_of_the_residual_network():
    config = RunConfig(data="cifar10", network="resnet-20").resolve(45_000)
    chosen = (config.optimizer, config.learning_rate, config.batch_size, config.steps, config.scope)
    assert chosen == ("sgd", 0.1, 128, 72_000, "global")
    assert config.amount == {"rate": 0.2}
    layer = RunConfig(data="cifar10", network="resnet-20", output_rate=0.1).resolve(45_000)
    assert layer.scope == "layer"
    assert layer.amount == {"rate": {"^output/": 0.1, "default": 0.2, "^conv_": 0.1}}


def test_given_options_override_the_recipe():
    given = {"steps": 7, "rounds": 2, "rate": 0.5, "output_rate": 0.4, "batch_size": 10}
    config = RunConfig(learning_rate=0.1, eval_every=3, **given).resolve(100)
    assert {name: getattr(config, name) for name in given} == given
    assert (config.learning_rate, config.eval_every) == (0.1, 3)


def test_epochs_and_rewinding_points_become_steps():
    config = RunConfig(epochs=3, batch_size=20, rewind_to="2ep").resolve(101)
    assert (config.steps, config.epochs, config.rewind_to) == (18, None, "12it")
    assert parse_steps("0", 10) == 0
    assert parse_steps("500it", 10) == 500
    assert parse_steps("2ep", 10) == 20


def test_a_global_scope_has_one_rate():
    for config in (RunConfig(scope="global"), RunConfig(strategy="smallest_weights_global")):
        resolved = config.resolve(100)
        assert resolved.scope == "global"
        assert resolved.amount == {"rate": 0.36}
    assert RunConfig(final_sparsity=0.9).resolve(100).amount == {"sparsity": 0.9}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "epochs": 1}, "--steps or --epochs"),
        ({"rounds": 0}, "--rounds must be positive. Received: 0"),
        ({"rate": 1.0}, r"--rate must be in \[0, 1\). Received: 1.0"),
        ({"final_sparsity": 0.9, "output_rate": 0.1}, "--final-sparsity or --output-rate"),
        ({"scope": "global", "output_rate": 0.1}, "--output-rate: scope global ranks layers"),
        ({"conv_rate": 0.1}, "--conv-rate: lenet-300-100 has no convolutions"),
        ({"strategy": "largest"}, "large_final"),
        ({"seeds": ()}, "at least one seed"),
        ({"seeds": (0, 1, 0)}, "--seeds each value once.*Received: 0 1 0"),
        ({"controls": ("random_mask",) * 2}, "--controls each value once.*Received: random_mask r"),
        ({"control_rounds": (1, 1)}, "--control-rounds each value once.*Received: 1 1"),
        ({"seeds": (0, -1)}, r"Received: \(0, -1\)"),
        ({"learning_rate": math.nan}, "--learning-rate must be positive. Received: nan"),
        ({"strategy": "smallest_weights_global", "scope": "layer"}, "only by scope global. Leave"),
        ({"steps": 5, "rewind_to": "5"}, "--rewind-to 5 is not before the end"),
        ({"rewind_to": "5s"}, "500it"),
        ({"network": "vgg"}, "lenet-300-100"),
        ({"network": "run/ticket.safetensors"}, "is a ticket, which has its masks and weights"),
        ({"data": "svhn"}, "fashion_mnist"),
        ({"rounds": 2, "control_rounds": (3,)}, "counts from 1 to --rounds"),
        ({"control_rounds": (10,)}, r"counts from 1 to --rounds, 9\. Received: \(10,\)"),
        ({"control_rounds": (1,), "controls": ()}, "--control-rounds needs --controls"),
        ({"structure": "chanels"}, "--structure: .*channels"),
        ({"structure": "5:4"}, "1 <= N < M"),
        ({"structure": "2:4", "rate": 0.2}, "--structure 2:4 sets the sparsity.*Leave out --rate"),
        ({"structure": "filters", "scope": "global"}, "may prune the outputs of the network"),
        ({"structure": "channels", "output_rate": 0.1}, "--output-rate: .*are never pruned"),
        ({"structure": "filters", "strategy": "wanda"}, "contradicts"),
        ({"kept": "reinit", "retraining": "fine_tuning"}, "fine_tuning.*Received: kept='reinit'"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RunConfig(**options).resolve(100)


@pytest.mark.parametrize(
    ("options", "scope", "amount"),
    [
        ({"structure": "channels"}, "layer", {"rate": {"default": 0.36}}),
        ({"structure": "channels", "scope": "global"}, "global", {"rate": 0.36}),
        ({"structure": "channels", "final_sparsity": 0.5}, "layer", {"sparsity": 0.5}),
        ({"structure": "filters"}, "layer", {"rate": {"^output/": 0.0, "default": 0.36}}),
        (
            {"structure": "units", "final_sparsity": 0.5},
            "layer",
            {"sparsity": {"^output/": 0.0, "default": 0.5}},
        ),
        ({"structure": "4x1"}, "layer", {"rate": {"^output/": 0.18, "default": 0.36}}),
        ({"structure": "2:4"}, None, {}),
    ],
)
def test_amounts_of_structures_never_prune_classes(options, scope, amount):
    config = RunConfig(**options).resolve(1318)
    assert (config.scope, config.amount) == (scope, amount)
    assert config.resolve(1318) == config
    assert config.search_plan(0).pruning.amount(config.rounds) == amount
    assert config.rounds == (1 if options["structure"] == "2:4" else 9)
    resnet = RunConfig(data="cifar10", network="resnet-20", **options).resolve(45_000)
    wanted = "global" if options["structure"] in ("channels", "4x1") else scope
    assert resnet.scope == wanted


def test_runs_without_a_structure_keep_the_names_and_files_they_had():
    config = RunConfig().resolve(1318)
    assert "structure" not in config.to_dict()
    assert config.name == "digits-lenet-300-100-large_final-6dfe5efd"
    channels = RunConfig(structure="channels").resolve(1318)
    assert channels.to_dict()["structure"] == "channels"
    assert channels.name.startswith("digits-lenet-300-100-large_final-channels-")
    assert (
        RunConfig(structure="2:4")
        .resolve(1318)
        .name.startswith("digits-lenet-300-100-large_final-2of4-")
    )


def test_a_run_is_named_after_its_choices_not_after_places():
    config = RunConfig().resolve(1318)
    assert config.name.startswith("digits-lenet-300-100-large_final-")
    assert config.folder == Path("runs") / config.name
    elsewhere = dataclasses.replace(config, out=Path("x"), data_dir=Path("y"), quiet=True)
    assert elsewhere.name == config.name
    assert elsewhere.folder == Path("x")
    assert dataclasses.replace(config, steps=5).name != config.name
    written_out = RunConfig(rounds=9, rate=0.36, network="lenet-300-100").resolve(1318)
    assert written_out.name == config.name


def test_custom_data_has_a_folder_and_the_recipe_of_the_default_network():
    for data, label in (("../code/cifar10.py:load", "cifar10.py-load"), ("a.b:load", "a.b-load")):
        config = RunConfig(data=data).resolve(600)
        assert (config.network, config.steps) == ("lenet-300-100", 50_000)
        assert config.folder.parent == Path("runs")
        assert config.name.startswith(f"{label}-lenet-300-100-large_final-")
        assert config.to_dict()["data"] == data
