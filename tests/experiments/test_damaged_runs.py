"""Damaged run folders: a ValueError that names them, or the readable part of them."""

import contextlib
import json
import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import run_folder, workbench
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.reports import contents, run_folders

pytestmark = pytest.mark.once

CONFIG = RunConfig(rounds=1, steps=20, seeds=(3, 4)).resolve(600)
ROWS = [
    "round,arm,replicate,sparsity,test_accuracy,test_loss,early_stop_step,seconds,validation_loss",
    "0,dense,0,0.0,0.91,0.4,20,1.5,0.5",
    "1,ticket,0,0.3,0.92,0.41,20,1.25,0.5",
    "0,dense,1,0.0,0.9,0.43,20,1.5,0.52",
    "1,ticket,1,0.3,0.93,0.42,20,1.5,0.55",
]


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    write(folder)
    return folder


def write(folder, config=None, rows=None):
    config = json.dumps(CONFIG.to_dict()).encode() if config is None else config
    rows = ("\n".join(ROWS) + "\n").encode() if rows is None else rows
    (folder / "config.json").write_bytes(config)
    (folder / "results.csv").write_bytes(rows)


def read(folder):
    """Returns everything that `report` says about a folder."""
    runs = run_folders.find_runs([folder])
    groups = run_folders.groups_of(runs)
    run_folders.tidy(runs)
    return [sheet.table() for sheet in contents.overviews(groups)]


@given(data=st.data(), name=st.sampled_from(["config", "rows"]))
@settings(max_examples=150)
def test_damage_is_named_or_leaves_numbers(tmp_path_factory, data, name):
    folder = tmp_path_factory.getbasetemp() / "damaged"
    folder.mkdir(exist_ok=True)
    write(folder)
    file = folder / {"config": "config.json", "rows": "results.csv"}[name]
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[position:]
    else:
        content[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # For means of nothing.
        for use in (read, lambda folder: InstabilityConfig(masks=folder, seeds=()).resolve(600)):
            with contextlib.suppress(ValueError):
                use(folder)


WRONG = [None, [], {}, "text", -1, 0.5, True, [None], ["3"]]


@pytest.mark.parametrize("option", ["seeds", "rounds", "steps", "rewind_to", "kept", "strategy"])
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_options_of_other_types_are_refused_or_shown(run, capsys, option, value):
    write(run, json.dumps(CONFIG.to_dict() | {option: value}).encode())
    try:
        read(run)
    except ValueError as error:
        assert str(run) in str(error)  # noqa: PT017
    assert cli.main(["instability", "--masks", str(run), "--quiet", "--seeds", "3"]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b"[]", "does not contain options"),
        (b"\xff\xfe", "cannot be read"),
        (b'{"seeds": "34"}', "holds no seeds"),
    ],
)
def test_damaged_configurations_are_named(run, config, message):
    write(run, config)
    with pytest.raises(ValueError, match=rf"{run.name}.*{message}"):
        run_folders.read_run(run)


@pytest.mark.parametrize("cell", ["", "nan", "inf", "-inf", "1e400", "one"])
def test_rows_of_no_replicate_are_refused(run, cell):
    rows = [*ROWS[:2], ROWS[2].replace("ticket,0", f"ticket,{cell}")]
    write(run, rows=("\n".join(rows) + "\n").encode())
    with pytest.raises(ValueError, match=r"results\.csv'.*replicate"):
        run_folders.read_run(run)


@pytest.mark.parametrize(
    "option", ["seeds", "rounds", "steps", "rewind_to", "rate", "quiet", "out"]
)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_repeat_refuses_options_of_other_types(run, capsys, monkeypatch, option, value):
    def prepared(config):
        config.resolve(600)
        raise ValueError("prepared")

    monkeypatch.setattr(workbench, "load_and_resolve", prepared)
    write(run, json.dumps(CONFIG.to_dict() | {option: value}).encode())
    assert cli.main(["repeat", str(run)]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    right = {"seeds": ([],), "rewind_to": ("text",), "steps": (None, -1), "rounds": (None, -1)}
    right["rate"] = (0.5, -1, None, [], ["3"])  # Texts are rates of layers.
    right |= {"quiet": WRONG, "out": WRONG}  # Not read.
    fine = any(value == one and type(value) is type(one) for one in right[option])
    assert fine or "config.json' is not the configuration of a run: options of other types" in shown


@pytest.mark.parametrize(
    "content",
    [b"", b"[" * 100_000, b"[]", b"3", b'{"rounds": "x", "versions": []}', b'{"command":[]}'],
)
def test_repeat_names_what_it_cannot_read(run, capsys, content):
    write(run, content)
    assert cli.main(["repeat", str(run)]) == 2
    shown = capsys.readouterr().err
    assert "Traceback" not in shown
    assert "config.json' is not the configuration of a run" in shown


@pytest.mark.parametrize("content", [b"", b"[]", b'"text"', b"[" * 100_000, b"null"])
def test_a_file_without_options_is_none(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    assert run_folder.read_json(tmp_path / "config.json") is None
