"""`lottery-ticket instability`: which trainings start where, and what is written and kept."""

import dataclasses
import json
import os
import shutil

import keras
import numpy as np
import pandas as pd
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner import analyses, cli
from lottery_ticket_pruner.experiments import saved_tickets
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.reports import run_folders, ticket_masks, web_page
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig


@pytest.mark.once
def test_what_is_left_open_is_chosen():
    config = InstabilityConfig(steps=1000).resolve(600)
    assert config.rewind_to == ("0it", "10it", "20it", "50it", "100it", "200it", "500it")
    assert (config.network, config.batch_size, config.optimizer) == ("lenet-300-100", 60, "adam")
    asked = InstabilityConfig(epochs=4, rewind_to=("2ep", "0", "7it")).resolve(600)
    assert (asked.steps, asked.rewind_to) == (40, ("0it", "7it", "20it"))
    assert asked.work == 2 * 40 + (7 + 2 * 33) + (20 + 2 * 20)
    assert len({config.name, asked.name, dataclasses.replace(config, points=5).name}) == 3
    own = InstabilityConfig(data="../code/own.py:load").resolve(600)
    assert own.name.startswith("own.py-load-lenet-300-100-instability-")


@pytest.mark.once
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5, "rewind_to": ("5",)}, "--rewind-to 5 is not before the end"),
        ({"seeds": (2, 2)}, "--seeds each value once"),
        ({"points": 1}, "--points must be at least 2. Received: 1"),
        ({"round": 2}, "pass that option"),
        ({"rewind_to": ("soon",)}, "500it"),
        ({"steps": 1, "epochs": 1}, "--steps or --epochs"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        InstabilityConfig(**options).resolve(100)


@pytest.fixture
def measured(monkeypatch):
    """Records the states from which instabilities are measured, without training."""
    states = []

    def instability(model, x, y, *, steps, points, on_progress, **kwargs):
        values = {ref.path: np.array(ref.variable.numpy()) for ref in ml.masked_refs(model)}
        states.append((kwargs["seed"], steps, values, ml.get_masks(model)))
        on_progress(2 * steps)
        accuracy = np.linspace(0.9, 0.7, points)
        metrics = {"accuracy": accuracy, "loss": 1 - accuracy}
        return analyses.Interpolation(np.linspace(0, 1, points), metrics, "accuracy")

    monkeypatch.setattr(analyses, "instability", instability)
    return states


def command(**options):
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    return ["instability", *words, "--quiet"]


OF_TICKET = {"steps": 12, "seeds": 3, "batch-size": 50, "deterministic": ""}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """The folder of a run, with the ticket of the first seed as `.keras` file, too."""
    folder = tmp_path_factory.mktemp("run")
    options = OF_TICKET | {"seeds": "3 5", "rounds": 1, "rewind-to": "8it", "controls": ""}
    save = saved_tickets.save

    def save_all(model, path, name):
        save(model, path, name)
        model.save(path / f"{name}-raw.keras")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saved_tickets, "save", save_all)
        assert cli.main(["run", *command(**options, out=folder)[1:]]) == 0
    return folder


@pytest.fixture
def ticket(found, tmp_path):
    """A copy of that folder, to change."""
    return shutil.copytree(found, tmp_path / "ticket")


@pytest.mark.once
def test_the_masks_and_the_rewinding_point_are_those_of_a_run(tmp_path, ticket, measured, capsys):
    """Checks that pruned weights, which never train, are still those of the rewinding point."""
    options = OF_TICKET
    assert cli.main(command(**options, masks=ticket, out=tmp_path / "out")) == 0
    ((seed, steps, weights, masks),) = measured
    assert (seed, steps) == (3, 4)
    for ref in ml.masked_refs(keras.models.load_model(ticket / "ticket-raw.keras")):
        mask = ref.mask.value.numpy()
        np.testing.assert_array_equal(masks[ref.path], mask)
        assert 0 < mask.mean() < 1
        np.testing.assert_array_equal(weights[ref.path][~mask], ref.variable.numpy()[~mask])
    assert cli.main(command(**options, masks=ticket, round=0, out=tmp_path / "dense")) == 0
    assert all(mask.all() for mask in measured[1][3].values())
    stored = json.loads((ticket / "config.json").read_text())
    (ticket / "SHA256SUMS").unlink()  # So that it can be changed.
    for name, value in (
        ("pruned", "freeze"),
        ("kept", "reinit"),
        ("retraining", "fine_tuning"),
        ("retraining", "learning_rate_rewinding"),
    ):
        (ticket / "config.json").write_text(json.dumps(stored | {name: value}))
        assert cli.main(command(**options, masks=ticket)) == 2
        assert f"has {name} '{value}'" in capsys.readouterr().err
    (ticket / "config.json").write_text(json.dumps(stored))
    for wrong, message in (
        ({"batch-size": 60}, "has batch_size 50, not 60"),
        ({"seeds": "3 4"}, "no masks of round 1 for seed 4"),
        ({"round": 2}, "no masks of round 2 for seed 3"),
    ):
        assert cli.main(command(**(options | wrong), masks=ticket)) == 2
        assert message in capsys.readouterr().err


