"""`lottery-ticket supermask`: untrained grids and learned masks, from the options to the files."""

import dataclasses
import io
import json
import os

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import pandas as pd
from rich.console import Console

import masked_layers as ml
from _lottery_ticket import parser
from _lottery_ticket.names import RECORDED
from lottery_ticket_pruner import cli, criteria, training
from lottery_ticket_pruner.experiments import datasets, networks, supermask
from lottery_ticket_pruner.experiments.run_folder import restored
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig
from lottery_ticket_pruner.experiments.workbench import load_and_resolve
from lottery_ticket_pruner.training import CropAndFlip

UNTRAINED = SupermaskConfig(
    criteria=("large_final", "random"), sparsities=(0.5, 0.9), dwr=(False,), steps=40, seeds=(3, 4)
)


@pytest.mark.once
def test_what_is_left_open_is_chosen():
    config = SupermaskConfig().resolve(1000)
    assert config.criteria == RECORDED
    assert (config.network, config.steps, config.batch_size) == ("lenet-300-100", 600, 60)
    assert len(config.sparsities) == 11
    learned = SupermaskConfig(learn="bernoulli").resolve(1000)
    assert (learned.steps, learned.batch_size, learned.sparsities) == (20_000, 250, ())
    assert SupermaskConfig(learn="edge_popup", epochs=3).resolve(1000).steps == 12
    assert SupermaskConfig(learn="edge_popup").resolve(1000).sparsities == (0.5,)
    for chosen in (config, learned, SupermaskConfig(learn="edge_popup", epochs=3).resolve(1000)):
        assert chosen.resolve(1000) == chosen  # Its file is enough to repeat the run.
    names = {config.name, learned.name, dataclasses.replace(config, dwr=(True,)).name}
    assert len(names) == 3
    assert dataclasses.replace(config, quiet=True).name == config.name


