"""`prune`: what it returns, goals and methods, and resuming, on a small classifier."""

import json
import math

import keras
import numpy as np
import pytest
from keras import layers

import lottery_ticket_pruner
import masked_layers as ml
from lottery_ticket_pruner import Latency, LotteryTicketPruner, latencies, prune
from lottery_ticket_pruner.compression import Goals, compare_models, served_size, verdict_of
from lottery_ticket_pruner.compression.conclusions import Judge, verdict
from lottery_ticket_pruner.compression.metrics import Comparison
from lottery_ticket_pruner.compression.states import Progress, State
from lottery_ticket_pruner.fingerprints import of_json
from lottery_ticket_pruner.folders import FolderInUseError
from small_classifier import DATA, SHORT, classes, make_model

METHODS = ["dense", "magnitude", "sensitivity", "one_shot", "iterative"]


@pytest.fixture(scope="module")
def result(trained):
    return prune(trained, DATA, 0.02, **SHORT)


def test_the_sparsest_model_within_the_tolerance_is_returned(trained, result):
    dense, *rows = result.rows
    assert dense["method"] == "dense"
    assert [row["accepted"] for row in rows] == [row["drop"] <= 0.02 for row in rows]
    best = max((row for row in rows if row["accepted"]), key=lambda row: row["sparsity"])
    assert result.sparsity == best["sparsity"] == ml.sparsity_report(result.model).sparsity > 0.5
    evaluated = result.model.evaluate(*DATA[1], verbose=0, return_dict=True)["accuracy"]
    assert evaluated == pytest.approx(best["validation"])
    assert dense["validation"] - evaluated == pytest.approx(best["drop"])
    # Pruning without training comes first, and training goes on from its best model.
    methods = [row["method"] for row in result.rows]
    assert methods == sorted(methods, key=METHODS.index)
    assert {"magnitude", "one_shot", "iterative"} <= set(methods)
    assert result.meets_goals


def test_the_test_data_compares_it_with_the_dense_model(trained, result):
    test = result.test
    accuracies = [
        model.evaluate(*DATA[2], verbose=0, return_dict=True)["accuracy"]
        for model in (trained, result.model)
    ]
    assert [test.dense, test.pruned] == pytest.approx(accuracies, abs=1e-6)
    assert test.drop == pytest.approx(accuracies[0] - accuracies[1], abs=1e-6)
    assert test.interval[0] <= test.drop <= test.interval[1]
    assert test.examples == 300


def test_the_model_that_was_passed_is_not_changed(trained, result):
    assert result.model is not trained
    assert all(ref.mask is None for ref in ml.weight_refs(trained))


def test_the_result_prints_as_a_table_and_sentences(result):
    text = str(result)
    headings = "step method sparsity validation drop, points trained seconds"
    assert text.splitlines()[0].split() == headings.split()
    assert "The model was trained already" in text
    assert f"{result.sparsity:.2%} of the weights are pruned" in text
    assert "test: accuracy" in text


class StoppedError(Exception):
    pass


class Listener:
    """A listener that cannot be copied, like those with a lock."""

    def __init__(self):
        self.rows, self.trainings, self.steps = [], [], 0

    def __deepcopy__(self, memo):
        raise AssertionError

    def show(self, row):
        self.rows.append(row)

    def begin(self, row, steps):
        self.trainings.append((row, steps))

    def advance(self, steps):
        self.steps += steps


@pytest.fixture(scope="module")
def listened(trained):
    """The model with 70 % of its weights pruned, and what listeners were told."""
    listener = Listener()
    told = {"on_row": listener.show, "on_training": listener.begin}
    found = prune(trained, DATA, sparsity=0.7, on_progress=listener.advance, **told, **SHORT)
    return found, listener


