"""Comparison of a killed run with an undisturbed one, on stand-ins for the command."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

# Appended, so that an installed package takes precedence over the source.
sys.path.append(str(Path(__file__).parents[2]))

from benchmarks.checks import resume
from masked_layers import ticket_format
from masked_layers.ticket_format import Entry, Ticket

pytestmark = pytest.mark.once

# Writes lines of results. The run to be killed never gets beyond the second line.
STAND_IN = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
file = folder / "results.csv"
resumed = file.exists()
folder.mkdir(parents=True, exist_ok=True)
with file.open("w") as out:
    print("round,arm,replicate,test_accuracy,seconds", file=out)
    for number in range(4):
        if number == 2 and folder.name == "killed" and not resumed:
            time.sleep(600)
        print(f"{number},ticket,0,{WRONG if resumed else 0.5},0.2", file=out, flush=True)
"""


@pytest.fixture
def folder(tmp_path):
    """Writes the files of a run: results, masks of a round, a ticket."""
    folder = tmp_path / "run"
    (folder / "rounds" / "0").mkdir(parents=True)
    (folder / "results.csv").write_text("round,arm,seconds\n0,dense,1.5\n1,ticket,1.6\n1,tick")
    np.savez(folder / "rounds" / "0" / "masks-01.npz", mask=np.array([1, 0], bool))
    write_ticket(folder / "ticket.safetensors", [0.5, -0.0])
    return folder


def write_ticket(path, values):
    values = np.array(values, "float32")
    kept = np.ones(2, bool)
    entry = Entry(path="fc/kernel", shape=(2,), dtype="float32", kept=kept, values=values)
    path.write_bytes(ticket_format.pack(Ticket({}, [entry], signs_only=False)))


def test_everything_but_times_is_compared_byte_for_byte(folder, tmp_path):
    whole = resume.contents(folder)
    # Two complete lines of two numbers, a mask, the mask and the values of the ticket.
    assert len(whole) == 4 + 1 + 2
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    (other / "results.csv").write_text("round,arm,seconds\n0,dense,9.5\n1,ticket,9.6\n")
    assert resume.compare(whole, resume.contents(other)) == []

    (other / "results.csv").write_text("round,arm,seconds\n0,dense,9.5\n")
    np.savez(other / "rounds" / "0" / "masks-01.npz", mask=np.array([0, 1], bool))
    write_ticket(other / "ticket.safetensors", [0.5, 0.0])
    assert resume.compare(whole, resume.contents(other)) == [
        "results.csv, line 2, arm",
        "results.csv, line 2, round",
        "rounds/0/masks-01.npz: mask",
        "ticket.safetensors: fc/kernel, values",
    ]


@pytest.mark.parametrize("wrong", [0.5, 0.6])
def test_a_run_is_killed_resumed_and_compared(tmp_path, monkeypatch, capsys, wrong):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN.replace("WRONG", str(wrong)))
    monkeypatch.setattr(resume, "COMMAND", (sys.executable, str(script)))
    status = resume.main(["--out", str(tmp_path / "out"), "--any", "--kill-after", "2"])
    printed = capsys.readouterr().out
    assert re.search(r"whole run: \d+ s, 4 lines", printed)
    assert "killed after line 2: ticket of round 1, replicate 0" in printed
    differ = 4 if wrong == 0.6 else 0
    assert f"numbers of results.csv: 16 compared, {differ} differ" in printed
    assert status == bool(differ)


def test_runs_that_end_too_soon_or_fail_say_so(tmp_path, monkeypatch):
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(resume, "COMMAND", (sys.executable, str(script)))
    with pytest.raises(RuntimeError, match="ended before it was killed"):
        resume.run([], tmp_path / "short", kill_after=5)
    script.write_text("import sys; sys.exit('no such data')")
    with pytest.raises(RuntimeError, match="ended with 1: no such data"):
        resume.run([], tmp_path / "failed")
