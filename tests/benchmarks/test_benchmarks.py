"""The arithmetic, order and table of the benchmarks, on trivial contenders."""

import json
import sys
from pathlib import Path

import pytest

# Appended, so that an installed package takes precedence over the source.
sys.path.append(str(Path(__file__).parents[2]))

pytest.importorskip("psutil")
pytest.importorskip("rich")

from benchmarks import __main__ as command
from benchmarks import plan, report, timing

pytestmark = pytest.mark.once


def contender(name, setup="in_turns"):
    return timing.Contender(f"contenders:{setup}", name)


def test_contenders_take_turns_in_one_process_and_missing_ones_are_reported():
    contenders = {"a": contender("a"), "b": contender("b"), "p": contender("x", "needs_a_peer")}
    found, missing = timing.measure(contenders, repeats=3)
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}  # The order is reversed every time.
    assert missing == {"p": "peer is not installed"}


def test_a_contender_that_fails_says_why():
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        timing.measure({"broken": contender("broken")}, repeats=1)


def row(**kwargs):
    defaults = {"benchmark": "b", "what": "w", "ours": [1.0, 2.0, 4.0], "peer": "p", "unit": "s"}
    return report.Row(**{**defaults, "theirs": [2.0, 2.0, 2.0], **kwargs})


@pytest.mark.parametrize(
    ("goal", "faster", "ratio", "met"),
    [
        (1.0, False, 1.0, True),
        (0.9, False, 1.0, False),
        (1.0, True, 1.0, True),
        (1.1, True, 1, False),
    ],
)
def test_goals(goal, faster, ratio, met):
    measured = row(goal=goal, faster=faster)
    assert sorted(measured.ratios)[1] == ratio
    assert measured.met is met
    assert row(goal=goal, ours=[], theirs=[], missing="p is not installed").met is None


def test_the_command_saves_the_table(tmp_path, monkeypatch, capsys):
    def toy(quick):
        """A toy."""
        limit = plan.Comparison("ours", "a", "theirs", "b", goal=0.1 if quick else 10.0)
        gone = plan.Comparison("ours", "a", "not there", "p")
        contenders = {"a": contender("a"), "b": contender("b"), "p": contender("x", "needs_a_peer")}
        yield plan.Group(contenders, (limit, gone), 2)

    monkeypatch.setattr(command, "BENCHMARKS", {"toy": toy})
    document = tmp_path / "page.md"
    document.write_text(
        "before\n<!-- benchmarks all -->\nold\n<!-- end of benchmarks all -->\nafter\n"
    )
    assert command.main(["--out", str(tmp_path), "--markdown", str(document)]) == 0
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [r["ours"] for r in saved["rows"]] == [[1, 4], [1, 4]]
    assert saved["rows"][0]["theirs"] == [2, 3]
    assert saved["rows"][0]["met"] is True
    assert saved["rows"][1]["missing"] == "peer is not installed"
    page = document.read_text()
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    assert "old" not in page
    assert "| ours | 2.5 (1 to 4) ms a step | theirs |" in page
    assert "peer is not installed" in capsys.readouterr().out
    assert command.main(["--quick", "--out", str(tmp_path)]) == 1
    document.write_text("no markers")
    with pytest.raises(ValueError, match="benchmarks all"):
        command.main(["--markdown", str(document)])
    with pytest.raises(SystemExit):
        command.main(["unknown"])


def test_the_plan_names_functions_that_are_there():
    keys = set()
    for benchmark in plan.BENCHMARKS.values():
        for group in benchmark(True):
            used = {key for row in group.comparisons for key in (row.ours, row.theirs)}
            assert used == group.contenders.keys()
            keys |= {contender.setup for contender in group.contenders.values()}
    for key in keys:
        module, _, function = key.partition(":")
        source = Path(__file__).parents[2] / f"{module.replace('.', '/')}.py"
        assert f"def {function}(" in source.read_text()


def test_masked_and_plain_networks_step_in_the_same_loop():
    from benchmarks import training

    contenders = training.masked_and_plain("lenet-300-100", batch_size=4, steps=2)
    assert contenders.keys() == {"masked", "plain"}
    assert all(0 < run() < 60_000 for run in contenders.values())