@pytest.mark.once
def test_listeners_are_told_of_rows_and_steps_of_training(listened):
    _, listener = listened
    assert [row["step"] for row in listener.rows] == [0, 1, 2]
    assert [(row["step"], steps) for row, steps in listener.trainings] == [(1, 12), (2, 12)]
    assert listener.steps == 24
    elapsed = [row["elapsed"] for row in listener.rows]
    assert elapsed == sorted(elapsed)
    assert listener.rows[-1]["remaining"] == 0
    assert listener.rows[1]["remaining"] == pytest.approx(listener.rows[1]["seconds"])


@pytest.mark.slow("jax")
@pytest.mark.parametrize("left", [pytest.param(2, marks=pytest.mark.slow), 7])
def test_an_interrupted_search_goes_on_with_the_same_results(trained, result, left, tmp_path):
    known = []

    def stop(row):
        known.append(row)
        if len(known) == len(result.rows) - left:
            raise StoppedError

    with pytest.raises(StoppedError):
        prune(trained, DATA, 0.02, folder=tmp_path, on_row=stop, **SHORT)
    told = []
    resumed = prune(trained, DATA, 0.02, folder=tmp_path, on_row=told.append, **SHORT)
    assert [row["step"] for row in told] == list(range(len(result.rows)))
    assert np.isfinite([row["remaining"] for row in told]).all()

    def untimed(rows):
        others = ("seconds", "elapsed", "remaining", "density", "load", "metric")
        return [{k: v for k, v in row.items() if k not in others} for row in rows]

    assert untimed(told) == untimed(resumed.rows) == untimed(result.rows)
    for left, right in zip(resumed.model.get_weights(), result.model.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)
    assert {path.name for path in tmp_path.iterdir()} <= {
        "state.json",
        *(f"state-{row['step']}.npz" for row in result.rows if row["accepted"]),
    }
    again = prune(trained, DATA, 0.02, folder=tmp_path, **SHORT)
    assert again.rows == resumed.rows
    with pytest.raises(ValueError, match=r"There: `max_drop` 0.02. Here: `max_drop` 0.05."):
        prune(trained, DATA, 0.05, folder=tmp_path, **SHORT)
    text = (tmp_path / "state.json").read_text()
    other = {"arguments": [], "facts": {}, "rows": []}
    for wrong, why in (
        (text.replace('"iterative"', '"one_shot"', 1), "its checksum"),
        ('{"rows": ' + "[" * 100_000, "recursion"),
        (json.dumps(other | {"checksum": of_json(other)}), "have no names"),
    ):
        (tmp_path / "state.json").write_text(wrong)
        with pytest.raises(ml.FileContentError, match=f"is damaged: .*{why}"):
            prune(trained, DATA, 0.02, folder=tmp_path, **SHORT)


@pytest.mark.once
def test_a_process_killed_between_two_files_of_a_step_repeats_it(
    trained, listened, tmp_path, monkeypatch
):
    expected, _ = listened
    write = Progress.write

    def killed(progress):
        if len(progress.rows) == 2:
            raise StoppedError
        write(progress)

    monkeypatch.setattr(Progress, "write", killed)
    with pytest.raises(StoppedError):
        prune(trained, DATA, sparsity=0.7, folder=tmp_path, **SHORT)
    monkeypatch.undo()
    assert {path.name for path in tmp_path.iterdir()} == {
        *("state.json", "state-0.npz", "state-1.npz")
    }
    resumed = prune(trained, DATA, sparsity=0.7, folder=tmp_path, **SHORT)
    # Without another training, as after a kill at the very end.
    again = prune(trained, DATA, sparsity=0.7, folder=tmp_path, **SHORT)
    for found in (resumed, again):
        variables = ([*m.weights, *m.optimizer.variables] for m in (found.model, expected.model))
        for left, right in zip(*variables, strict=True):
            np.testing.assert_array_equal(left.numpy(), right.numpy())
    assert [row["drop"] for row in resumed.rows] == [row["drop"] for row in expected.rows]


