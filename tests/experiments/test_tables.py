"""Rows, groups of runs, tables and figures, on made-up results."""

import dataclasses
import io
import json
import math

import numpy as np
import pandas as pd
import pytest

pytest.importorskip("tyro")
pytest.importorskip("matplotlib")

import scipy.stats
from rich.console import Console

from lottery_ticket_pruner.experiments import progress, results
from lottery_ticket_pruner.experiments.reports import (
    contents,
    figures,
    run_folders,
    statistics,
    tables,
)
from made_up_runs import ROWS, row, write_run

pytestmark = pytest.mark.once


def test_names_of_users_are_no_emoji(capsys):
    name = "mine.py:fire: [red]"
    progress.console().print(
        tables.Sheet(name, (name, "accuracy"), ((name, "1"),), names=1).table()
    )
    assert capsys.readouterr().out.count(name) == 3


def pooled(rows):
    return pd.DataFrame(rows).assign(seed=lambda table: table["replicate"])


def rendered(table, width=100):
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return [line.split() for line in console.file.getvalue().splitlines()]


# --- Tables ---------------------------------------------------------------------------------------


def test_the_table_of_means_and_deviations():
    lines = rendered(tables.summary_table(ROWS))
    assert ["dense", "100.00%", "91.00", "±", "1.41", "5"] in lines
    wanted = ["1", "50.00%", "90.00", "±", "14.14", "60.00", "±", "14.14", "5"]
    assert wanted in lines
    single = rendered(tables.summary_table(ROWS[:3]))
    assert ["1", "50.00%", "80.00", "50.00", "0"] in single


def test_a_round_without_its_ticket_yet_has_a_line():
    lines = rendered(tables.summary_table(ROWS[:2]))
    assert ["1", "50.00%", "50.00"] in lines


def test_the_table_of_all_controls_fits_a_terminal():
    arms = [*statistics.LABELS, "something_else"]
    rows = [row(min(n, 1), arm, r, 0.9 + r / 50, 0.5) for n, arm in enumerate(arms) for r in (0, 1)]
    lines = rendered(tables.summary_table([r for r in rows if r["arm"] != "something_else"]), 80)
    assert ["1", "50.00%", *["91.00±1.41"] * 5, "5"] in lines
    assert "…" not in str(lines)
    assert statistics.arms_of(pd.DataFrame(rows))[-1] == "something_else"
    assert ["something"] in [line[-2:-1] for line in rendered(tables.summary_table(rows), 120)]


def test_names_of_groups_stay_readable_in_a_full_overview(tmp_path):
    """With channels, deviations and long controls, numbers may be cut, but never the names."""
    strategies = ("large_final", "magnitude_increase")
    for strategy in strategies:
        rows = [
            {**row(n, arm, seed, 0.9 + n / 50 + seed / 100, n / 2), "channels": 1 - n / 3}
            for n in (0, 1)
            for seed in (0, 1)
            for arm in (("dense",) if n == 0 else ("ticket", "random_mask"))
        ]
        write_run(tmp_path / strategy, rows, strategy=strategy)
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    sheet = tables.overview_sheet(groups)
    lines = rendered(sheet.table(), 80)
    assert max(len(" ".join(line)) for line in lines) <= 80
    text = "".join(line[0] for line in lines if line)
    for strategy in strategies:
        assert strategy[:12] in text
    wider = dataclasses.replace(
        sheet,
        headings=(*sheet.headings, "loss"),
        lines=tuple((*line, "0.1000 ± 0.0000") for line in sheet.lines),
    )
    text = "".join(line[0] for line in rendered(wider.table(), 80) if line)
    for strategy in strategies:
        assert strategy[:8] in text


