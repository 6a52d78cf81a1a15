"""The sweep: its runs, and what happens to them. Most children here are stand-ins."""

import dataclasses
import io
import json
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import pytest

pytest.importorskip("tyro")

from rich.console import Console

import masked_layers as ml
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import processes
from lottery_ticket_pruner.commands.sweep import (
    SupermaskSweepConfig,
    SweepConfig,
    plan,
    sweep,
)
from lottery_ticket_pruner.experiments import checksums, written
from lottery_ticket_pruner.folders import FolderInUseError, FolderLock

pytestmark = pytest.mark.once

# Writes the files of a run with twice the rate as accuracy, and fails if the rate is 0.5.
STAND_IN = """
import hashlib, json, os, pathlib, sys, time
arguments = sys.argv[1:]
value = lambda name: arguments[arguments.index(name) + 1]
out, seed = pathlib.Path(value("--out")), int(value("--seeds"))
if arguments[0] == "supermask":
    accuracy = {"initial": 0.6, "signed_constant": 0.7}[value("--weights")] + seed / 10
    config = {"learn": value("--learn"), "weights": [value("--weights")], "seeds": [seed]}
    (out / "config.json").write_text(json.dumps(config))
    (out / "results.csv").write_text(
        "replicate,weights,sparsity,test_accuracy\\n"
        f"0,{value('--weights')},{0.5 + seed / 100},{accuracy}\\n"
    )
    (out / "curves-1.png").touch()
    sys.exit()
rate = float(value("--rate"))
print("the rate is", rate)
if rate == 0.5:
    print("lottery-ticket: this rate is bad", file=sys.stderr)
    sys.exit(2)
if rate == 0.6:
    (out.parent / "started").touch()
    time.sleep(600)
cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
config = {"rate": rate, "seeds": [seed], "cores": cores, "threads": os.environ["OMP_NUM_THREADS"]}
(out / "config.json").write_text(json.dumps(config))
(out / "results.csv").write_text(
    "round,arm,replicate,sparsity,test_accuracy,early_stop_step\\n"
    f"0,dense,0,0,{2 * rate},4\\n1,ticket,0,0.5,{2 * rate},4\\n"
)
(out / "accuracy.png").touch()
names = ("config.json", "results.csv")
sums = [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names]
(out / "SHA256SUMS").write_text("".join(f"{s}  {n}\\n" for s, n in zip(sums, names)))
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Children that end at once. Returns a function that sweeps over rates."""
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(processes, "_COMMAND", (sys.executable, str(script)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    folder = tmp_path / "sweep"

    def run(rates, **options):
        console = Console(file=io.StringIO(), width=120)
        config = SweepConfig(over=(f"rate={rates}",), out=folder, **options)
        return folder, sweep(config, console), console.file.getvalue()

    return run


# --- Plans ----------------------------------------------------------------------------------------


def test_every_combination_runs_with_every_seed(tmp_path):
    over = ("strategy=large_final,random", "rate=0.2,0.4")
    children = plan(SweepConfig(over=over, seeds=(3, 5), rounds=2, out=tmp_path))
    found = [(c.config.strategy, c.config.rate, c.config.seeds) for c in children]
    assert found == [
        (strategy, rate, (seed,))
        for strategy in ("large_final", "random")
        for rate in (0.2, 0.4)
        for seed in (3, 5)
    ]
    assert {child.config.rounds for child in children} == {2}
    assert children[1].label == "strategy large_final, rate 0.2, seed 5"
    folders = {child.config.folder for child in children}
    assert len(folders) == 8
    assert {folder.parent for folder in folders} == {tmp_path}


def test_a_child_has_the_configuration_that_run_creates_from_its_arguments(tmp_path, monkeypatch):
    from lottery_ticket_pruner.experiments import run

    over = ("controls=none,random_mask+random_reinit", "rewind-to=0,2ep", "epochs=4")
    config = SweepConfig(over=over, seeds=(3,), rounds=2, batch_size=700, out=tmp_path)
    children = plan(config)
    assert [child.config.controls for child in children[::2]] == [
        (),
        ("random_mask", "random_reinit"),
    ]
    assert [child.config.rewind_to for child in children[:2]] == ["0it", "4it"]
    prepared = []
    monkeypatch.setattr(run, "run", lambda config, data: prepared.append(config))
    for child in children:
        assert cli.main(child.arguments) == 0
    assert prepared == [child.config for child in children]


def test_children_have_the_configuration_that_supermask_creates_from_their_arguments(
    tmp_path, monkeypatch
):
    from lottery_ticket_pruner.experiments import supermask

    over = ("learn=bernoulli,edge_popup", "dwr=True,False+True")
    config = SupermaskSweepConfig(over=over, weights=("initial",), epochs=2, seeds=(3,))
    children = plan(dataclasses.replace(config, out=tmp_path))
    assert [(child.config.learn, child.config.dwr) for child in children] == [
        (learn, dwr) for learn in ("bernoulli", "edge_popup") for dwr in ((True,), (False, True))
    ]
    # The steps of two epochs by 250, for each kind of mask.
    assert [child.work for child in children] == [12, 24, 12, 24]
    prepared = []
    monkeypatch.setattr(supermask, "run", lambda config, data: prepared.append(config))
    for child in children:
        assert cli.main(child.arguments) == 0
    assert prepared == [child.config for child in children]
    with pytest.raises(ValueError, match=r"Unknown option 'rate'\..*criteria"):
        plan(SupermaskSweepConfig(over=("rate=0.1",)))


def test_the_default_folder_is_named_after_all_runs(tmp_path, monkeypatch):
    first, same, other = (
        plan(SweepConfig(over=(f"rate={rates}",), seeds=(0,)))[0].config.folder.parent
        for rates in ("0.1,0.2", "0.2,0.1", "0.1,0.3")
    )
    assert first.parent.name == "runs"
    assert first.name.startswith("sweep-digits-")
    assert first == same != other
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        "import numpy as np\n"
        "def load():\n"
        "    return (np.zeros((24, 4)), np.arange(24)), (np.zeros((6, 4)), np.arange(6))\n"
    )
    for kind in (SweepConfig, SupermaskSweepConfig):
        (child,) = plan(kind(data="./own.py:load", seeds=(0,)))
        assert child.config.folder.parent.parent == Path("runs")
        assert child.config.folder.parent.name.startswith("sweep-own.py-load-")
        assert child.config.folder.name.startswith("own.py-load-lenet-300-100-")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"over": ("rat=0.1",)}, "Unknown option 'rat'. Did you mean 'rate'"),
        ({"over": ("lr=0.1",)}, "Unknown option 'lr'. Did you mean 'learning_rate'"),
        ({"over": ("rate=0.1,20%",)}, "Received: '20%'. For 20 %, give 0.2."),
        ({"over": ("rate",)}, "--over rate=0.2,0.4. Received: 'rate'"),
        ({"over": ("rate=0.1,",)}, "Received: 'rate=0.1,'"),
        ({"over": ("seeds=1,2",)}, "--seeds 0 1 2"),
        ({"over": ("out=a,b",)}, "Unknown option 'out'"),
        ({"over": ("data_dir=a,b",)}, "cannot be swept"),
        ({"over": ("kept=rewind,reinit", "retraining=fine_tuning")}, "kept reinit, .*fine_tuning"),
        ({"over": ("rate=0.1", "rate=0.2")}, "--rate is given twice"),
        ({"over": ("rate=0.1",), "rate": 0.3}, "--rate is given twice"),
        ({"over": ("rate=0.1,2",)}, r"^rate 2: --rate must be in \[0, 1\)"),
        ({"over": ("strategy=large_final,biggest",)}, "^strategy biggest: .*large_final"),
        ({"seeds": ()}, "at least one seed"),
        ({"jobs": 0}, "--jobs must be positive. Received: 0"),
    ],
)
def test_invalid_sweeps_are_refused_before_anything_runs(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        sweep(SweepConfig(out=tmp_path / "sweep", **options))
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize("cores", [1, 2, 5, 8])
def test_shares_of_the_cores(cores):
    for jobs in range(1, cores + 1):
        shares = processes.shares_of(range(cores), jobs)
        assert sorted(core for share in shares for core in share) == list(range(cores))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert processes.shares_of(range(cores), 2 * cores) == [[i % cores] for i in range(2 * cores)]


# --- Runs -----------------------------------------------------------------------------------------


def test_results_come_into_one_table(stand_in):
    folder, failures, printed = stand_in("0.1,0.2", seeds=(4, 5), jobs=2)
    assert failures == []
    table = pd.read_csv(folder / "results.csv")
    assert list(table)[:4] == ["run", "rate", "seed", "round"]
    assert len(table) == 8
    assert (table["test_accuracy"] == 2 * table["rate"]).all()
    assert set(table["seed"]) == {4, 5}
    assert "4 of 4" in printed
    assert "rate 0.1, seed 4" in printed
    stored = json.loads((folder / "sweep.json").read_text())
    assert stored["over"] == ["rate=0.1,0.2"]


def test_a_second_call_executes_the_missing_runs(stand_in):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    (finished,) = folder.glob("*/accuracy.png")
    before = finished.stat().st_mtime_ns
    _, _, printed = stand_in("0.1,0.2", seeds=(4,))
    assert "2 runs, 1 of them finished earlier" in printed
    assert finished.stat().st_mtime_ns == before
    assert len(pd.read_csv(folder / "results.csv")) == 4
    _, failures, printed = stand_in("0.1,0.2", seeds=(4,))
    assert "nothing left to run" in printed
    assert failures == []


def test_runs_of_another_backend_or_of_other_data_are_not_counted_in(stand_in, monkeypatch):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    stored = json.loads((folder / "sweep.json").read_text())
    before = (folder / "results.csv").read_text()
    for other, message in (
        (stored | {"backend": "numpy"}, "used backend numpy"),
        (stored | {"digests": {"digits": "0"}}, "used other data named digits"),
    ):
        (folder / "sweep.json").write_text(json.dumps(other))
        (folder / "SHA256SUMS").unlink(missing_ok=True)  # Of a sweep before there were any.
        with pytest.raises(ValueError, match=message):
            stand_in("0.1,0.2", seeds=(4,))
        assert json.loads((folder / "sweep.json").read_text()) == other
    assert (folder / "results.csv").read_text() == before
    assert len(list(folder.glob("*/results.csv"))) == 1
    # If no run is finished, none can be mixed.
    next(folder.glob("*/accuracy.png")).unlink()
    _, failures, _ = stand_in("0.1,0.2", seeds=(4,))
    assert failures == []


def test_a_sweep_is_replaced_when_all_runs_of_the_new_one_are_finished(stand_in, tmp_path):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    before = (folder / "results.csv").read_text()
    assert json.loads((folder / "sweep.json").read_text())["finished"]
    for _ in range(2):
        _, failures, printed = stand_in("0.2,0.5", seeds=(4,), overwrite=True)
        assert len(failures) == 1
        assert ".sweep.new" in printed
        assert (folder / "results.csv").read_text() == before
    assert "1 of them finished earlier" in printed
    _, failures, _ = stand_in("0.2,0.3", seeds=(4,), overwrite=True)
    assert failures == []
    assert set(pd.read_csv(folder / "results.csv")["rate"]) == {0.2, 0.3}
    configs = [json.loads(path.read_text()) for path in folder.glob("*/config.json")]
    outs = {str(path.parent) for path in folder.glob("*/config.json")}
    assert {config["out"] for config in configs} == outs
    assert not list(tmp_path.glob(".sweep*"))
    for child in (Path(out) for out in outs):  # Their configurations have changed.
        checksums.check(child, ["config.json", "results.csv"])
    checksums.check(folder, ["sweep.json", "results.csv"])
    stored = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(stored.replace("rate=0.2,0.3", "rate=0.2,0.4"))
    with pytest.raises(ml.FileContentError, match=r"sweep\.json' does not have the checksum"):
        stand_in("0.2,0.4", seeds=(4,))
    (folder / "sweep.json").write_text(stored)
    # A finished sweep with the same options is repeated.
    (finished,) = {path.stat().st_ino for path in folder.glob("results.csv")}
    _, failures, printed = stand_in("0.2,0.3", seeds=(4,), overwrite=True)
    assert "0 of them finished earlier" in printed
    assert (folder / "results.csv").stat().st_ino != finished


def test_runs_of_a_replacement_that_was_given_up_do_not_come_along(stand_in):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    _, failures, _ = stand_in("0.2,0.4,0.5", seeds=(4,), overwrite=True)
    assert len(failures) == 1
    _, failures, printed = stand_in("0.2,0.3", seeds=(4,), overwrite=True)
    assert not failures
    assert "1 of them finished earlier" in printed
    assert set(pd.read_csv(folder / "results.csv")["rate"]) == {0.2, 0.3}
    assert len(list(folder.glob("*/config.json"))) == 2


def test_files_of_users_survive_the_sweep_that_replaces_another(stand_in):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    (child,) = (path.parent for path in folder.glob("*/config.json"))
    assert written.others_in(folder, "sweep") == []
    own = ("notes.txt", f"{child.name}/notes.txt", f"{child.name}/served/2/m", "copy/results.csv")
    shutil.copytree(child, folder / "copy")
    for name in own[:-1]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    before = (folder / "copy" / "results.csv").read_text()
    for rates in ("0.1", "0.2"):  # The same one again, and another one.
        _, failures, printed = stand_in(rates, seeds=(4,), overwrite=True)
        assert not failures
        assert "Kept of what was there: " in printed
        assert [(folder / name).read_text() for name in own] == [*["mine"] * 3, before]
        assert (child / "results.csv").is_file() == (rates == "0.1")
    assert set(pd.read_csv(folder / "results.csv")["rate"]) == {0.2}
    assert not list(folder.parent.glob(".sweep*"))


def test_a_table_that_is_none_of_a_sweep_stays(stand_in, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "results.csv").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"no sweep\.json of a sweep, but results\.csv"):
            stand_in("0.1", seeds=(4,), overwrite=overwrite)
    assert [path.name for path in (tmp_path / "sweep").iterdir()] == ["results.csv"]