@pytest.mark.once
def test_a_sparsity_is_reached_without_a_condition_on_the_drop(trained):
    result = prune(trained, DATA, sparsity=0.8, **SHORT)
    assert [row["method"] for row in result.rows] == ["dense", *["iterative"] * 3]
    alive = ml.sparsity_report(result.model).alive
    assert alive == 240 - 192
    assert result.meets_goals
    assert all(row["accepted"] for row in result.rows)


@pytest.mark.once
def test_gradual_pruning_needs_one_training_for_a_sparsity(trained):
    listener = Listener()
    told = {"on_training": listener.begin, "on_progress": listener.advance}
    result = prune(trained, DATA, sparsity=0.8, method="gradual", **told, **SHORT)
    assert [row["method"] for row in result.rows] == ["dense", "gradual"]
    assert ml.sparsity_report(result.model).alive == 240 - 192
    assert result.meets_goals
    ((row, steps),) = listener.trainings
    assert row["sparsity"] == 0
    assert listener.steps == steps >= 3 * 2 * 6
    moved = result.model.get_weights()[0] != trained.get_weights()[0]
    assert moved[ml.get_masks(result.model)["hidden/kernel"]].all()


@pytest.mark.once
def test_one_shot_pruning_fits_what_is_kept(trained):
    result = prune(trained, DATA, sparsity=0.6, method="one_shot")
    plain = ml.convert_to_masked(trained)
    ml.set_masks(plain, ml.get_masks(result.model))
    losses = [model.evaluate(*DATA[1], verbose=0)[0] for model in (result.model, plain)]
    assert losses[0] < losses[1]
    test = compare_models(trained, result.model, DATA[2])
    assert test == result.test


@pytest.mark.once
def test_goals_that_cannot_be_met_are_answered_by_what_came_nearest(trained):
    result = prune(trained, DATA, -1.0, method="one_shot")
    assert not result.meets_goals
    assert result.sparsity == 0
    assert result.conclusion.startswith("No model meets the goals. Within max_drop=-1.0: 0.00%")
    assert "The nearest beyond: " in result.conclusion
    for left, right in zip(result.model.get_weights(), trained.get_weights(), strict=True):
        np.testing.assert_array_equal(left, right)


@pytest.mark.slow("jax")
def test_channels_are_removed_from_the_model(trained):
    result = prune(trained, DATA, macs=0.4, **SHORT)
    assert [row["method"] for row in result.rows] == ["dense", "channels", "channels"]
    assert all(ref.mask is None for ref in ml.weight_refs(result.model))
    units = result.model.get_layer("hidden").units
    assert 0 < units <= 0.4 * 24
    # What is left, not what was asked for.
    assert result.rows[-1]["macs"] == pytest.approx(units / 24)
    assert f"{units / 24:.2%} of the multiply-adds are left" in result.conclusion
    assert result.sparsity == pytest.approx(1 - units / 24, abs=0.05)
    assert result.test.pruned == pytest.approx(
        result.model.evaluate(*DATA[2], verbose=0, return_dict=True)["accuracy"], abs=1e-6
    )


@pytest.mark.once
def test_several_goals_of_channels_hold_at_once(trained, monkeypatch):
    """The budgets of all steps are recorded, with a stand-in for measured latencies."""
    budgets = []

    def update(self, strategy, *, budget, **options):
        budgets.append(dict(budget))
        budget = {name: share for name, share in budget.items() if name != "latency"}
        return update_masks(self, strategy, budget=budget, **options)

    update_masks = LotteryTicketPruner.update_masks
    monkeypatch.setattr(LotteryTicketPruner, "update_masks", update)
    goals = {"macs": 0.6, "sparsity": 0.3, "latency": Latency(0.4, batch_size=7)}
    result = prune(trained, DATA, **goals, epochs=1, batch_size=600)
    assert budgets == [
        {"weights": 0.7, "macs": 0.6, "latency": Latency(0.5, batch_size=7)},
        {"weights": 0.7, "macs": 0.6, "latency": Latency(0.4, batch_size=7)},
    ]
    assert result.sparsity >= 0.3
    assert result.rows[-1]["macs"] <= 0.6
    assert "Zeros inside a kernel do not make a model faster" in " ".join(result.notes)


