"""Truncated or damaged results of finished runs: every command reports them and what to do."""

import json
import shutil

import pandas as pd
import pytest

import own_data

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import catalogue, results
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.instability import InstabilityConfig
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig

pytestmark = pytest.mark.once

COMMON = ("--data", "own.py:load", "--steps", "4", "--seeds", "7", "8", "--out", "out")
COMMANDS = {
    "run": (
        *("run", *COMMON, "--optimizer", "sgd", "--rounds", "2"),
        *("--controls", "random_mask", "--control-rounds", "2"),
    ),
    "supermask": (
        *("supermask", *COMMON, "--criteria", "random", "large_final"),
        *("--sparsities", "0.5", "0.9", "--weights", "initial", "--dwr", "False"),
    ),
    "instability": ("instability", *COMMON, "--rewind-to", "0", "2", "--points", "2"),
}
ROWS = {"run": 4, "supermask": 4, "instability": 2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a finished run of each command."""
    place = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        (place / "own.py").write_text(own_data.SOURCE)
        for name, command in COMMANDS.items():
            assert cli.main([*command, "--quiet"]) == 0
            (place / "out").rename(place / name)
    return place


def test_every_experiment_is_tested_and_names_its_columns_of_numbers(finished):
    assert set(COMMANDS) == set(ROWS) == set(catalogue.KINDS)
    for command, kind in catalogue.KINDS.items():
        for file in (finished / command).glob("*.csv"):
            table = pd.read_csv(file)
            numbers = table.select_dtypes("number").columns  # Booleans are not among them.
            assert set(numbers) <= set(kind.numbers), (command, file.name)
        assert kind.fits(pd.read_csv(finished / command / "results.csv"))


@pytest.fixture
def place(tmp_path, finished, monkeypatch):
    """The working directory; returns a function that puts a finished run into its folder `out`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(own_data.SOURCE)
    return lambda name: shutil.copytree(finished / name, tmp_path / "out")


def without_end(lines):
    return [*lines[:-1], lines[-1][:-9]]


def only_half_a_line(lines):
    return [lines[0], lines[1][:-9]]


def without_last(lines):
    return lines[:-1]


def without_one_inside(lines):
    return [*lines[:2], *lines[3:]]


def twice(lines):
    return [*lines, lines[-1]]


def of_a_third_seed(lines):
    return [*lines, lines[-1].replace(b"ticket,1,", b"ticket,2,")]


def without_any(lines):
    return []


def a_word(lines):
    *cells, _ = lines[2].split(b",")
    return [*lines[:2], b",".join([*cells, b"abc\n"]), *lines[3:]]


def a_value_less(lines):
    return [*lines[:2], lines[2].partition(b",")[2], *lines[3:]]


DAMAGES = (
    (without_end, "line {last}: it ends in the middle"),
    (only_half_a_line, "line 2: it ends in the middle"),
    (without_one_inside, "has {less} rows of seed 7 (replicate 0)"),
    (twice, "has {more} rows of seed 8 (replicate 1), but the finished run wrote {n}"),
    (of_a_third_seed, "has rows of seeds other than its 2."),
    (without_any, "no whole line"),
    (a_value_less, "line 3: expected {width} values, one for each column. Received"),
    (without_last, "has {less} rows of seed 8 (replicate 1), but the finished run wrote {n}"),
    (a_word, "line 3: expected a number in column '{column}'. Received: 'abc'"),
    (None, "is missing, with the results of a finished run"),
)
CASES = [("run", *case) for case in DAMAGES]
CASES += [(name, *case) for name in ("supermask", "instability") for case in DAMAGES[-3:]]


@pytest.mark.parametrize(("name", "damage", "message"), CASES)
def test_damage_is_reported_and_nothing_is_done(place, capsys, name, damage, message):
    folder = place(name)
    file = folder / "results.csv"
    lines = file.read_bytes().splitlines(keepends=True)
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(b"".join(damage(lines)))
    wanted = ROWS[name]
    heading = lines[0].decode().strip().split(",")
    message = message.format(
        last=len(lines), less=wanted - 1, more=wanted + 1, n=wanted, column=heading[-1],
        width=len(heading),
    )  # fmt: skip
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    for command in (COMMANDS[name], ("report", "out"), ("report", "."), ("repeat", "out")):
        if command[0] == "repeat":  # Its new folder is like any other.
            command = (*command, "--out", "out")
        assert cli.main([*command, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert error.startswith("lottery-ticket: 'out/results.csv'")
        assert message in error
        assert "Restore it from a copy" in error
        assert "--overwrite" in error
        assert error.count("\n") == 1
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_overwrite_is_the_remedy_that_the_message_names(place):
    folder = place("supermask")
    (folder / "results.csv").write_text("replicate\n0")
    assert cli.main([*COMMANDS["supermask"], "--quiet", "--overwrite"]) == 0
    assert len(pd.read_csv(folder / "results.csv")) == 2 * ROWS["supermask"]
    assert cli.main([*COMMANDS["supermask"], "--quiet"]) == 0


@pytest.mark.parametrize("name", ["supermask", pytest.param("instability", marks=pytest.mark.slow)])
def test_damage_to_files_that_a_run_resumes_from_is_reported(place, capsys, name):
    folder = place(name)
    stored = json.loads((folder / "config.json").read_text()) | {"finished": False}
    (folder / "config.json").write_text(json.dumps(stored))
    file = folder / "results.csv"
    file.write_bytes(b"".join(a_word(file.read_bytes().splitlines(keepends=True))))
    assert cli.main([*COMMANDS[name], "--quiet"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("lottery-ticket: 'out/results.csv', line 3: expected a number")
    assert error.endswith("or delete it: its run starts over then.\n")
    file.unlink()
    assert cli.main([*COMMANDS[name], "--quiet"]) == 0
    assert len(pd.read_csv(file)) == 2 * ROWS[name]


def test_a_truncated_configuration_is_reported(place, capsys):
    folder = place("instability")
    content = (folder / "config.json").read_text()
    (folder / "config.json").write_text(content[: len(content) // 2])
    for command in (COMMANDS["instability"], ("report", "out"), ("repeat", "out")):
        assert cli.main([*command, "--quiet"]) == 2
        error = capsys.readouterr().err
        assert "config.json" in error
        assert "is cut short or damaged (" in error
        assert "other options" not in error
        assert error.count("\n") == 1


def test_damaged_tickets_are_reported_as_left_out(place, capsys):
    folder = place("run")
    ticket = folder / "ticket.safetensors"
    ticket.write_bytes(ticket.read_bytes()[:-99])
    with pytest.warns(UserWarning, match=r"left out\. 'out/ticket\.safe.*cut short.*Restore"):
        assert cli.main(["report", "out", "--quiet"]) == 0
    text = (folder / "report" / "tables.md").read_text()
    assert "Not loaded: 'out/ticket.safetensors' is not a ticket file, or is cut short" in text
    assert "Not loaded: " in (folder / "report" / "report.html").read_text()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "config", "rows"),
    [
        ("run", RunConfig(rounds=3), 1 + 3 + 2 * 3),
        ("run", RunConfig(rounds=3, controls=()), 1 + 3),
        ("run", RunConfig(rounds=3, control_rounds=(1, 3)), 1 + 3 + 2 * 2),
        ("supermask", SupermaskConfig(criteria=("random", "movement")), 2 * 11 * 2 * 2),
        ("supermask", SupermaskConfig(learn="bernoulli"), 2 * 2),
        ("supermask", SupermaskConfig(learn="edge_popup", sparsities=(0.5, 0.9)), 2 * 2 * 2),
        ("instability", InstabilityConfig(), 7),
    ],
)
def test_how_many_rows_there_are_follows_from_the_options(command, config, rows):
    stored = json.loads(json.dumps(config.resolve(600).to_dict())) | {"command": command}
    assert results.rows_per_seed(stored) == rows


@pytest.mark.parametrize("config", [{}, {"command": "run"}, {"command": "run", "rounds": "x"}])
def test_the_number_of_rows_is_unknown_for_other_options(config):
    assert results.rows_per_seed(config) is None
