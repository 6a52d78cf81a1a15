"""Files that users put into the folder of a command survive everything that the command does."""

import gc
import json
import os
import shutil

import pytest

import own_data

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import catalogue, written
from lottery_ticket_pruner.experiments.run_folder import Workplace
from lottery_ticket_pruner.folders import FolderInUseError, FolderLock
from masked_layers import files

pytestmark = pytest.mark.once

COMMON = ("--data", "own.py:load", "--steps", "4", "--seeds", "0")
COMMANDS = {
    "run": ("run", *COMMON, "--optimizer", "sgd", "--rounds", "1", "--controls", "random_mask"),
    "supermask": (
        *("supermask", *COMMON, "--criteria", "random", "--sparsities", "0.5"),
        *("--weights", "initial", "--dwr", "False"),
    ),
    "learned supermask": (
        *("supermask", "--learn", "edge_popup", *COMMON, "--weights", "signed_constant"),
        *("--dwr", "True", "--sparsities", "1e-5"),
    ),
    "instability": ("instability", *COMMON, "--rewind-to", "0", "--points", "2"),
}
# Next to files of the commands, with similar names, and in separate folders.
OWN = (
    "notes.txt",
    "ticket-mine.safetensors",
    "curves-mine.png",
    "supermask-1.keras",
    "served/2/saved_model.pb",
    "served/1/assets.extra/tf_serving_warmup_requests",
    "rounds/0/masks-best.npz",
    "rounds/notes.txt",
    "logs/mine/events.out.tfevents.1.host",
    "analysis/deep/results.csv",
    "report/notes.html",
)