@pytest.mark.once
def test_missed_goals_are_named_with_what_was_reached():
    """One rule for all goals: the table, the row and the conclusion name what is missed."""
    densities = {"sparsity": 0.05, "size": 0.1, "macs": 0.5, "latency": 0.6}
    facts = {"densities": densities, "milliseconds": 5.1, "bytes": 90_000}
    goals = {"sparsity": 0.95, "size": 20_000, "macs": 0.5}
    judge = Judge(Goals(**goals, latency=Latency(milliseconds=3)), facts, lambda density: density)
    assert judge.misses(0.05, size=20_000, in_time=True) == []
    assert judge.misses(0.2, size=None, in_time=True) == ["sparsity", "size"]
    assert judge.misses(1.0, size=None, in_time=True) == list(densities)
    assert judge.misses(0.05, size=20_001, in_time=False) == ["size", "latency"]
    row = {"step": 1, "method": "channels", "accepted": True, "note": "", "of": "accuracy"}
    row |= {"density": 0.7, "sparsity": 0.3, "macs": 0.72, "latency": 4.25, "size": 31_234}
    row |= {"drop": 0.001, "load": 4.25, "misses": ", ".join(densities), "validation": 0.9}
    assert verdict_of(row) == "too dense, too large, too many macs, too slow"
    failed = row | {"step": 2, "drop": None, "accepted": False, "note": "Every family is at one."}
    assert judge.conclusion(row, [row, row | {"note": "At first."}, failed]) == (
        "No model meets the goals. The nearest: 30.00% of the weights are pruned, 72.00% of the "
        "multiply-adds are left, a call takes 4.25 ms (dense 5.1 ms), 31,234 bytes are served, "
        "with a drop of 0.10 points in validation accuracy. Missed: sparsity=0.95 (30.00% pruned); "
        "size=20,000 bytes (31,234 as served, dense 90,000); macs=0.5 (72.00% left); a latency of "
        "at most 3 ms (4.25 ms, dense 5.1 ms). Step 2 failed: Every family is at one."
    )
    # The channels of the goal were pruned, but are slower in the last measurement.
    late = row | {"density": 0.05, "misses": "latency"}
    assert "other load on this machine" in judge.conclusion(late, [late])


@pytest.mark.once
def test_a_missed_latency_is_said_in_the_row_and_the_conclusion(trained, monkeypatch):
    """A stand-in prunes channels without measuring, and reports a time above the goal."""

    def update(self, strategy, *, budget, **options):
        update_masks(self, strategy, budget={"macs": 0.5}, **options)
        timing = ml.Timing(5.1, 4.25, (5.0, 4.0), 0.8, (0.7, 0.9), 0.8, 15)
        latency = budget["latency"]
        self.measured_latency = latencies.MeasuredLatency(latency, timing, 3.0, 4.25, 1)

    update_masks = LotteryTicketPruner.update_masks
    monkeypatch.setattr(LotteryTicketPruner, "update_masks", update)
    monkeypatch.setattr(latencies, "milliseconds_without_pruning", lambda *_: 5.1)
    result = prune(trained, DATA, latency=Latency(milliseconds=3), epochs=1, batch_size=600)
    assert [row["latency"] for row in result.rows] == [5.1, 4.25]
    assert [row["misses"] for row in result.rows] == ["latency", "latency"]
    assert result.rows[1]["accepted"]
    assert "accepted" not in str(result)
    assert "too slow" in result.table
    assert not result.meets_goals
    assert (
        "Missed: a latency of at most 3 ms (4.25 ms, dense 5.1 ms). A shorter"
    ) in result.conclusion


