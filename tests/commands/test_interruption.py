"""Interruptions, removed folders, killed sweeps: messages, and what is left behind."""

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner import cli, training
from lottery_ticket_pruner.experiments import parent
from lottery_ticket_pruner.folders import FolderLock

pytestmark = pytest.mark.once

ROOT = Path(__file__).resolve().parents[2]
START = "import sys, _lottery_ticket; sys.exit(_lottery_ticket.main())"
RUN = ["run", "--rounds", "1", "--steps", "4", "--seeds", "0", "--controls", "--quiet"]


def interrupted(*args, **kwargs):
    raise KeyboardInterrupt


def test_the_message_names_the_folder_and_the_command(tmp_path, capsys, monkeypatch):
    out = tmp_path / "my run"
    train, left = training.train_by_plan, iter(range(2))

    def dense_alone(*args, **kwargs):
        return (train if next(left, None) is not None else interrupted)(*args, **kwargs)

    monkeypatch.setattr(training, "train_by_plan", dense_alone)
    assert cli.main([*RUN, "--out", str(out)]) == 130
    error = capsys.readouterr().err
    command = f"lottery-ticket {' '.join(RUN)} --out '{out}'"
    assert error == (
        f"Interrupted. What is done so far is in {out}. To resume, repeat: {command}\n"
    )
    monkeypatch.setattr(training, "train_by_plan", train)
    assert cli.main([*RUN, "--out", str(out)]) == 0
    assert len((out / "results.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("command", [["inspect", "a.keras"], ["report", "a"], RUN])
def test_without_a_folder_there_is_none_to_name(command, tmp_path, capsys, monkeypatch):
    from lottery_ticket_pruner.commands import report
    from lottery_ticket_pruner.experiments import run
    from masked_layers import serving

    monkeypatch.setattr(serving, "inspect", interrupted)
    monkeypatch.setattr(report, "write_report", interrupted)
    monkeypatch.setattr(run, "compiled_network", interrupted)  # Before anything is written.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.keras").touch()
    out = ["--out", str(tmp_path / "run")] if command is RUN else []
    assert cli.main([*command, *out]) == 130
    assert capsys.readouterr().err == "Interrupted.\n"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(os.name == "nt", reason="needs signals")
@pytest.mark.parametrize("moment", ["import", "work", "end"])
def test_no_moment_of_the_process_ends_in_a_traceback(moment, tmp_path):
    package = tmp_path / "lottery_ticket_pruner"
    package.mkdir()
    # Imports that swallow the exception, work that does not, and a slow end.
    lines = {
        "import": "try: wait()\nexcept BaseException: pass\n",
        "work": "def main(options):\n  try: wait()\n  except KeyboardInterrupt: return 130\n",
        "end": "import atexit\natexit.register(wait)\ndef main(options): return 0\n",
    }
    wait = "import time\ndef wait():\n  print('there', flush=True)\n  time.sleep(600)\n"
    (package / "__init__.py").touch()
    (package / "cli.py").write_text(wait + lines[moment])
    process = subprocess.Popen(
        [sys.executable, "-c", START, "inspect", "a.keras"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        # A test run in the background may ignore the signal.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "there\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=300)
    assert error == ("Interrupted.\n" if moment == "import" else "")
    assert process.returncode == (0 if moment == "end" else 130)


def test_a_folder_that_is_removed_or_in_use_ends_the_run(tmp_path, capsys, monkeypatch):
    out, train = tmp_path / "run", training.train_by_plan

    def remove(*args, **kwargs):
        shutil.rmtree(out, ignore_errors=True)
        return train(*args, **kwargs)

    with FolderLock(out):
        assert cli.main([*RUN, "--out", str(out)]) == 2
    assert f"'{out}' is in use by process {os.getpid()} on " in capsys.readouterr().err
    monkeypatch.setattr(training, "train_by_plan", remove)
    assert cli.main([*RUN, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert "removed or replaced" in captured.err
    assert captured.out == ""
    assert not out.exists()


# --- Sweeps ---------------------------------------------------------------------------------------

# A run that prints its process id, and works while its sweep is alive.
CHILD = """
import os, pathlib, runpy, sys, time
runpy.run_path(sys.argv[1])["end_with_parent"]()
(pathlib.Path(sys.argv[sys.argv.index("--out") + 1]) / "pid").write_text(str(os.getpid()))
time.sleep(600)
"""
SWEEP = """
import sys
from lottery_ticket_pruner import cli
from lottery_ticket_pruner.commands import processes
processes._COMMAND = (sys.executable, *sys.argv[1:3])
cli.main(["sweep", "--over", "rate=0.1,0.2", "--seeds", "0", "--jobs", "2", "--quiet",
          "--out", sys.argv[3]])
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc")
def test_the_runs_of_a_killed_sweep_end_with_it(tmp_path):
    (tmp_path / "child.py").write_text(CHILD)
    arguments = [str(tmp_path / "child.py"), parent.__file__, str(tmp_path / "sweep")]
    process = subprocess.Popen([sys.executable, "-c", SWEEP, *arguments])
    try:
        deadline = time.monotonic() + 240
        pids = []
        while len(pids) < 2 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.1)
            texts = [file.read_text() for file in (tmp_path / "sweep").glob("*/pid")]
            pids = [int(text) for text in texts if text]
        assert len(pids) == 2
        assert all(map(alive, pids))
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 120
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
    # The sweep has also released its folder.
    with FolderLock(tmp_path / "sweep"):
        pass


def test_a_run_without_a_sweep_does_not_look_at_its_input(monkeypatch):
    started = []
    monkeypatch.setattr(parent.threading, "Thread", lambda **_: started.append(1))
    monkeypatch.delenv(parent.PARENT, raising=False)
    parent.end_with_parent()
    assert not started