def test_the_table_of_masks_fits_a_terminal():
    """The best level of every mask, with seeds matched by the order of their levels."""
    rows = pd.DataFrame(
        {"criterion": criterion, "weights": weights, "dwr": dwr, "seed": seed,
         "sparsity": 0.9 * level + seed / 1000, "test_accuracy": 0.5 + level / 4 + seed / 100}
        for criterion in ("large_final", "magnitude_increase_same_sign")
        for weights in ("initial", "signed_constant")
        for dwr in (False, True)
        for seed in (1, 3)
        for level in (0, 1)
    )  # fmt: skip
    lines = rendered(tables.best_sheet(rows).table(), 80)
    # 10 % of the weights less 0.1 and 0.3 points.
    place = lines.index(["large_final", *["77.00±1.41"] * 4])
    assert lines[place + 1] == ["at", "9.8%"] * 4
    assert ["magnitude_increase_same_sign", *["77.00±1.41"] * 4] in lines
    assert "…" not in str(lines)


def test_a_table_of_89_columns_keeps_names_whole_on_80():
    """Without its blanks between columns it would fit."""
    headings = ("step", "method", "sparsity", "validation", "drop", "trained", "seconds", "")
    line = ("10", "sensitivity", "95.58%", "0.9118", "+0.0441", "406 steps", "0.3", "accepted")
    lines = rendered(tables.Sheet("tried", headings, (line,), names=2).table(), 80)
    assert headings[1] in lines[2]
    assert " ".join(line).split() in lines


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    ticket, mask = rng.uniform(0.8, 0.9, (2, 4))
    rows = [row(1, "ticket", r, ticket[r], 0.5) for r in (2, 0, 1, 3)]
    rows += [row(1, "random_mask", r, mask[r], 0.5) for r in range(4)]
    rows += [row(0, "dense", 0, 0.9, 0.0)]
    sheet = tables.difference_sheet(pooled(rows))
    assert sheet.headings == ("round", "weights", "minus dense", "minus random mask")
    test = scipy.stats.ttest_rel(ticket, mask)
    half = 100 * (test.confidence_interval(0.95).high - (ticket - mask).mean())
    mean = 100 * (ticket - mask).mean()
    expected = f"{mean:+.2f} ± {half:.2f}"
    versus_dense = f"{100 * (ticket[0] - 0.9):+.2f}"
    assert sheet.lines == (("1", "50.00%", versus_dense, expected),)
    assert not sheet.note


def test_equal_differences_have_no_interval_and_zero_no_sign():
    rows = [row(1, arm, r, 0.9, 0.5) for arm in ("ticket", "random_mask") for r in range(3)]
    rows += [row(0, "dense", r, 0.9 - 1e-7 * r, 0.0) for r in range(3)]
    sheet = tables.difference_sheet(pooled(rows))
    assert sheet.lines == (("1", "50.00%", "0.00 (3 equal)", "0.00 (3 equal)"),)
    assert "tells nothing about its spread" in sheet.note
    assert "± 0.00: all replicates are equal" in tables.accuracy_sheet(pooled(rows)).note
    lines = figures.arm_lines(pooled(rows))
    assert "none where all are equal" in figures.describe_spread(lines)


# --- Figures --------------------------------------------------------------------------------------


def test_intervals_are_those_of_the_t_test():
    values = [0.91, 0.93, 0.92, 0.97]
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert statistics.interval(values) == pytest.approx((expected.low, expected.high))
    # Equal values tell nothing about their spread. 0.97 - 0.96 is 0.010000000000000009.
    assert statistics.interval([0.97 - 0.96, 0.01, 0.01]) is None
    assert statistics.interval([0.4, 0.3]) == (0.3, 0.4)
    assert statistics.interval([0.4]) == (0.4, 0.4)


def test_captions_describe_the_bands():
    assert statistics.describe_bands([1, 1]) == ""
    assert statistics.describe_bands([2, 1]) == "Bands: lowest to highest of 2 replicates"
    assert "95 % confidence intervals" in statistics.describe_bands([3])
    assert "Student's t, 3 to 5 replicates" in statistics.describe_bands([5, 3, 5])