@pytest.mark.once
def test_a_latency_is_measured(trained):
    result = prune(trained, DATA, latency=Latency(milliseconds=1e4), epochs=1, batch_size=600)
    assert [row["method"] for row in result.rows] == ["dense"]
    assert result.meets_goals
    assert "The dense model took " in " ".join(result.notes)


@pytest.mark.once
def test_an_untrained_model_is_trained_first_and_can_be_rewound():
    result = prune(make_model(), DATA, sparsity=0.5, retraining="weight_rewinding", **SHORT)
    assert "It was trained for 6 epochs first." in " ".join(result.notes)
    assert result.rows[0]["validation"] > 0.8


@pytest.mark.once
def test_a_tolerance_that_the_validation_data_cannot_show_is_said(trained):
    few = (DATA[0], (DATA[1][0][:50], DATA[1][1][:50]), DATA[2])
    with pytest.warns(UserWarning, match="of the 50 validation examples is worth 2 points") as told:
        result = prune(trained, few, 0.05, method="one_shot", minutes=1e-9)
    assert {str(warning.message) for warning in told} & set(result.notes) & set(result.cautions)


@pytest.mark.parametrize(
    ("drop", "interval", "text"),
    [
        (0.0195, (0.004, 0.04), "is 1.95 points, above 1 point, but 359 examples leave open"),
        (0.005, (-0.01, 0.02), "it really is: the 95 % interval is -1.00 to +2.00 points."),
        (0.0195, (0.011, 0.03), "above 1 point, and so is its whole 95 % interval."),
        (0.01000005, (0, 0.01000005), "within 1 point, and so is its whole 95 %"),  # Of float32.
        (0.0195, None, "above 1 point (no interval: auc is no mean)."),
    ],
)
@pytest.mark.once
def test_the_verdict_claims_no_more_than_the_interval(drop, interval, text):
    method = "no interval: auc is no mean"
    test = Comparison("accuracy", 0.9, 0.9 - drop, drop, interval, method, 359)
    assert text in verdict(Goals(max_drop=0.01), test)
    assert verdict(Goals(sparsity=0.5), test) == ""


@pytest.mark.once
def test_the_first_accuracy_of_several_outputs_is_named():
    inputs = keras.Input((8,))
    outputs = [layers.Dense(2, "softmax", name=name)(inputs) for name in ("left", "right")]
    model = keras.Model(inputs, outputs)
    loss = ["sparse_categorical_crossentropy"] * 2
    model.compile("sgd", loss, metrics=[["accuracy"]] * 2, jit_compile=False)
    data = tuple((x, [y, y]) for x, y in DATA)
    result = prune(model, data, sparsity=0.5, trained=True, minutes=1e-9)
    assert result.test.metric == "left_accuracy"
    note = "The metric is 'left_accuracy', the first of 'left_accuracy', 'right_accuracy'."
    assert note in result.notes


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.dense = layers.Dense(2)

    def call(self, x):
        return self.dense(x)

    def get_config(self):
        return {}


@pytest.mark.once
def test_a_model_without_channels_is_refused_before_it_is_trained():
    model = Subclassed()
    model(DATA[0][0][:1])
    model.compile("sgd", "mse", jit_compile=False)
    listener = Listener()
    with pytest.raises(ValueError, match="Expected a Sequential or Functional model"):
        prune(model, (DATA[0][0], DATA[0][0][:, :2]), macs=0.5, on_training=listener.begin)
    assert not listener.trainings


@pytest.mark.once
def test_a_search_in_use_is_not_overwritten(tmp_path):
    state = State({}, [np.ones(3)])
    with Progress(tmp_path, {}) as progress:
        progress.keep("0", state)
        progress.facts |= {"dense": "0", "best": "0"}
        progress.write()
        with pytest.raises(FolderInUseError), Progress(tmp_path, {}, overwrite=True):
            pass
        np.testing.assert_array_equal(progress.state("0").weights[0], state.weights[0])
    with Progress(tmp_path, {"other": 1}, overwrite=True) as progress:
        assert not progress.facts
        assert not list(tmp_path.glob("state*"))


