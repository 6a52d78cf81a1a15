"""Runs whose seeds are jobs: the same folder as from one process."""

import json

import numpy as np
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import processes
from lottery_ticket_pruner.commands.jobs import Failure
from lottery_ticket_pruner.experiments import results, run, written
from masked_layers.archives import read_npz

pytestmark = pytest.mark.once

LINE = ["run", "--rounds", "1", "--steps", "3", "--seeds", "5", "7", "--controls"]


@pytest.fixture
def here(monkeypatch):
    """Executes jobs in this process, except for those of seeds in the list that is returned."""
    broken = []

    def run(executor, todo):
        failures = []
        for job in todo:
            job.folder.mkdir(parents=True, exist_ok=True)
            if set(job.config.seeds) & set(broken):
                failures.append(Failure(job, "no memory", job.folder / "output.log"))
            else:
                assert cli.main(job.arguments) == 0
        return failures

    monkeypatch.setattr(processes.LocalExecutor, "run", run)
    return broken


def files_of(folder):
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name.partition("events.")[0] for name in names)


def test_the_folder_is_that_of_one_process(here, tmp_path, capsys, monkeypatch):
    exported = []

    def export(model, path):
        exported.append(path.relative_to(tmp_path).as_posix())
        raise ImportError

    monkeypatch.setattr(run, "export_sparse_saved_model", export)
    one, jobs = tmp_path / "one", tmp_path / "jobs"
    assert cli.main([*LINE, "--out", str(one)]) == 0
    here.append(7)
    line = [*LINE, "--out", str(jobs), "--executor", "local"]
    assert cli.main(line) == 1
    captured = capsys.readouterr()
    assert "failed: seed 7: no memory" in captured.err
    assert "The run is not finished" in captured.out
    # What is done so far is neither lost nor mixed with another way to execute it.
    assert written.others_in(jobs, "run") == []
    assert cli.main([*LINE, "--out", str(jobs)]) == 2
    assert "was begun with --executor" in capsys.readouterr().err
    here.clear()
    assert cli.main(line) == 0
    assert "2 seeds, each a job, 1 of them finished earlier" in capsys.readouterr().out

    assert exported == ["one/served/1", "jobs/.seeds/5/jobs/served/1"]
    assert files_of(jobs) == files_of(one)
    tables = [results.read_table(folder / "results.csv") for folder in (one, jobs)]
    assert tables[0].drop(columns="seconds").equals(tables[1].drop(columns="seconds"))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (one, jobs)]
    assert {**configs[0], "out": str(jobs)} == configs[1]
    for name in ("initial", "masks-00", "masks-01"):
        for seed in "01":
            arrays = [read_npz(folder / "rounds" / seed / f"{name}.npz") for folder in (one, jobs)]
            assert arrays[0].keys() == arrays[1].keys()
            for key, value in arrays[0].items():
                np.testing.assert_array_equal(value, arrays[1][key])
    # It is finished for both.
    for again in (line, [*LINE, "--out", str(jobs)]):
        assert cli.main(again) == 0
        assert "is finished and stays" in " ".join(capsys.readouterr().out.split())
    # A run that was begun in one process is resumed there.
    (one / "config.json").write_text(json.dumps(configs[0] | {"finished": False}))
    assert cli.main([*LINE, "--out", str(one), "--executor", "local"]) == 2
    assert "was begun without --executor" in capsys.readouterr().err
    assert (one / "results.csv").is_file()
