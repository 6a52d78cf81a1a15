"""The time that `prune` takes: what ends a search, a training and a fit before their end."""

import math
import time

import pytest

import masked_layers as ml
from lottery_ticket_pruner import prune
from lottery_ticket_pruner.compression import Goals, Options, Plan, attempts, parts_of, search
from lottery_ticket_pruner.compression.attempts import Search
from lottery_ticket_pruner.compression.clock import Clock, Stopwatch
from lottery_ticket_pruner.compression.early_ends import outcome_is_clear
from lottery_ticket_pruner.compression.steps import Workbench
from small_classifier import DATA, SHORT

pytestmark = pytest.mark.once


def test_time_ends_a_search_before_the_next_step(trained):
    result = prune(trained, DATA, 0.5, minutes=1e-9, **SHORT)
    assert [row["method"] for row in result.rows] == ["dense"]
    assert "because of minutes" in result.conclusion
    assert "Each step trained" not in " ".join(result.notes)
    result = prune(trained, DATA, sparsity=0.5, minutes=1e-9, **SHORT)
    assert result.conclusion.startswith("No model meets the goals. The nearest: 0.00% of the")


def test_a_training_ends_when_the_time_is_over_and_what_was_cut_is_said(trained, monkeypatch):
    """The clock runs out in the middle of the second training."""
    trainings = []
    left = property(lambda self: -1.0 if len(trainings) == 2 else 60.0)
    monkeypatch.setattr(Clock, "left", left)
    advance = {"on_training": lambda row, steps: trainings.append(row["step"])}
    result = prune(trained, DATA, sparsity=0.8, minutes=1, **advance, **SHORT)
    assert trainings == [1, 2]
    assert [row["method"] for row in result.rows] == ["dense", "iterative"]
    assert result.sparsity == result.rows[1]["sparsity"] == 0.5
    assert "minutes=1. There was no time for iterative pruning to 75.0%." in result.conclusion
    assert result.test.pruned == pytest.approx(
        result.model.evaluate(*DATA[2], verbose=0, return_dict=True)["accuracy"], abs=1e-6
    )


def test_the_time_counts_from_the_start_and_includes_what_follows(trained):
    plan = Plan(goals=Goals(max_drop=0.5), options=Options.of({"batch_size": 100}), minutes=60)
    for times in ({"started": time.perf_counter() - 3601}, {"reserve": 3601.0}):
        result = search(trained, parts_of(DATA), plan, **times)
        assert [row["method"] for row in result.rows] == ["dense"]
        assert "There was no time for magnitude pruning to 50.0%, then" in result.conclusion
        assert ("minutes nevertheless." in result.conclusion) == ("started" in times)


def test_a_training_ends_when_its_outcome_is_clear(trained):
    whole = 2 * 6
    result = prune(trained, DATA, 0.02, **SHORT)
    trainings = [row for row in result.rows if row["method"] == "iterative"]
    clear = [row for row in trainings if row["steps"] < whole]
    assert clear
    assert all(row["drop"] <= 0.01 or row["drop"] > 0.03 for row in clear)
    assert all(row["steps"] == 0 for row in result.rows if row["method"] != "iterative")
    assert "A training ended when" in " ".join(result.notes)
    # The model at a target is trained to the end.
    towards = prune(trained, DATA, 0.5, sparsity=0.5, method="iterative", **SHORT)
    assert [row["steps"] for row in towards.rows] == [0, whole]


@pytest.mark.parametrize(
    ("drops", "clear"),
    [
        ([0.01], True),  # Half of the tolerance: it needs no training.
        ([0.5, 0.0101], False),
        ([0.5, 0.5], False),  # Too early to give up.
        ([0.5, 0.09, 0.06], False),  # Two more parts lead to 0.
        ([0.5, 0.07, 0.06], True),  # Two more parts lead to 0.04.
        ([0.5, 0.2, 0.1, 0.05], False),
        ([0.5, 0.2, 0.1, 0.09], True),
        ([0.5, 0.1, math.nan], False),
        ([0.5, 0.02, 0.035], False),  # It was near before, so the last part may be chance.
        ([0.5, 0.04, 0.06], True),
    ],
)
def test_the_outcome_of_a_training_is_clear(drops, clear):
    assert outcome_is_clear(drops, 0.02, decays=False) == clear
    if drops[-1] > 0.01:  # A rate that decays may reduce the drop most at the end.
        assert not outcome_is_clear(drops, 0.02, decays=True)


def test_a_training_is_given_up_only_if_chance_cannot_explain_its_drop():
    """Of 120 examples, two wrong ones more or less are about one standard error of five."""
    drops = [0.3, 5 / 120, 6 / 120]
    assert outcome_is_clear(drops, 0.01, decays=False)
    assert not outcome_is_clear(drops, 0.01, decays=False, examples=120)
    assert outcome_is_clear(drops, 0.01, decays=False, examples=1200)


def test_time_that_was_cut_is_spent_when_the_search_is_shown_again(trained, monkeypatch, tmp_path):
    """The clock runs out in the first training, which takes two hours."""
    passed, clock = [], time.perf_counter
    with monkeypatch.context() as patch:
        patch.setattr(time, "perf_counter", lambda: clock() + sum(passed))
        long = {"on_training": lambda row, steps: passed.append(7200)}
        first = prune(trained, DATA, sparsity=0.8, minutes=60, folder=tmp_path, **long, **SHORT)
    assert passed == [7200]
    began = []
    again = {"on_training": lambda row, steps: began.append(row["step"])}
    result = prune(trained, DATA, sparsity=0.8, minutes=60, folder=tmp_path, **again, **SHORT)
    assert not began
    assert "There was no time for iterative pruning to 50.0%" in result.conclusion
    assert len(result.rows) == len(first.rows) == 1


def test_fitting_that_takes_longer_than_training_is_given_up(trained, monkeypatch):
    before = ml.get_masks(ml.convert_to_masked(trained))
    monkeypatch.setattr(attempts, "_FIT_SECONDS", 0.5)
    monkeypatch.setattr(Stopwatch, "seconds", property(lambda self: 1e9))
    monkeypatch.setattr(Workbench, "seconds_to_train", lambda self, ends: 1.0)
    result = prune(trained, DATA, 0.02, **SHORT)
    assert "one_shot" not in {row["method"] for row in result.rows}
    assert "Fitting without training was given up" in " ".join(result.notes)
    assert result.rows[-1]["method"] == "iterative"
    assert before.keys() == ml.get_masks(result.model).keys()


def test_no_later_method_begins_when_the_time_is_over(trained, monkeypatch):
    monkeypatch.setattr(Search, "_is_late", lambda self, stage: stage == "magnitude")
    result = prune(trained, DATA, 0.5, minutes=60, **SHORT)
    assert [row["method"] for row in result.rows] == ["dense"]