@pytest.mark.once
def test_the_whole_training_is_as_long_as_that_of_the_masks(ticket):
    config = InstabilityConfig(masks=ticket, batch_size=50, seeds=(3,))
    assert (config.resolve(600).steps, config.resolve(600).rewind_to) == (12, ("8it",))
    assert dataclasses.replace(config, epochs=2).resolve(600).steps == 24
    assert dataclasses.replace(config, steps=30).resolve(600).steps == 30


@pytest.mark.once
@pytest.mark.parametrize("config", [InstabilityConfig(steps=9), SupermaskConfig(steps=9)])
def test_masks_of_other_commands_are_refused(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config.resolve(600).to_dict()))
    (tmp_path / "results.csv").write_text("replicate,sparsity,test_accuracy\n0,0.5,0.5\n")
    with pytest.raises(ValueError, match=r"another command.*folder of `lottery-ticket run`"):
        InstabilityConfig(masks=tmp_path, steps=9).resolve(600)


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.once
def test_an_interrupted_run_is_resumed_only_under_the_same_masks(
    tmp_path, ticket, measured, monkeypatch, capsys
):
    options = OF_TICKET | {"masks": ticket, "rewind-to": 0, "out": tmp_path / "a"}
    options["seeds"] = "3 5"
    file = ticket / "rounds" / "1" / "masks-01.npz"
    measure, content = analyses.instability, file.read_bytes()

    def once(*args, **kwargs):
        return (measure if len(measured) in (0, 2) else interrupted)(*args, **kwargs)

    def meanwhile(*args, **kwargs):
        file.write_bytes(content)
        return measure(*args, **kwargs)

    other = options | {"out": tmp_path / "b"}
    for given, function, status in (
        (options, once, 130),
        (options, measure, 0),
        (other, once, 130),
    ):
        monkeypatch.setattr(analyses, "instability", function)
        assert cli.main(command(**given)) == status
    assert [seed for seed, *_ in measured] == [3, 5, 3]
    # Written again before the run resumes, and once more after it has begun.
    shutil.copy(file.with_name("masks-00.npz"), file)
    monkeypatch.setattr(analyses, "instability", meanwhile)
    capsys.readouterr()
    assert cli.main(command(**other)) == 2
    assert "an interrupted run of the same options with another masks_digest" in " ".join(
        capsys.readouterr().err.split()
    )
    assert cli.main([*command(**other), "--overwrite"]) == 0
    assert [seed for seed, *_ in measured] == [3, 5, 3, 3, 5]
    dense = [all(mask.all() for mask in masks.values()) for *_, masks in measured]
    assert dense == [False, False, False, False, True]
    assert len(pd.read_csv(tmp_path / "b" / "results.csv")) == 2


@pytest.mark.once
def test_the_file_of_the_options_is_replaced_as_a_whole(tmp_path, measured):
    options = {"steps": 9, "seeds": 0, "rewind-to": 0, "points": 3, "out": tmp_path / "a"}
    assert cli.main(command(**options)) == 0
    os.link(tmp_path / "a" / "config.json", tmp_path / "before")
    assert cli.main(command(**options | {"points": 4})) == 2
    assert cli.main([*command(**options | {"points": 4}), "--overwrite"]) == 0
    assert json.loads((tmp_path / "a" / "config.json").read_text())["points"] == 4
    assert json.loads((tmp_path / "before").read_text())["points"] == 3