def test_damage_is_reported_before_anything_runs(stand_in):
    folder, _, _ = stand_in("0.1", seeds=(4,))
    child, *_ = (path.parent for path in folder.glob("*/config.json"))
    stored = json.loads((child / "config.json").read_text())
    stored |= {"command": "run", "finished": True, "rounds": 1, "controls": []}
    (child / "config.json").write_text(json.dumps(stored | {"control_rounds": []}))
    (child / "SHA256SUMS").unlink()
    assert stand_in("0.1,0.2", seeds=(4,))[1] == []
    rows = (child / "results.csv").read_text().splitlines(keepends=True)
    for content, message in (
        (rows[:-1], r"1 rows of seed 4 .*, but the finished run wrote 2; 1 of 2 in all"),
        ([*rows[:-1], rows[-1].replace("0.2", "abc")], r"line 3: .* 'test_accuracy'"),
        (None, "results.csv' is missing"),
    ):
        (child / "results.csv").unlink()
        if content is not None:
            (child / "results.csv").write_text("".join(content))
        with pytest.raises(ValueError, match=rf"{child.name}.*{message}.*If you delete '.*' here"):
            stand_in("0.1,0.3", seeds=(4,))
        assert len(list(folder.glob("*/config.json"))) == 2
        (child / "results.csv").touch()
    shutil.rmtree(child)
    assert stand_in("0.1,0.3", seeds=(4,))[1] == []
    stored = (folder / "sweep.json").read_text()
    (folder / "sweep.json").write_text(stored[: len(stored) // 2])
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r"its sweep\.json is cut short or damaged .*--out"):
            stand_in("0.1,0.3", seeds=(4,), overwrite=overwrite)


def test_a_sweep_has_its_folder_alone(stand_in, tmp_path):
    with FolderLock(tmp_path / "sweep"), pytest.raises(FolderInUseError, match="is in use by"):
        stand_in("0.1", seeds=(4,))
    assert not (tmp_path / "sweep").exists()


def test_the_folder_of_a_run_is_refused(tmp_path):
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match="folder of a run"):
        sweep(SweepConfig(out=tmp_path))