@pytest.mark.slow("jax")
def test_a_loss_may_rise_by_the_tolerance():
    x, _ = classes(500, 3)
    y = x @ np.arange(8, dtype="float32")[:, None]
    model = make_model("mse", (), units=1)
    model.fit(x, y, epochs=20, batch_size=50, verbose=0)
    dense = model.evaluate(x, y, verbose=0)
    result = prune(model, (x, y), 2 * dense, method="one_shot", epochs=2, trained=True)
    assert result.test.metric == "loss"
    assert all(
        row["drop"] == pytest.approx(row["validation"] - result.rows[0]["validation"])
        for row in result.rows
    )
    low, high = result.test.interval
    assert low < result.test.drop < high
    assert "groups of examples" in result.test.method


@pytest.mark.once
def test_a_size_is_that_of_the_served_folder(trained):
    goal = served_size(trained) - 300
    result = prune(trained, DATA, size=goal, epochs=1, batch_size=600)
    assert 0.94 * goal < result.size <= goal
    with pytest.raises(ValueError, match=r"No sparsity makes .* as small as"):
        prune(trained, DATA, size=1_000, epochs=1)


@pytest.mark.slow
@pytest.mark.once
def test_channels_are_pruned_to_a_size(trained):
    goal = served_size(trained) - 400
    result = prune(trained, DATA, size=goal, method="channels", epochs=1, batch_size=600)
    assert 0 < result.model.get_layer("hidden").units < 24
    assert result.size <= goal
    assert result.meets_goals


@pytest.mark.once
def test_a_result_is_saved_as_a_model_and_a_served_folder(result, tmp_path):
    result.save(tmp_path / "out")
    loaded = keras.models.load_model(tmp_path / "out" / "model.keras")
    x = DATA[2][0]
    np.testing.assert_array_equal(loaded.predict_on_batch(x), result.model.predict_on_batch(x))
    assert (tmp_path / "out" / "served" / "1" / "saved_model.pb").is_file()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"macs": 0.5, "method": "iterative"}, ValueError, 'needs method="channels"'),
        ({"latency": 0.5, "method": "gradual"}, ValueError, "goal of `latency` needs"),
        ({"latency": 2.0}, ValueError, r"the latency .* pass Latency\(milliseconds=2\)"),
        ({"max_drop": 1}, ValueError, "any model would be accepted.* For 1 point, give 0.01"),
        ({"max_drop": math.nan}, ValueError, "`max_drop` must be a number"),
        ({"metric": "loss"}, ValueError, "`max_drop` is missing: .* the metric is 'loss'"),
        ({"sparsity": 80}, ValueError, r"`sparsity` must be a number in \(0, 1\).*give 0\.8\."),
        ({"size": 0.5}, ValueError, "`size` must be a number of bytes"),
        ({"method": "best"}, ValueError, "`method` must be one of"),
        ({"metric": "auc"}, ValueError, r"`metric` must be one of \['loss', 'accuracy'\]"),
        ({"epochs": 0}, ValueError, "`epochs` must be an integer from 1"),
        ({"minutes": 0}, ValueError, "`minutes` must be a positive number"),
        ({"batch": 5}, TypeError, "no option 'batch'.*batch_size"),
        ({"retraining": "weight_rewinding"}, ValueError, "cannot be rewound"),
    ],
)
def test_wrong_arguments_are_refused(trained, arguments, error, message):
    with pytest.raises(error, match=message):
        prune(trained, DATA, **{**SHORT, **arguments})


@pytest.mark.once
def test_models_that_cannot_be_searched_are_refused():
    with pytest.raises(ValueError, match="is not compiled"):
        prune(keras.Sequential([keras.Input((8,)), layers.Dense(2)]), DATA)


@pytest.mark.once
def test_the_function_is_public():
    assert lottery_ticket_pruner.prune is prune