def test_the_picture_draws_every_arm_with_its_band():
    rows = [*ROWS, *[{**r, "round": 2, "sparsity": 0.75} for r in ROWS if r["round"]]]
    figure = figures.accuracy_figure(rows, "a title")
    axes = figure.axes[0]
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert set(lines) == {"dense, 91.00 %", "ticket", "random mask"}
    np.testing.assert_allclose(lines["ticket"].get_xdata(), [50, 25])
    np.testing.assert_allclose(lines["ticket"].get_ydata(), [10, 10])
    assert len(axes.collections) == 2
    assert "lowest to highest of 2 replicates" in axes.get_title()
    formatted = axes.yaxis.get_major_formatter()(10)
    assert formatted == "90 %"
    # The band ends at an error of zero, which has no logarithm, beyond the edge.
    assert math.isfinite(axes.get_ylim()[1])


@pytest.mark.parametrize(("levels", "scale"), [((1.0, 1.0), "linear"), ((1.0, 0.9), "symlog")])
def test_a_perfect_accuracy_is_drawn_at_100_percent(levels, scale):
    rows = [row(n, "ticket", 0, levels[n - 1], 0.5 * n) for n in (1, 2)]
    axes = figures.accuracy_figure(rows, "").axes[0]
    (line,) = axes.get_lines()
    assert axes.get_yscale() == scale
    assert line.get_ydata()[0] == 0
    assert 0 in axes.yaxis.get_ticklocs()
    labels = dict(zip(axes.yaxis.get_ticklocs(), axes.yaxis.get_ticklabels(), strict=True))
    assert labels[0].get_text() == "100 %"
    low, high = axes.get_ylim()
    assert high < 0 < low


def test_equal_replicates_have_no_band_and_a_band_between_them_is_a_bar():
    levels = ([0.9] * 3, [0.8, 0.81, 0.82], [0.7] * 3)
    rows = [
        row(n, "ticket", r, a, 0.2 * n)
        for n, own in enumerate(levels, 1)
        for r, a in enumerate(own)
    ]
    axes = figures.accuracy_figure(rows, "").axes[0]
    band, bar = axes.collections
    for path in band.get_paths():
        np.testing.assert_allclose(path.vertices[:, 0], 60)
    low, high = statistics.interval(levels[1])
    ends = [100 * (1 - low), 100 * (1 - high)]
    np.testing.assert_allclose(bar.get_segments(), [[[60, end] for end in ends]])


def test_bands_of_three_replicates_are_confidence_intervals():
    accuracies = [0.9, 0.92, 0.91]
    rows = [row(n, "ticket", r, a, 0.5 * n) for n in (1, 2) for r, a in enumerate(accuracies)]
    axes = figures.accuracy_figure(rows, "").axes[0]
    low, high = statistics.interval(accuracies)
    corners = axes.collections[0].get_paths()[0].vertices[:, 1]
    assert corners.min() == pytest.approx(100 * (1 - high))
    assert corners.max() == pytest.approx(100 * (1 - low))


@pytest.mark.parametrize("levels", [(0.979, 0.9795), (0.1, 0.99), (1.0, 1.0), (0.5, 0.5)])
def test_axes_always_have_ticks(levels):
    rows = [row(1, "ticket", 0, levels[0], 0.1), row(2, "ticket", 0, levels[1], 0.19)]
    axes = figures.accuracy_figure(rows, "").axes[0]
    for axis, (one, other) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        ticks = axis.get_ticklocs()
        assert len(ticks) >= 2
        assert min(one, other) <= min(ticks) <= max(ticks) <= max(one, other)


def test_unknown_arms_and_rows_without_a_dense_run_are_drawn():
    rows = [row(1, arm, 0, 0.5, 0.5) for arm in ("mine", "ticket", "reinit_same_sign")]
    axes = figures.accuracy_figure(rows, "").axes[0]
    labels = [line.get_label() for line in axes.get_lines()]
    assert labels == ["ticket", "reinit same signs", "mine"]
    assert len({line.get_color() for line in axes.get_lines()}) == 3


# --- Rows and folders -----------------------------------------------------------------------------


