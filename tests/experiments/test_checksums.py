"""Checksums of finished runs: changed values are noticed."""

import hashlib
import json
import shutil
import subprocess

import pytest

from masked_layers import FileContentError

pytest.importorskip("tyro")

import numpy as np

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.experiments import checksums, results, run_folder
from lottery_ticket_pruner.experiments.config import RunConfig
from lottery_ticket_pruner.experiments.datasets import Dataset
from lottery_ticket_pruner.experiments.reports import run_folders

pytestmark = pytest.mark.once

DATA = Dataset("own", *(np.zeros((3, 2)) for _ in range(6)))
ROWS = "round,arm,replicate,sparsity,test_accuracy\n0,dense,0,0.0,0.91\n1,ticket,0,0.3,0.92\n"


@pytest.fixture
def run(tmp_path):
    """A finished run."""
    config = RunConfig(rounds=1, controls=(), steps=3, seeds=(1,), out=tmp_path / "run").resolve(3)
    with run_folder.RunFolder("run", config, DATA) as folder:
        folder.begin("")
        (folder.path / "results.csv").write_text(ROWS)
        folder.finish()
    return config


def test_the_checksums_are_those_of_other_tools(run):
    lines = (run.out / "SHA256SUMS").read_text().splitlines()
    assert lines == [
        f"{hashlib.sha256((run.out / name).read_bytes()).hexdigest()}  {name}"
        for name in ("config.json", "results.csv")
    ]
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--quiet", "SHA256SUMS"], cwd=run.out, check=True)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [("results.csv", "0.92", "0.93"), ("config.json", '"rounds": 1', '"rounds":1 ')],
)
def test_a_changed_value_is_noticed_by_all_readers(run, capsys, name, old, new):
    assert len(run_folders.read_run(run.out).rows) == 2
    file = run.out / name
    before = file.read_text()
    assert before.count(old) == 1
    file.write_text(before.replace(old, new))
    message = f"{name}' does not have the checksum in SHA256SUMS.*delete"
    with pytest.raises(FileContentError, match=message):
        run_folders.read_run(run.out)
    with pytest.raises(FileContentError, match=message):
        run_folder.RunFolder("run", run, DATA).__enter__()
    assert cli.main(["report", str(run.out), "--quiet"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    (run.out / "SHA256SUMS").unlink()  # As the message says.
    assert len(run_folders.read_run(run.out).rows) == 2


def test_damaged_checksums_and_those_of_no_file_are_refused(run):
    file = run.out / "SHA256SUMS"
    content = file.read_bytes()
    for damaged in (b"", content[:70], b"\xff" + content, content.replace(b"results", b"result5")):
        file.write_bytes(damaged)
        with pytest.raises(FileContentError, match="SHA256SUMS"):
            checksums.check(run.out, ["config.json", "results.csv"])


def test_a_kill_before_the_mark_of_the_end_leaves_a_run_that_is_resumed(run, monkeypatch):
    config = json.loads((run.out / "config.json").read_text()) | {"finished": False}
    (run.out / "config.json").write_text(json.dumps(config))
    with run_folder.RunFolder("run", run, DATA) as folder:
        assert folder.is_interrupted
        folder.begin("", keep=["results.csv"])
        assert not (run.out / "SHA256SUMS").exists()
        folder.finish()
    assert len(run_folders.read_run(run.out).rows) == 2


def test_rows_of_an_unfinished_run_are_taken_over_as_they_were_written(tmp_path, monkeypatch):
    rows = [{"a": 1, "b": 0.5}, {"a": 2, "b": 0.25}]
    names = ("lines.csv", results.RESULTS_FILE)
    before, after = (dict.fromkeys(names, rows[:count]) for count in (1, 2))
    file = tmp_path / results.RESULTS_FILE
    file.write_text("a,b\n1,0.5\n")  # Of an earlier version, without checksums.
    assert results.read_parts(tmp_path, file.name) == rows[:1]
    replacing = results.replacing
    for kept in range(3):  # Killed after so many files.
        results.write_parts(tmp_path, before)
        left = iter(range(kept))

        def until_killed(path, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return replacing(path)

        with monkeypatch.context() as patched:
            patched.setattr(results, "replacing", until_killed)
            with pytest.raises(KeyboardInterrupt):
                results.write_parts(tmp_path, after)
        found = [results.read_parts(tmp_path, name) for name in names]
        assert found == [rows[: 1 + (kept > 1)], rows[:1]]
    results.write_parts(tmp_path, after)
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        if bit // 8 == len(content) - 1:  # The end of the last line, which is then incomplete.
            assert results.read_parts(tmp_path, file.name) == rows[:1]
        else:
            with pytest.raises(FileContentError, match=r"has a line without a checksum in"):
                results.read_parts(tmp_path, file.name)