@pytest.mark.once
def test_an_interrupted_run_is_resumed_and_reports_show_it(tmp_path, measured, monkeypatch):
    options = {"steps": 9, "seeds": "1 2 5", "rewind-to": 0, "points": 3, "out": tmp_path / "a"}
    assert cli.main(command(**options)) == 0
    assert [state[:2] for state in measured] == [(1, 9), (2, 9), (5, 9)]
    (kernel, *_), (other, *_) = (list(measured[i][2].values()) for i in (0, 1))
    assert (kernel != other).any()
    rows = pd.read_csv(tmp_path / "a" / "results.csv")
    assert rows["replicate"].tolist() == [0, 1, 2]
    # On the line from 0.9 to 0.7 the error rises from 10 to 30 % monotonically: 30 - 20.
    assert rows["instability"].tolist() == pytest.approx([0.1] * 3)
    assert rows["test_accuracy"].tolist() == pytest.approx([0.8] * 3)
    assert len(pd.read_csv(tmp_path / "a" / "lines.csv")) == 9

    measure = analyses.instability

    def twice(*args, **kwargs):
        return (measure if len(measured) < 5 else interrupted)(*args, **kwargs)

    monkeypatch.setattr(analyses, "instability", twice)
    first, options = options, options | {"out": tmp_path / "b"}
    assert cli.main(command(**options)) == 130
    assert len(pd.read_csv(tmp_path / "b" / "results.csv")) == 2
    # A line that is cut inside a number belongs to a row that is measured again.
    lines = tmp_path / "b" / "lines.csv"
    lines.write_bytes(lines.read_bytes()[:-3])
    monkeypatch.setattr(analyses, "instability", measure)
    assert cli.main(command(**options)) == 0
    assert [state[:2] for state in measured[3:]] == [(1, 9), (2, 9), (2, 9), (5, 9)]
    again = pd.read_csv(tmp_path / "b" / "results.csv")
    pd.testing.assert_frame_equal(again.drop(columns="seconds"), rows.drop(columns="seconds"))
    assert len(pd.read_csv(tmp_path / "b" / "lines.csv")) == 9
    assert json.loads((tmp_path / "b" / "config.json").read_text())["rewind_to"] == ["0it"]

    # A finished run is shown, and not measured again.
    count = len(measured)
    assert cli.main(command(**options)) == 0
    # Another configuration in the same folder starts from scratch, and is resumed where it was
    # interrupted. The earlier results stay until it is finished.
    monkeypatch.setattr(analyses, "instability", interrupted)
    other = [*command(**first | {"points": 4, "seeds": "1 2 5 6"}), "--overwrite"]
    assert cli.main(other) == 130
    assert len(pd.read_csv(tmp_path / "a" / "lines.csv")) == 9
    monkeypatch.setattr(analyses, "instability", measure)
    assert cli.main(other) == 0
    assert [state[0] for state in measured[count:]] == [1, 2, 5, 6]
    assert len(pd.read_csv(tmp_path / "a" / "lines.csv")) == 16

    text = web_page.render(
        ticket_masks.read_tickets(run_folders.groups_of(run_folders.find_runs([tmp_path])))
    )
    assert "10.00 ±\N{NO-BREAK SPACE}0.00" in text
    assert text.count("<svg") == 2  # Drawn again, for both configurations.
    assert "From none of the measured steps on do trainings stay connected" in text


def test_instability_for_real(tmp_path, capsys):
    arguments = command(steps=20, seeds=0, points=3, out=tmp_path, **{"rewind-to": "4it"})
    assert cli.main(arguments[:-1]) == 0
    (row,) = pd.read_csv(tmp_path / "results.csv").to_dict("records")
    assert 0.2 < row["test_accuracy"] < 1
    line = pd.read_csv(tmp_path / "lines.csv")
    assert row["instability"] == pytest.approx(
        line["accuracy"].iloc[[0, -1]].mean() - line["accuracy"].min()
    )
    assert line["loss"].iloc[0] != line["loss"].iloc[-1]
    assert f"{100 * row['instability']:.2f}" in capsys.readouterr().out
    assert (tmp_path / "instability.png").stat().st_size > 5000