def test_rows_survive_their_file(tmp_path):
    writer = results.CsvWriter(tmp_path / "rows.csv")
    for one in ROWS:
        writer.write(one)
    assert results.read_rows(tmp_path / "rows.csv") == ROWS
    writer.close()


def test_rows_are_read_to_the_last_bit(tmp_path):
    numbers = np.random.default_rng(0).random(1000)
    pd.DataFrame({"test_loss": numbers}).to_csv(tmp_path / "rows.csv", index=False)
    again = [row["test_loss"] for row in results.read_rows(tmp_path / "rows.csv")]
    np.testing.assert_array_equal(again, numbers)


@pytest.mark.parametrize("cut", [1, 2, 9])
def test_a_line_without_its_end_is_left_out(tmp_path, cut):
    # Of "0.2\r\n", either its end or half of it or more is cut, but it never becomes another
    # number.
    write_run(tmp_path / "a", ROWS[:3])
    whole = results.read_rows(tmp_path / "a" / "results.csv")
    file = tmp_path / "a" / "results.csv"
    file.write_bytes(file.read_bytes()[:-cut])
    assert results.read_rows(file) == whole[:-1]
    with pytest.warns(UserWarning, match=r"results.csv' ends in the middle of a line"):
        (run,) = run_folders.find_runs([tmp_path / "a"])
    assert len(run.rows) == 2


def test_rows_are_not_written_to_a_file_that_is_gone(tmp_path):
    writer = results.CsvWriter(tmp_path / "rows.csv")
    writer.write(ROWS[0])
    (tmp_path / "rows.csv").unlink()
    with pytest.raises(FileNotFoundError, match="removed or replaced"):
        writer.write(ROWS[1])
    writer.close()


def test_runs_that_differ_in_seeds_alone_are_replicates(tmp_path):
    write_run(tmp_path / "b", seeds=[9, 8])
    write_run(tmp_path / "a", ROWS[:4])
    runs = run_folders.find_runs([tmp_path, tmp_path / "a"])
    assert [run.folder.name for run in runs] == ["a", "b"]
    (group,) = run_folders.groups_of(runs)
    assert group.title == "digits, lenet-300-100, large_final"
    # Seed 8 is in both runs, and counts once, from the run that got further.
    assert sorted(zip(group.rows["seed"], group.rows["round"], strict=True)) == sorted(
        [(7, 0), (7, 1), (7, 1), (8, 0), (8, 1), (8, 1), (9, 0), (9, 1), (9, 1)]
    )


def test_labels_name_options_that_differ_independently(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rate=0.4, output_rate=0.2)
    write_run(tmp_path / "c", strategy="random", controls=[])
    write_run(tmp_path / "d", strategy="random", rounds=2, steps=9, controls=[])
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == [
        "large_final, rounds 1, rate 0.2, steps 50",
        "large_final, rounds 1, rate 0.4, steps 50",
        "random, rounds 1, rate 0.2, steps 50",
        "random, rounds 2, rate 0.2, steps 9",
    ]


def test_runs_of_two_backends_or_data_sets_are_distinguished(tmp_path):
    for name, origin in (("a", ("jax", "1")), ("b", ("torch", "1")), ("c", ("jax", "2"))):
        write_run(tmp_path / name, **dict(zip(results.ORIGIN, origin, strict=True)))
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == [
        "backend jax, data digest 1", "backend torch, data digest 1", "backend jax, data digest 2",
    ]  # fmt: skip


def test_data_sets_of_two_names_are_called_by_these(tmp_path):
    for name in ("digits", "mnist"):
        write_run(tmp_path / name, data=name, backend="jax", data_digest=f"of {name}")
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == ["digits", "mnist"]


def test_code_is_named_only_where_nothing_else_tells_runs_apart(tmp_path):
    write_run(tmp_path / "a", strategy="mine.py:best", code="best python3.11-1")
    write_run(tmp_path / "b", strategy="random")
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == ["mine.py:best", "random"]
    write_run(tmp_path / "c", strategy="mine.py:best", code="best python3.11-2")
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == [
        "mine.py:best, code best python3.11-1", "random", "mine.py:best, code best python3.11-2",
    ]  # fmt: skip