@pytest.mark.once
def test_a_criterion_that_is_added_can_be_chosen_and_changes_no_default(monkeypatch):
    monkeypatch.setattr(criteria, "_REGISTRY", criteria._REGISTRY.copy())
    criteria.register("my_score", needs="final")(lambda group: group.final)
    assert SupermaskConfig().resolve(1000).criteria == RECORDED
    stored = SupermaskConfig(learn="edge_popup").resolve(1000).to_dict()
    again = restored(SupermaskConfig, stored).resolve(1000)
    assert again.to_dict() == stored
    options = parser.parse(["supermask", "--criteria", "my_score", "random"])
    assert SupermaskConfig(**vars(options)).resolve(1000).criteria == ("my_score", "random")


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learn": "bernoulli", "sparsities": (0.5,)}, "learns its sparsity"),
        ({"learn": "bernoulli", "learning_rate": 0.1}, "no effect with --learn"),
        ({"learn": "edge_popup", "criteria": ("random",)}, "no effect with --learn"),
        ({"samples": 3}, "--samples has no effect without --learn"),
        ({"criteria": ("random", "random")}, "--criteria each value once. Received: random random"),
        ({"sparsities": (0.5, 0.50)}, "--sparsities each value once. Received: 0.5 0.5"),
        ({"weights": ("initial", "initial")}, "--weights each value once"),
        ({"learn": "bernoulli", "dwr": (True, True)}, "--dwr each value once. Received: True True"),
        ({"sparsities": (1.0,)}, r"must be in \[0, 1\)"),
        ({"criteria": ()}, "at least one value for --criteria"),
        ({"samples": 0}, "--samples must be positive"),
        ({"learn": "bernoulli", "steps": 0}, "--steps must be positive. Received: 0"),
        ({"learn": "bernoulli", "batch_size": 0}, "--batch-size must be positive. Received: 0"),
        ({"seeds": (1, 1)}, "--seeds each value once"),
        ({"steps": 1, "epochs": 1}, "--steps or --epochs"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SupermaskConfig(**options).resolve(100)


@pytest.mark.once
def test_untrained_masks(tmp_path, monkeypatch):
    config, data = load_and_resolve(dataclasses.replace(UNTRAINED, out=tmp_path / "run"))
    console = Console(file=io.StringIO(), width=100)
    folder = supermask.run(config, data, console)
    rows = pd.read_csv(folder / "results.csv")
    assert len(rows) == 2 * 2 * 2 * 2
    assert rows["replicate"].value_counts().tolist() == [8, 8]
    best = rows[rows["criterion"] == "large_final"]["test_accuracy"].max()
    assert best > rows[rows["criterion"] == "random"]["test_accuracy"].max()
    assert (rows["dense_accuracy"] > best).all()
    pictures = {file.name for file in folder.glob("*.png")}
    assert pictures == {"heat-map.png", "curves-1.png", "curves-2.png"}
    printed = " ".join(console.file.getvalue().split())
    assert f"trained, all weights: {100 * rows['dense_accuracy'].mean():.2f} ± " in printed
    large = rows[(rows["criterion"] == "large_final") & (rows["weights"] == "initial")]
    means = large.groupby("sparsity")["test_accuracy"].mean()
    assert f"{100 * means.max():.2f} ± " in printed

    # Masks finished before the interruption are not trained again; figures are drawn again.
    seeds, train, stop_at = [], training.train_by_plan, 4

    def counted(model, examples, plan, *args, **kwargs):
        if plan.seed == stop_at:
            raise KeyboardInterrupt
        seeds.append(plan.seed)
        return train(model, examples, plan, *args, **kwargs)

    monkeypatch.setattr(training, "train_by_plan", counted)
    config = dataclasses.replace(config, out=tmp_path / "again")
    with pytest.raises(KeyboardInterrupt):
        supermask.run(config, data, Console(quiet=True))
    folder = config.out
    (folder / "curves-9.png").touch()
    # Other data under the same options is a different run.
    other = dataclasses.replace(data, x_train=data.x_train[:, ::-1])
    with pytest.raises(ValueError, match="an interrupted run of the same options with another"):
        supermask.run(config, other, Console(quiet=True))
    stop_at = None
    supermask.run(config, data, Console(quiet=True))
    assert seeds == [3, 4]
    assert {file.name for file in folder.glob("*.png")} == pictures
    again = pd.read_csv(folder / "results.csv")
    pd.testing.assert_frame_equal(again, rows, rtol=1e-3)

    # A finished run is not changed, and shows its results.
    console = Console(file=io.StringIO(), width=100)
    supermask.run(config, data, console)
    assert seeds == [3, 4]
    assert "is finished and stays as it is" in " ".join(console.file.getvalue().split())
    assert f"{100 * means.max():.2f} ± " in console.file.getvalue()


@pytest.mark.once
def test_rows_that_were_cut_are_made_again(tmp_path, monkeypatch):
    config, data = load_and_resolve(dataclasses.replace(UNTRAINED, steps=2, out=tmp_path))
    train, seeds, fail_at = training.train_by_plan, [], 4

    def counted(model, examples, plan, *args, **kwargs):
        if plan.seed == fail_at:
            raise InterruptedError
        seeds.append(plan.seed)
        return train(model, examples, plan, *args, **kwargs)

    monkeypatch.setattr(training, "train_by_plan", counted)
    with pytest.raises(InterruptedError):
        supermask.run(config, data, Console(quiet=True))
    file = tmp_path / "results.csv"
    whole = file.read_bytes()
    assert whole.endswith(b"\n")
    # A digit of a finished seed that was changed is not taken over.
    place = whole.rindex(b".") + 2
    file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    with pytest.raises(ml.FileContentError, match=r"a line without a checksum in \.tables\.json"):
        supermask.run(config, data, Console(quiet=True))
    # Cut before the end of the last line, which looks whole, and after the previous line.
    for cut in (whole[:-1], whole[: whole[:-1].rindex(b"\n") + 1]):
        file.write_bytes(cut)
        with pytest.raises(InterruptedError):
            supermask.run(config, data, Console(quiet=True))
        numbers = [pd.read_csv(io.BytesIO(one)).drop(columns="replicate")
                   for one in (whole, file.read_bytes())]  # fmt: skip
        pd.testing.assert_frame_equal(*numbers, rtol=1e-3)
    assert seeds == [3] * 3


@pytest.mark.once
@pytest.mark.parametrize("learn", [None, "edge_popup"])
def test_training_images_are_augmented_as_the_network_has_it(tmp_path, monkeypatch, learn):
    augmentation, seen = CropAndFlip(1), []

    def train(model, examples, plan, *args, **kwargs):
        seen.extend([examples.augment, plan.augment])
        raise InterruptedError

    monkeypatch.setattr(networks, "augmentation", {"lenet-300-100": augmentation}.get)
    monkeypatch.setattr(training, "train_by_plan", train)
    config = SupermaskConfig(learn=learn, steps=1, seeds=(0,), out=tmp_path)
    with pytest.raises(InterruptedError):
        supermask.run(*load_and_resolve(config), Console(quiet=True))
    assert seen == [augmentation] * 2


@pytest.mark.once
@pytest.mark.parametrize("command", ["supermask", "instability"])
def test_help_says_what_resnet_20_takes(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    chosen = SupermaskConfig(network="resnet-20", steps=9).resolve(1000)
    assert f"{chosen.batch_size} for resnet-20" in text
    scope = f"Default: layer, or {chosen.scope} for resnet-20."
    assert (scope in text) == (command == "supermask")


@pytest.mark.once
def test_the_file_of_the_options_is_replaced_as_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "train_by_plan", lambda *args, **kwargs: 1 / 0)
    for steps in (1, 2):
        config = SupermaskConfig(steps=steps, seeds=(0,), out=tmp_path / "run")
        with pytest.raises(ZeroDivisionError):
            supermask.run(*load_and_resolve(config), Console(quiet=True))
        os.link(config.out / "config.json", tmp_path / f"{steps}.json")
    stored = [json.loads((tmp_path / f"{steps}.json").read_text())["steps"] for steps in (1, 2)]
    assert stored == [1, 2]


@pytest.mark.parametrize("kind", ["bernoulli", pytest.param("edge_popup", marks=pytest.mark.once)])
def test_learned_masks(tmp_path, kind, monkeypatch):
    evaluate, sparsities = training.evaluate, []

    def watched(model, *args):
        masks = np.concatenate([mask.ravel() for mask in ml.get_masks(model).values()])
        sparsities.append(np.mean(~masks))
        return evaluate(model, *args)

    monkeypatch.setattr(training, "evaluate", watched)
    arguments = {"learn": kind, "steps": 30, "seeds": 0, "samples": 3, "out": tmp_path}
    words = [text for key, value in arguments.items() for text in (f"--{key}", str(value))]
    words += ["--weights", "signed_constant", "--dwr", "True", "--quiet"]
    assert cli.main(["supermask", *words]) == 0
    (row,) = pd.read_csv(tmp_path / "results.csv").to_dict("records")
    hardened, *sampled = sparsities
    assert row["deterministic_sparsity"] == pytest.approx(hardened)
    assert row["sparsity"] == pytest.approx(np.mean(sampled or hardened))
    assert len(sampled) == (3 if kind == "bernoulli" else 0)
    assert json.loads((tmp_path / "config.json").read_text())["learn"] == kind
    (file,) = tmp_path.glob("supermask-signed_constant-rescaled*-0.safetensors")
    found = ml.load_ticket(file)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    found.compile(loss=loss, metrics=["accuracy"])
    data = datasets.load("digits")
    accuracy = training.evaluate(found, data.x_test, data.y_test)["accuracy"]
    assert accuracy == pytest.approx(row["deterministic_accuracy"], abs=1e-6)
    assert ml.sparsity_report(found).sparsity == pytest.approx(row["deterministic_sparsity"])
    assert row["test_accuracy"] > 0.15
    assert (row["accuracy_of_samples_deviation"] > 0) == (kind == "bernoulli")
