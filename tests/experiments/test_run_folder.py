"""Run folders: which runs count as the same, which are finished, and how they are replaced."""

import dataclasses
import errno
import gc
import json
import os
import shutil

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import folders
from lottery_ticket_pruner.experiments import run_folder
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.run_folder import RunFolder
from lottery_ticket_pruner.experiments.supermask import SupermaskConfig
from lottery_ticket_pruner.folders import FolderInUseError, FolderLock
from masked_layers import files

pytestmark = pytest.mark.once


class Large(np.ndarray):
    """An array that cannot be copied for lack of memory."""

    def __deepcopy__(self, memo):
        raise MemoryError


DATA = Dataset("own", *(np.full((3, 2), n).view(Large) for n in range(6)))
MASKS = {1: {"hidden/kernel": np.eye(2, dtype=bool)}, 2: {"hidden/kernel": np.ones((2, 2), bool)}}
HEADING = "round,arm,replicate,test_accuracy\n"
ROWS = f"{HEADING}0,dense,0,0.5\n1,ticket,0,0.5\n0,dense,1,0.5\n1,ticket,1,0.5\n"
OTHER_ROWS = ROWS.replace("0.5", "0.6")


@pytest.fixture
def config(tmp_path):
    options = {"rounds": 1, "controls": (), "steps": 3, "seeds": (1, 2)}
    return RunConfig(**options, out=tmp_path / "run").resolve(3)


class Killed(BaseException):
    """Raises instead of everything that a killed process would no longer do."""


def work(config, rows=ROWS, data=DATA, masks=None, finish=True, command="run"):
    """Uses a folder as a command does, and returns what it found there."""
    with RunFolder(command, config, data, masks) as folder:
        found = (folder.is_finished, folder.is_interrupted)
        if not folder.is_finished:
            folder.begin("", keep=["rounds/*/*"])
            (folder.path / "results.csv").write_text(rows)
            (folder.path / "rounds" / "0").mkdir(parents=True, exist_ok=True)
            (folder.path / "rounds" / "0" / "state.json").touch()
            if finish:
                folder.finish()
    return found


def test_a_run_is_resumed_by_its_options_data_and_masks_until_it_is_finished(config):
    new, goes_on, finished = (False, False), (False, True), (True, False)
    assert work(config, masks=MASKS, finish=False) == new
    other_data = dataclasses.replace(DATA, y_test=DATA.y_test + 1)
    exchanged = {1: MASKS[2], 2: MASKS[1]}
    for arguments, message in (
        ((dataclasses.replace(config, steps=4), DATA, MASKS), "steps 3 there, 4 here"),
        ((config, other_data, MASKS), "of the same options with another data_digest"),
        ((config, DATA, exchanged), "of the same options with another masks_digest"),
        ((config, DATA, None), "another masks_digest"),
    ):
        before = (config.out / "config.json").read_text()
        with pytest.raises(ValueError, match=message) as caught:
            RunFolder("run", *arguments).__enter__()
        assert "--overwrite" in str(caught.value)
        assert (config.out / "config.json").read_text() == before
    moved = dataclasses.replace(config, data_dir=config.out, quiet=True)
    renamed = dataclasses.replace(DATA, name="renamed")
    assert work(moved, data=renamed, masks=MASKS, finish=False) == goes_on
    assert work(config, masks=MASKS) == goes_on
    assert work(config, "other rows", masks=MASKS) == finished
    assert (config.out / "results.csv").read_text() == ROWS
    assert not list(config.out.glob("rounds/*/*"))
    assert not list(config.out.glob(".*"))
    with pytest.raises(ValueError, match="a finished run of other options"):
        work(dataclasses.replace(config, steps=4), masks=MASKS)


def test_a_folder_without_results_is_reused(config):
    for rows in ("", HEADING, f"{HEADING}0,de"):
        with RunFolder("run", config, DATA) as folder:
            folder.begin("")
            (folder.path / "results.csv").write_text(rows)
        assert work(dataclasses.replace(config, steps=4), finish=False) == (False, False)
        shutil.rmtree(config.out)


def test_the_folder_of_another_command_or_of_a_sweep_is_refused(config, tmp_path):
    work(config)
    other = SupermaskConfig(out=config.out).resolve(3)
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="results of `lottery-ticket run`"):
            work(dataclasses.replace(other, overwrite=overwrite), command="supermask")
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").touch()
    with pytest.raises(ValueError, match="folder of a sweep"):
        work(dataclasses.replace(config, out=tmp_path / "sweep"))
    assert [file.name for file in (tmp_path / "sweep").iterdir()] == ["sweep.json"]


def test_a_finished_run_is_replaced_when_the_new_one_is_complete(config, tmp_path):
    work(config)
    (config.out / "notes.txt").touch()
    again = dataclasses.replace(config, overwrite=True)
    other = dataclasses.replace(again, steps=4)
    rows = OTHER_ROWS
    assert work(other, rows, finish=False) == (False, False)
    assert (config.out / "results.csv").read_text() == ROWS
    assert work(config) == (True, False)
    # It is resumed, or replaced by one with other options.
    assert work(other, rows, finish=False) == (False, True)
    assert work(again, rows, finish=False) == (False, False)
    assert work(again, rows) == (False, True)
    assert (config.out / "results.csv").read_text() == rows
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert sorted(path.name for path in config.out.iterdir()) == [
        "SHA256SUMS", "config.json", "notes.txt", "results.csv", "rounds",
    ]  # fmt: skip