def test_a_run_that_has_only_its_dense_row_has_its_tables(tmp_path):
    write_run(tmp_path / "a", [ROWS[0]])
    (group,) = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert rendered(tables.accuracy_sheet(group.rows).table())
    assert tables.accuracy_sheet(group.rows).lines == (("dense", "100.00%", "90.00", "0"),)
    assert tables.overview_sheet([group]).table().row_count == 1


def test_labels_without_a_value_name_the_alternative(tmp_path):
    write_run(tmp_path / "a", final_sparsity=None)
    write_run(tmp_path / "b", rate=None, output_rate=None, final_sparsity=0.9)
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert groups[0].label == "rate 0.2, output rate 0.1"
    assert groups[1].label == "final sparsity 0.9"


def test_masks_that_were_not_learned_are_called_untrained(tmp_path):
    for name, learn in (("a", None), ("b", "bernoulli")):
        folder = write_run(tmp_path / name, [{"replicate": 0, "sparsity": 0.5, "weights": "initial",
                                              "dwr": False, "test_accuracy": 0.5}])  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"data": "digits", "learn": learn}))
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == ["untrained", "bernoulli"]


def test_labels_do_not_name_options_of_other_commands(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", strategy="random")
    point = {"replicate": 0, "rewind_to": 0, "sparsity": 0.0, "instability": 0.01,
             "loss_barrier": 0.1, "test_accuracy": 0.9, "lowest_accuracy": 0.8}  # fmt: skip
    folder = write_run(tmp_path / "c", [point])
    options = {"data": "digits", "network": "lenet-300-100", "points": 30, "seeds": [7]}
    (folder / "config.json").write_text(json.dumps(options))
    groups = run_folders.groups_of(run_folders.find_runs([tmp_path]))
    assert [group.label for group in groups] == ["large_final", "random", ""]
    assert groups[2].title == "digits, lenet-300-100, instability"
    sheet = tables.instability_sheet(groups[2].rows)
    assert sheet.lines == (("0", "100.00%", "1.00", "0.100", "90.00", "80.00"),)


def test_tickets_are_compared_at_six_rounds_at_most(tmp_path):
    rows = [row(n, "ticket", r, 0.9 + n / 1000 + r / 100, 1 - 0.8**n)
            for n in range(1, 12) for r in (0, 1)]  # fmt: skip
    write_run(tmp_path / "a", rows)
    write_run(tmp_path / "b", rows[:6], strategy="random")
    overview, sheet = contents.overviews(run_folders.groups_of(run_folders.find_runs([tmp_path])))
    assert overview.lines[0][0] == "large_final"
    assert sheet.headings == ("", "80.00%", "51.20%", "32.77%", "20.97%", "13.42%", "8.59%")
    assert sheet.lines[0][1:3] == ("90.60 ± 0.71", "90.80 ± 0.71")
    assert sheet.lines[1] == ("random", "90.60 ± 0.71", "90.80 ± 0.71", "", "", "", "")


def test_the_tidy_table_has_options_and_seeds(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", rate=0.4, controls=[])
    table = run_folders.tidy(run_folders.find_runs([tmp_path]))
    named = ["data", "network", "strategy"]
    assert list(table)[:8] == ["run", *named, "rate", "controls", "seed", "round"]
    assert "replicate" not in table
    assert len(table) == 12
    assert set(table.loc[table["run"] == "b", "controls"]) == {"none"}
    assert sorted(set(table["seed"])) == [7, 8]


def foreign(folder, **files):
    folder.mkdir()
    for name, content in files.items():
        (folder / {"config": "config.json", "results": "results.csv"}[name]).write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a run folder"),
        ({"config": b"{}"}, "neither a run folder"),
        (
            {"config": b"{", "results": b"replicate,sparsity,test_accuracy\n"},
            "cannot be read as a run",
        ),
        (
            {"config": b"[]", "results": b"replicate,sparsity,test_accuracy\n0,0,1\n"},
            "does not contain options",
        ),
        ({"config": b"{}", "results": b""}, "was not written by a command"),
        ({"config": b"{}", "results": b"\xff\xfe\x00"}, "no whole line"),
        ({"config": b"{}", "results": b"a,b\n1,2\n"}, r"lacks the columns.*It has: \['a', 'b'\]"),
        ({"config": b"{}", "results": b"replicate,sparsity,test_accuracy\n"}, "no results yet"),
        (
            {"config": b"{}", "results": b"replicate,sparsity,test_accuracy\n0,0,high\n"},
            "'test_accuracy'",
        ),
    ],
)
def test_foreign_folders_are_explained(tmp_path, files, message):
    folder = foreign(tmp_path / "folder", **files)
    with pytest.raises(ValueError, match=message) as caught:
        run_folders.find_runs([folder])
    assert str(folder) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        run_folders.find_runs([tmp_path / "nowhere"])


