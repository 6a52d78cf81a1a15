"""Sentences about results, against what the rows were made to show."""

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

from lottery_ticket_pruner.experiments.reports import conclusions, run_folders, tables
from made_up_runs import row, write_run

pytestmark = pytest.mark.once


def searched(gains, controls, seeds=3):
    """Rows of tickets that differ from a dense network of 90 % and from controls by points."""
    rows = []
    for seed in range(seeds):
        noise = 0.001 * seed
        rows.append(row(0, "dense", seed, 0.9 + noise, 0.0))
        for number, (gain, control) in enumerate(zip(gains, controls, strict=True), 1):
            ticket = 0.9 + noise + gain / 100
            rows.append(row(number, "ticket", seed, ticket, 1 - 0.5**number))
            rows.append(
                row(number, "random_mask", seed, ticket - control[seed] / 100, 1 - 0.5**number)
            )
    return pd.DataFrame(rows).assign(seed=lambda table: table["replicate"])


def test_tickets_that_match_and_beat():
    text = conclusions.of_search(searched([1, 0, -2], [(0, 0, 0), (2, 3, 4), (5, 5, 6)]))
    assert text == (
        "On average over 3 seeds, tickets with as few as 25.00 % of the weights are at least as "
        "accurate as the dense network (90.10 ± 0.10 %). With 12.50 % of the weights, the "
        "accuracy of the tickets is 5.33 points above that of random mask. They beat the control "
        "(random mask) from 25.00 % of the weights on (the 95 % interval of each difference is "
        "above zero)."
    )


def test_a_difference_that_may_be_zero_beats_nothing():
    text = conclusions.of_search(searched([-1], [(5, -1, 2)]))
    assert text.startswith(
        "No ticket is as accurate as the dense network (90.10 ± 0.10 %). The closest is 1.00 "
        "points below it, with 50.00 % of the weights."
    )
    assert text.endswith(
        "the 95 % interval of at least one of these differences is not above zero."
    )
    text = conclusions.of_search(searched([-1, -1, -3], [(5, -1, 2)] * 3))
    assert "The closest is 1.00 points below it, with 25.00 % of the weights." in text
    # The same means from two seeds have no interval, which is said.
    text = conclusions.of_search(searched([-1], [(1, 2)], seeds=2))
    assert text.endswith("of the weights on (2 seeds are too few for an interval).")


def test_equal_differences_do_not_look_certain():
    text = conclusions.of_search(searched([-1], [(1, 1, 1)]))
    assert (
        "1.00 points above that of random mask; at least one of these differences is the same"
        in text
    )
    assert "beat" not in text


def test_unfinished_seeds_and_equal_accuracies():
    rows = searched([1, 1], [(0, 0), (0, 0)], seeds=2)
    rows = rows[(rows["seed"] == 1) | (rows["round"] < 2)]
    text = conclusions.of_search(rows)
    # The dense network of the seed that got furthest, and no difference in favor of either.
    assert text.startswith("In one seed, tickets with as few as 25.00 % of the weights")
    assert "the dense network (90.10 %)" in text
    assert "the accuracy of the tickets is equal to that of random mask. They do not beat" in text


def test_means_that_differ_only_by_the_rounding_of_float32_are_equal():
    equal, *others = np.float32([0.93, 0.96, 0.9]).tolist()
    assert np.mean(others) < equal
    rows = []
    for seed, accuracy in enumerate(others):
        rows.append(row(0, "dense", seed, equal, 0.0))
        rows.append(row(1, "ticket", seed, accuracy, 0.5))
        rows.append(row(1, "random_mask", seed, equal, 0.5))
    rows = pd.DataFrame(rows).assign(seed=lambda table: table["replicate"])
    text = conclusions.of_search(rows)
    assert "are at least as accurate as the dense network" in text
    assert "the accuracy of the tickets is equal to that of random mask" in text
    assert tables._holds_down_to(rows) == "50.00%"
    assert not conclusions._is_above([np.nan, 0.1])


def test_only_accuracies_on_the_same_data_are_compared(tmp_path):
    def compared(name):
        changes = [{"data": "digits", "rate": 0.2}, {"data": name, "rate": 0.3}]
        folders = [
            write_run(tmp_path / name / str(number), **change)
            for number, change in enumerate(changes)
        ]
        return conclusions.of_comparison(run_folders.groups_of(run_folders.find_runs(folders)))

    assert compared("digits").startswith("Of the last tickets, those of rate 0.2 are best")
    assert not compared("mnist")


@pytest.mark.parametrize("sparsities", [(0.5,), (0.5, 0.8)])
def test_a_mask_that_its_own_accuracy_chose_is_said_to_be_one(sparsities):
    rows = [
        {
            "criterion": "random",
            "sparsity": sparsity,
            "seed": 0,
            "test_accuracy": 0.9 - sparsity / 2,
        }
        for sparsity in sparsities
    ]
    chosen = len(sparsities) > 1
    text = conclusions.of_masks(pd.DataFrame(rows))
    assert text.startswith("The best mask reaches 65.00 % test accuracy with 50 % of the weights")
    assert ("It is the best of 2 by this test accuracy itself" in text) == chosen
    note = tables.best_sheet(pd.DataFrame(rows)).note
    assert ("the best of all sparsities, chosen by this accuracy" in note) == chosen


def test_instability_ends_where_all_later_steps_are_stable():
    rows = pd.DataFrame({"rewind_to": [0, 5, 10, 20], "instability": [0.3, 0.01, 0.05, 0.015]})
    assert conclusions.of_instability(rows).startswith("From step 20 on,")
    assert conclusions.of_instability(rows[:3]).startswith("From none of the measured steps")