@pytest.mark.parametrize("exchanges", [True, False])
@pytest.mark.parametrize("moment", ["before", "between", "after"])
def test_a_kill_while_one_takes_the_place_of_the_other(
    config, tmp_path, monkeypatch, moment, exchanges
):
    work(config)
    again = dataclasses.replace(config, overwrite=True)
    rows = OTHER_ROWS
    replace, remove = run_folder.replace_folder, shutil.rmtree
    exchange = files._exchange if exchanges else lambda a, b: False

    def killed(path, **_):
        # A killed process does not execute what follows in a `finally`.
        monkeypatch.setattr(FolderLock, "__exit__", lambda *_: None)
        raise Killed

    def killed_in_between(new, path):
        path.rename(path.with_name(f"{new.name}.old"))
        killed(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_exchange", exchange)
        if moment == "before":
            patch.setattr(run_folder, "replace_folder", lambda new, path: killed(path))
        elif moment == "between" and not exchanges:
            patch.setattr(run_folder, "replace_folder", killed_in_between)
        else:
            patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(Killed):
            work(again, rows)
    monkeypatch.undo()
    gc.collect()  # The locks.
    assert (run_folder.replace_folder, shutil.rmtree) == (replace, remove)
    monkeypatch.setattr(files, "_exchange", exchange)
    assert work(config) == (True, False)
    assert (config.out / "results.csv").read_text() == rows
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not list(config.out.glob(".*"))


def test_a_kill_after_the_mark_leaves_nothing_for_the_next_command(config, monkeypatch):
    def killed(folder):
        raise Killed

    work(config, finish=False)
    states = [".tables.json", "rounds/0/state.json", ".seeds/7/run/config.json"]
    for name in states:
        (config.out / name).parent.mkdir(parents=True, exist_ok=True)
        (config.out / name).touch()
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "_remove_states", killed)
        with pytest.raises(Killed):
            work(config)
    assert all((config.out / name).exists() for name in states)
    assert work(config) == (True, False)
    assert not any((config.out / name).exists() for name in states)
    assert (config.out / "results.csv").read_text() == ROWS


def test_folders_of_earlier_versions_are_read(config):
    work(config)
    file = config.out / "config.json"
    stored = json.loads(file.read_text())
    facts = {name: stored.pop(name) for name in ("command", "finished", "versions")}
    assert facts["command"] == "run"
    assert facts["finished"] is True
    assert "lottery-ticket-pruner" in facts["versions"]
    # They also lacked options that were added later.
    del stored["optimizer"], stored["pruned"]
    file.write_text(json.dumps(stored))
    assert not run_folder.is_finished(config.out)
    assert work(config, finish=False) == (False, True)
    file.write_text(json.dumps(stored))
    (config.out / "accuracy.png").touch()
    assert run_folder.is_finished(config.out)
    assert work(config) == (True, False)
    with pytest.raises(ValueError, match="optimizer 'adam' there, 'sgd' here"):
        work(dataclasses.replace(config, optimizer="sgd"))
    file.write_text(json.dumps(stored)[:-9])
    with pytest.raises(
        ValueError, match=r"its config.json is cut short or damaged \(.*--overwrite"
    ):
        work(config)


def test_a_folder_is_one_process_alone(config):
    work(config, finish=False)
    before = (config.out / "results.csv").read_text()
    with FolderLock(config.out), pytest.raises(FolderInUseError) as caught:
        work(config, "other")
    assert f"process {os.getpid()} on " in str(caught.value)
    assert (config.out / "results.csv").read_text() == before
    assert work(config) == (False, True)


def test_a_folder_that_vanishes_is_not_finished(config):
    def vanish(again):
        with RunFolder("run", config, DATA) as folder:
            folder.begin("")
            shutil.rmtree(config.out)
            if again:
                config.out.mkdir()
            folder.finish()

    for again in (False, True):
        with pytest.raises(FileNotFoundError, match="removed or replaced"):
            vanish(again)
    assert not config.out.exists()  # It contained only the lock.


def test_the_lock_of_another_process_stays(config):
    with FolderLock(config.out):
        shutil.rmtree(config.out)
        other = FolderLock(config.out)
        other.__enter__()
    with pytest.raises(FolderInUseError):
        work(config)
    other.__exit__()
    assert work(config) == (False, False)


def test_a_search_has_its_checkpoint_alone(tmp_path):
    import keras

    from lottery_ticket_pruner import find_ticket

    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2, name="a")])
    model.compile("sgd", "mse")
    data = np.ones((4, 3), "float32"), np.ones((4, 2), "float32")
    options = {"rounds": 1, "steps": 2, "controls": (), "checkpoint": tmp_path / "rounds"}
    with FolderLock(tmp_path / "rounds"), pytest.raises(FolderInUseError, match="is in use by"):
        find_ticket(model, *data, **options)
    vanish = lambda row: shutil.rmtree(tmp_path / "rounds", ignore_errors=True)  # noqa: E731
    with pytest.raises(FileNotFoundError, match="removed or replaced"):
        find_ticket(model, *data, on_result=vanish, **options)
    assert not (tmp_path / "rounds").exists()
    assert len(find_ticket(model, *data, **options).rows) == 2


def test_a_folder_that_cannot_be_locked_is_named(monkeypatch, tmp_path):
    fcntl = pytest.importorskip("fcntl")

    def refused(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refused)
    with (
        pytest.raises(OSError, match=r"run' cannot be locked: No locks .* with locks"),
        FolderLock(tmp_path / "run"),
    ):
        pass


def test_a_lock_that_cannot_be_described_is_let_go(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(folders, "replacing", full)
        lock = FolderLock(tmp_path / "new" / "run")
        with pytest.raises(OSError, match="No space left"), lock:
            pass
    assert not (tmp_path / "new").exists()
    with FolderLock(tmp_path / "new" / "run"):
        pass