def test_every_experiment_is_tested():
    assert {command for command, *_ in COMMANDS.values()} == set(catalogue.KINDS)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with a small data set in it."""
    (tmp_path / "own.py").write_text(own_data.SOURCE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def put(folder, names=OWN):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"of mine: {name}")


def kept(folder, names=OWN):
    return [n for n in names if (folder / n).is_file() and (folder / n).read_text().endswith(n)]


SLOW = ("run", "learned supermask", "instability")


@pytest.mark.usefixtures("exported")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in COMMANDS]
)
def test_they_survive_the_run_that_replaces_another(here, capsys, name):
    command = [*COMMANDS[name], "--out", "out"]
    folder = here / "out"
    assert cli.main(command) == 0
    assert written.others_in(folder, COMMANDS[name][0]) == []  # All files belong to the command.
    put(folder)
    (folder / "link").symlink_to(here)
    before = (folder / "results.csv").stat().st_ino
    capsys.readouterr()
    assert cli.main([*command, "--overwrite"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert kept(folder) == list(OWN)
    assert os.readlink(folder / "link") == str(here)
    assert "Kept of what was there: " in printed
    assert "notes.txt" in printed
    assert ".out.new" not in printed
    assert (folder / "results.csv").stat().st_ino != before
    others = {path.as_posix() for path in written.others_in(folder, COMMANDS[name][0])}
    assert others == {*OWN, "link"}
    assert sorted(path.name for path in here.iterdir() if path.name != "__pycache__") == [
        "out", "own.py",
    ]  # fmt: skip


def test_they_survive_a_repetition_and_a_resumed_run(here):
    assert cli.main([*COMMANDS["supermask"], "--out", "out", "--quiet"]) == 0
    put(here / "out")
    assert cli.main(["repeat", "out", "--quiet"]) == 0
    again = here / "out-again"
    put(again)
    stored = json.loads((again / "config.json").read_text())
    (again / "config.json").write_text(json.dumps(stored | {"finished": False}))
    assert cli.main(["repeat", "out", "--quiet"]) == 0
    assert kept(again) == list(OWN)
    assert cli.main(["repeat", "out", "--quiet", "--overwrite"]) == 0
    assert kept(again) == list(OWN)
    assert kept(here / "out") == list(OWN)


def test_results_of_unknown_origin_are_not_replaced(here, capsys):
    (here / "out").mkdir()
    put(here / "out", ["accuracy.png", "ticket.keras"])
    for more in ([], ["--overwrite"]):
        assert cli.main([*COMMANDS["run"], "--out", "out", *more]) == 2
        error = capsys.readouterr().err
        assert "holds no config.json of a run, but accuracy.png, ticket.keras, which" in error
    assert sorted(path.name for path in (here / "out").iterdir()) == [
        "accuracy.png", "ticket.keras",
    ]  # fmt: skip


def test_of_many_files_a_refusal_names_some_and_counts_the_others(tmp_path):
    written.refuse_to_replace(tmp_path, [], "report")
    with pytest.raises(ValueError, match="holds no report, but a, b, c, d, e and 2 more, which"):
        written.refuse_to_replace(tmp_path, "abcdefg", "report")


def test_a_report_does_not_replace_the_results_of_a_run(here, capsys):
    assert cli.main([*COMMANDS["instability"], "--out", "out", "--quiet"]) == 0
    before = (here / "out" / "results.csv").read_bytes()
    assert cli.main(["report", "out", "--out", "out"]) == 2
    assert "'out' is itself the folder of a run" in capsys.readouterr().err
    assert (here / "out" / "results.csv").read_bytes() == before
    put(here / "mine", ["results.csv", "tables.md"])
    assert cli.main(["report", "out", "--out", "mine"]) == 2
    assert "'mine' holds no report, but results.csv, tables.md, which" in capsys.readouterr().err
    assert kept(here / "mine", ["results.csv", "tables.md"]) == ["results.csv", "tables.md"]
    for _ in range(2):  # An earlier report is replaced.
        assert cli.main(["report", "out", "--quiet"]) == 0


# --- Folders that replace another -----------------------------------------------------------------


class Killed(BaseException):
    """Raises instead of everything that a killed process would no longer do."""


def replaced(folder, text):
    """Replaces a folder of a run by another one."""
    with Workplace(folder) as place:
        place.replace()
        for name in ("config.json", "results.csv"):
            (place.path / name).write_text('{"command": "run"}' if name == "config.json" else text)
        place.complete()
    return place


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moves", [0, 1, 5])
def test_a_kill_while_they_are_moved_loses_none(tmp_path, monkeypatch, exchanges, moves):
    folder = tmp_path / "run"
    exchange = files._exchange if exchanges else lambda a, b: False
    monkeypatch.setattr(files, "_exchange", exchange)
    replaced(folder, "first")
    put(folder)
    move, left = shutil.move, iter(range(moves))

    def moved(*arguments):
        if next(left, None) is None:
            monkeypatch.setattr(FolderLock, "__exit__", lambda *_: None)
            raise Killed
        return move(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "move", moved)
        with pytest.raises(Killed):
            replaced(folder, "second")
    monkeypatch.undo()
    gc.collect()  # The locks.
    with Workplace(folder) as place:
        assert len(place.moved) == len(OWN) - moves
    assert kept(folder) == list(OWN)
    assert (folder / "results.csv").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_name_that_is_taken_is_kept_beside(tmp_path):
    folder = tmp_path / "run"
    replaced(folder, "first")
    put(folder, ["notes.txt"])
    with Workplace(folder) as place:
        place.replace()
        (place.path / "config.json").write_text("{}")
        (place.path / "notes.txt").write_text("newer")
        place.complete()
    assert kept(folder, ["notes.txt"]) == []
    assert (folder / "notes.txt").read_text() == "newer"
    assert (folder / "notes.txt.old").read_text() == "of mine: notes.txt"
    assert place.describe_moved() == "Kept of what was there: notes.txt.old"


def test_folders_of_unknown_origin_are_kept_completely(tmp_path):
    (tmp_path / "run").mkdir()
    put(tmp_path / "run", ["results.csv", "ticket.keras"])
    place = replaced(tmp_path / "run", "new")
    assert {path.name for path in place.moved} == {"results.csv.old", "ticket.keras"}


def test_behind_a_link_the_folder_is_replaced(tmp_path):
    replaced(tmp_path / "run", "first")
    put(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    replaced(tmp_path / "link", "second")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "run" / "results.csv").read_text() == "second"
    assert kept(tmp_path / "run") == list(OWN)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "link"}


def test_folders_that_a_running_process_moves_are_not_treated_as_abandoned(tmp_path):
    """Stops between the two steps of a replacement, on systems that need two."""
    folder, beside = tmp_path / "run", tmp_path / ".run.new"
    old = beside.with_name(f"{beside.name}.old")
    for path, text in ((old, "first"), (beside, "second")):
        path.mkdir()
        (path / "results.csv").write_text(text)
    for busy in (old, beside):
        with FolderLock(busy), pytest.raises(FolderInUseError), Workplace(folder):
            pass
        assert not folder.exists()
        assert (old / "results.csv").read_text() == "first"
        assert (beside / "results.csv").read_text() == "second"
    (old / ".replaced").touch()
    with Workplace(folder):
        assert (folder / "results.csv").read_text() == "second"
    # If its command is unknown, everything in it is kept.
    assert {path.name for path in folder.iterdir()} == {"results.csv", "results.csv.old"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