def test_failures_are_reported_at_the_end_and_the_others_continue(stand_in, capsys):
    folder, failures, printed = stand_in("0.5,0.1", seeds=(0, 1), jobs=1)
    assert [f.child.label for f in failures] == ["rate 0.5, seed 0", "rate 0.5, seed 1"]
    assert {f.message for f in failures} == {"this rate is bad"}
    assert "the rate is 0.5" in failures[0].log.read_text()
    assert set(pd.read_csv(folder / "results.csv")["rate"]) == {0.1}
    assert "rate 0.5, seed 0: failed" in printed
    # The same from the command line, which repeats only the failed runs.
    arguments = ["--over", "rate=0.5,0.1", "--seeds", "0", "1", "--out", str(folder), "--quiet"]
    assert cli.main(["sweep", *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("this rate is bad") == 2
    assert "rate 0.5, seed 1" in captured.err


def test_children_get_their_share_of_the_machine(stand_in):
    folder, _, _ = stand_in("0.1,0.2", seeds=(0,), jobs=2)
    cores = len(processes.available_cores())
    shares = sorted(max(1, share) for share in (cores // 2, cores - cores // 2))
    found = [json.loads(path.read_text()) for path in folder.glob("*/config.json")]
    assert {int(one["threads"]) for one in found} <= set(shares)
    if hasattr(os, "sched_getaffinity"):
        assert {one["cores"] for one in found} <= set(shares)
        assert len(os.sched_getaffinity(0)) == cores
    # A single job runs like `run`.
    folder, _, _ = stand_in("0.3", seeds=(0,), jobs=1)
    found = [json.loads(path.read_text()) for path in folder.glob("*/config.json")]
    assert [one["threads"] for one in found if one["rate"] == 0.3] == ["7"]


def test_an_interruption_ends_the_children(stand_in, tmp_path):
    def interrupt():
        while not (tmp_path / "sweep" / "started").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt) as caught:
        stand_in("0.6,0.1", seeds=(0,), jobs=1)
    (note,) = caught.value.__notes__  # With it, the command says how to resume.
    assert note == f"What is done so far is in {tmp_path / 'sweep'}."
    # The sweep waits for its child, which would have ended with this file; no other has begun.
    assert not list((tmp_path / "sweep").glob("*/accuracy.png"))
    assert len(list((tmp_path / "sweep").glob("*/output.log"))) == 1


@pytest.mark.usefixtures("stand_in")
def test_sweeps_over_supermasks_compare_masks(tmp_path, capsys):
    arguments = ["--learn", "bernoulli", "--over", "weights=initial,signed_constant"]
    for again in (False, True):
        assert cli.main(["sweep-supermask", *arguments, "--out", str(tmp_path / "masks")]) == 0
        printed = capsys.readouterr().out
        assert ("6 runs, 6 of them finished earlier" in printed) == again
        lines = [" ".join(line.split()) for line in printed.splitlines()]
        # Every seed has a different sparsity.
        assert "weights initial initial 70.00 ± 10.00 49%" in lines
        assert "weights signed_constant signed_constant 80.00 ± 10.00 49%" in lines
    table = pd.read_csv(tmp_path / "masks" / "results.csv")
    assert list(table)[:3] == ["run", "seed", "weights"]
    assert len(table) == 6


def test_children_start_as_the_module_of_the_command(tmp_path, monkeypatch):
    from lottery_ticket_pruner.experiments import run

    (child,) = plan(SweepConfig(over=("rate=0.2",), seeds=(3,), out=tmp_path))
    prepared = []
    monkeypatch.setattr(run, "run", lambda config, data: prepared.append(config))
    python, flag, module = processes._COMMAND
    assert (python, flag) == (sys.executable, "-m")
    monkeypatch.setattr(sys, "argv", ["cli.py", *child.arguments])
    monkeypatch.delitem(sys.modules, module)
    with pytest.raises(SystemExit) as caught:
        runpy.run_module(module, run_name="__main__")
    assert caught.value.code == 0
    assert prepared == [child.config]