def test_runs_without_results_yet_are_passed_over_in_a_folder_of_runs(tmp_path):
    write_run(tmp_path / "a")
    foreign(tmp_path / "b", config=b"{}", results=b"replicate,sparsity,test_accuracy\n")
    foreign(tmp_path / "c")
    assert [run.folder.name for run in run_folders.find_runs([tmp_path])] == ["a"]


def test_the_overview_says_how_far_tickets_hold_up(tmp_path):
    accuracies = {1: (0.95, 0.91), 2: (0.93, 0.80), 3: (0.94, 0.96), 4: (0.5, 0.4)}
    rows = [row(0, "dense", 0, 0.94, 0.0)]
    for number, (ticket, mask) in accuracies.items():
        rows.append(row(number, "random_mask", 0, mask, 0.2 * number))
        rows.append(row(number, "ticket", 0, ticket, 0.2 * number))
    write_run(tmp_path / "a", rows)
    write_run(
        tmp_path / "b", [r for r in rows if r["arm"] != "random_mask"][:3], rounds=2, rate=0.4
    )
    sheet = tables.overview_sheet(run_folders.groups_of(run_folders.find_runs([tmp_path])))
    # Where it last matched the dense network's 94 %: 40 % of the weights, in the third round.
    assert sheet.lines == (
        ("rounds 1, rate 0.2", "1", "20.00%", "94.00", "50.00", "40.00", "40.00%"),
        ("rounds 2, rate 0.4", "1", "60.00%", "94.00", "93.00", "", "80.00%"),
    )
    # Only one of three seeds has reached the last round; it is compared with its own dense run.
    more = [row(0, "dense", n, 0.99, 0.0) for n in (1, 2)]
    folder = write_run(tmp_path / "c" / "d", [*rows, *more], seeds=[7, 8, 9])
    (unfinished,) = run_folders.groups_of(run_folders.find_runs([folder]))
    assert tables.overview_sheet([unfinished]).lines[0][1:] == (
        "1 of 3", "20.00%", "94.00", "50.00", "40.00", "40.00%",
    )  # fmt: skip
    assert "deviation of up to 3 replicates" in tables.accuracy_sheet(unfinished.rows).title
    alone = tables.overview_sheet(run_folders.groups_of(run_folders.find_runs([tmp_path / "b"])))
    assert "best control" not in alone.headings
    assert alone.lines[0][0] == "digits, lenet-300-100, large_final"


@pytest.mark.parametrize(
    ("values", "text"),
    [([], ""), ([np.nan], ""), ([0.5, np.nan], "0.50"), ([0.5, np.nan, 1.5], "1.00 ± 0.71")],
)
def test_missing_values_do_not_count(values, text):
    assert statistics.spread(values, "{:.2f}") == text
    assert statistics.spread(pd.Series(values, dtype=float), "{:.2f}") == text
