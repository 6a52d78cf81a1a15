"""Iterative pruning with rewinding: the start, the training and the results of each arm."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import training
from lottery_ticket_pruner.tickets import find_ticket
from masked_layers import randomness
from searches import SHORT, assert_equal, make_model, scheduled_model

BACKEND = keras.backend.backend()


def test_rows_masks_and_ticket(data):
    model = make_model()
    initial = model.get_weights()
    reported, told = [], []
    result = find_ticket(
        model, *data, rounds=2, steps=6, batch_size=20, rate=0.5, eval_every=2,
        validation_data=data, test_data=data, replicate=3, on_result=reported.append,
        on_evaluation=lambda evaluation: told.append((len(reported), evaluation)),
    )  # fmt: skip
    assert_equal(initial, model.get_weights())
    assert_equal(initial, result.initial_weights)
    assert result.rows == reported
    shown = [(row["round"], row["arm"], row["sparsity"]) for row in result.rows]
    # 80 and 20 weights: half of them, then half of the rest.
    assert shown == [
        (0, "dense", 0),
        (1, "random_reinit", 0.5),
        (1, "random_mask", 0.5),
        (1, "ticket", 0.5),
        (2, "random_reinit", 0.75),
        (2, "random_mask", 0.75),
        (2, "ticket", 0.75),
    ]
    for row in result.rows:
        assert row["replicate"] == 3
        assert row["early_stop_step"] in (2, 4, 6)
        assert row["validation_loss"] > 0
        assert row["seconds"] > 0
        assert 0 <= row["test_accuracy"] <= 1
    for number, row in enumerate(result.rows):
        # Reported while the arm trained, before its row was known.
        evaluations = [evaluation for known, evaluation in told if known == number]
        assert [evaluation["step"] for evaluation in evaluations] == [2, 4, 6]
        best = min(evaluations, key=lambda evaluation: evaluation["validation_loss"])
        assert best["validation_loss"] == row["validation_loss"]
        assert best["step"] == row["early_stop_step"]
        assert all(0 <= evaluation["validation_accuracy"] <= 1 for evaluation in evaluations)
        for name in ("round", "arm", "replicate"):
            assert {evaluation[name] for evaluation in evaluations} == {row[name]}
    assert [sum(m.sum() for m in masks.values()) for masks in result.masks] == [100, 50, 25]
    for path, mask in result.masks[1].items():
        assert not (result.masks[2][path] & ~mask).any()
    assert_equal(ml.get_masks(result.ticket).values(), result.masks[2].values())
    final = training.evaluate(result.ticket, *data)
    assert final["accuracy"] == pytest.approx(result.rows[-1]["test_accuracy"])
    assert final["loss"] == pytest.approx(result.rows[-1]["test_loss"], rel=1e-5)


@pytest.mark.once
def test_starting_weights_of_each_arm(data, masked, starts):
    result = find_ticket(masked, *data, rounds=2, rate=0.5, **SHORT)
    empty, dense, *rounds = starts
    assert_equal(empty[0], dense[0])
    assert all(iterations == 0 for *_, iterations in starts)
    draws = []
    for number, arms in ((1, rounds[:3]), (2, rounds[3:])):
        (reinit, reinit_masks, _), (shuffled, shuffled_masks, _), (ticket, ticket_masks, _) = arms
        wanted = result.masks[number]
        assert_equal(ticket, result.initial_weights)
        assert_equal(ticket_masks.values(), wanted.values())
        assert_equal(shuffled, result.initial_weights)
        for path, mask in shuffled_masks.items():
            assert mask.sum() == wanted[path].sum()
            assert (mask != wanted[path]).any()
        assert_equal(reinit_masks.values(), wanted.values())
        # Kernels are drawn again, biases and statistics are those of step 0.
        for variable, value, first in zip(result.ticket.weights, reinit, ticket, strict=True):
            if variable.name == "kernel":
                limit = np.sqrt(6 / sum(value.shape))
                assert np.abs(value).max() <= limit
                assert not np.isin(value, first).any()
                draws.append(value.ravel())
            else:
                np.testing.assert_array_equal(value, first)
    assert len(np.unique(np.concatenate(draws))) == sum(map(len, draws))


def test_masks_are_those_of_large_final(data, masked):
    """An independent run of the dense phase, ranked by sorting."""
    result = find_ticket(masked, *data, rounds=1, rate=0.3, controls=(), seed=4, **SHORT)
    model = make_model()
    order = training.batch_order(60, 4, 20, randomness.words(4, "dense", 0, "train"))
    for indices in order:
        model.train_on_batch(data[0][indices], data[1][indices])
    for path, mask in result.masks[1].items():
        layer = model.get_layer(path.split("/")[0])
        sizes = np.abs(keras.ops.convert_to_numpy(layer.kernel))
        assert sizes[mask].min() > sizes[~mask].max()
        assert (~mask).sum() == int(0.3 * mask.size + 1e-6)


@pytest.mark.once
def test_rewinding_to_a_later_step(data, masked, starts):
    arguments = SHORT | {"steps": 6, "rewind_to": 2}
    result = find_ticket(masked, *data, rounds=1, validation_data=data, **arguments)
    first, dense, reinit, shuffled, ticket = starts
    assert_equal(dense[0], result.initial_weights)
    assert any((a != b).any() for a, b in zip(first[0], dense[0], strict=True))
    assert_equal(ticket[0], result.initial_weights)
    assert_equal(shuffled[0], result.initial_weights)
    # The reinitialized network starts from step 0: its other weights are not trained.
    assert_equal(reinit[0][1:2], first[0][1:2])
    assert all(row["early_stop_step"] in (4, 6) for row in result.rows[1:])


@pytest.mark.once
def test_the_early_stop_of_the_dense_run_may_be_before_the_rewinding_point(data, monkeypatch):
    train, losses = training.train_by_plan, iter([[3.0, 1.0], [2.0, 4.0], [6.0, 5.0]])

    def looked_at(*args, **kwargs):
        history = train(*args, **kwargs)
        history.validation = [{"loss": loss} for loss in next(losses)]
        return history

    monkeypatch.setattr(training, "train_by_plan", looked_at)
    result = find_ticket(
        make_model(), *data, rounds=1, steps=8, batch_size=20, rewind_to=4, eval_every=2,
        validation_data=data, controls=(),
    )  # fmt: skip
    found = [(row["arm"], row["early_stop_step"], row["validation_loss"]) for row in result.rows]
    assert found == [("dense", 4, 1.0), ("ticket", 8, 5.0)]


def test_a_learning_rate_schedule_goes_back_to_the_rewinding_point(data, starts):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.1, 0.01])
    model = make_model(optimizer=keras.optimizers.SGD(schedule))
    find_ticket(model, *data, rounds=1, steps=6, batch_size=20, rewind_to=2)
    assert [iterations for *_, iterations in starts] == [0, 2, 2, 2, 2]


@pytest.mark.once
def test_a_learning_rate_schedule_restarts_in_every_search(data, starts):
    model = ml.convert_to_masked(scheduled_model())
    start, found = model.get_weights(), []
    for _ in range(2):
        model.set_weights(start)
        find_ticket(model, *data, rounds=1, steps=6, batch_size=20, rewind_to=2, controls=())
        found.append(model.get_weights())
    assert [iterations for *_, iterations in starts] == [0, 2, 2] * 2
    assert_equal(*found)


@pytest.mark.once
def test_the_result_of_an_arm_does_not_depend_on_the_other_arms(data, masked):
    start = masked.get_weights()

    def run(*controls):
        masked.set_weights(start)
        result = find_ticket(
            masked, *data, rounds=2, test_data=data, controls=controls, seed=5, **SHORT
        )
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in result.rows]
        return result.ticket.get_weights(), rows

    alone, rows_alone = run()
    among, rows_among = run("random_mask", "random_reinit")
    assert_equal(alone, among)
    assert rows_alone == [row for row in rows_among if row["arm"] in ("dense", "ticket")]
    _, other_order = run("random_reinit", "random_mask")
    assert sorted(rows_among, key=str) == sorted(other_order, key=str)


def test_random_numbers_of_dropout_depend_only_on_seed_arm_and_round(data):
    keras.utils.set_random_seed(0)
    # On torch, dropout without a seed draws from torch's global generator.
    dropout = layers.Dropout(0.5, seed=1 if BACKEND == "torch" else None)
    model = keras.Sequential([keras.Input((8,)), dropout, layers.Dense(2)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model = ml.convert_to_masked(model)
    start = model.get_weights()

    def ticket(seed, **arguments):
        model.set_weights(start)
        find_ticket(model, *data, rounds=1, rate=0.2, seed=seed, **SHORT | arguments)
        return model.get_weights()

    first = ticket(0)
    assert_equal(first, ticket(0, controls=()))
    # Batches contain all examples, so their order has no part in the effect of the seed.
    whole = {"batch_size": 60, "controls": ()}
    assert np.abs(ticket(0, **whole)[0] - ticket(1, **whole)[0]).max() > 1e-4


@pytest.mark.once
def test_a_model_of_several_inputs_and_outputs(data):
    x, y = data
    left, right = keras.Input((8,), name="left"), keras.Input((8,), name="right")
    label = layers.Dense(2, name="label")(layers.Concatenate()([left, right]))
    model = keras.Model([left, right], [label, layers.Dense(1, name="sum")(right)])
    model.compile("adam", [keras.losses.SparseCategoricalCrossentropy(from_logits=True), "mse"])
    both = [x, x[:, ::-1].copy()], [y, x.sum(1, keepdims=True)]
    named = {"left": both[0][0], "right": both[0][1]}, both[1]
    arguments = {"rounds": 1, "controls": (), **SHORT}
    result = find_ticket(model, *both, validation_data=both, test_data=both, **arguments)
    again = find_ticket(model, *named, validation_data=named, test_data=named, **arguments)
    assert_equal(result.ticket.get_weights(), again.ticket.get_weights())
    assert result.rows[-1]["test_loss"] == pytest.approx(again.rows[-1]["test_loss"])
    assert (result.ticket.get_weights()[0] != model.get_weights()[0]).any()


@pytest.mark.once
def test_seeds_make_a_difference(data, masked):
    start = masked.get_weights()
    first = find_ticket(masked, *data, rounds=1, seed=0, **SHORT).ticket.get_weights()
    masked.set_weights(start)
    second = find_ticket(masked, *data, rounds=1, seed=1, **SHORT).ticket.get_weights()
    assert (first[0] != second[0]).any()


@pytest.mark.once
def test_a_masked_model_is_trained_itself_from_dense_masks_on(data, masked):
    start = masked.get_weights()
    first = find_ticket(masked, *data, rounds=1, rate=0.5, controls=(), **SHORT)
    trained = first.ticket.get_weights()
    assert first.ticket is masked
    masked.set_weights(start)
    second = find_ticket(masked, *data, rounds=1, rate=0.5, controls=(), **SHORT)
    assert_equal(trained, second.ticket.get_weights())
    assert second.masks[0]["output/kernel"].all()


@pytest.mark.once
def test_final_sparsity_is_reached_in_rounds_of_one_rate(data, masked):
    result = find_ticket(masked, *data, rounds=2, sparsity=0.75, controls=(), **SHORT)
    assert [masks["hidden/kernel"].sum() for masks in result.masks] == [80, 40, 20]
    mapping = {"^output/": 0.0, "default": 0.75}
    result = find_ticket(masked, *data, rounds=2, sparsity=mapping, controls=(), **SHORT)
    assert [masks["output/kernel"].sum() for masks in result.masks] == [20, 20, 20]
    assert [masks["hidden/kernel"].sum() for masks in result.masks] == [80, 40, 20]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counts the traces of TensorFlow")
def test_rounds_and_arms_share_one_trace(data):
    traces = []

    class Counted(keras.Sequential):
        def train_step(self, batch):
            traces.append(batch)
            return super().train_step(batch)

    keras.utils.set_random_seed(0)
    model = Counted([keras.Input((8,)), layers.Dense(2)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, jit_compile=False)
    arguments = {"steps": 4, "batch_size": 20, "rate": 0.2}
    find_ticket(model, *data, rounds=1, **arguments)
    first = len(traces)
    traces.clear()
    find_ticket(model, *data, rounds=3, **arguments)
    assert len(traces) <= first


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "rounds=0"),
        ({"steps": 3, "rewind_to": 3}, "rewind_to=3"),
        ({"rewind_to": "500it"}, "`rewind_to` must be an integer, in training steps.*'500it'"),
        ({"steps": 2.0}, "`steps` must be an integer. Received: steps=2.0"),
        ({"rate": 0.1, "sparsity": 0.5}, "rate=0.1, sparsity=0.5"),
        ({"controls": ("reinit",)}, r"random_reinit.*Received: \('reinit',\)"),
        ({"controls": ("random_mask",) * 2}, r"each once.*'random_mask', 'random_mask'"),
        ({"controls": "random_mask"}, "list of names from.*Received: 'random_mask'"),
        ({"seed": -1}, "Received: -1"),
        ({"control_rounds": (0, 1)}, "from 1 to 1"),
        ({"retraining": "none"}, "fine_tuning.*Received: 'none'"),
        ({"retraining": "fine_tuning", "kept": "reinit"}, "stay as they were trained.*'reinit'"),
        ({"pruned": "nothing"}, "zero_if_shrunk"),
        ({"rate": 1.5}, "rate=1.5"),
        ({"rate": {"^no_such_layer/": 0.1, "default": 0.2}}, "no_such_layer"),
        ({"strategy": "largest"}, "large_final"),
        ({"strategy": "smallest_weights_global", "scope": "layer"}, "scope='layer'"),
    ],
)
def test_wrong_arguments_are_refused_before_training(data, starts, arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        find_ticket(model, *data, **{"rounds": 1, "steps": 2} | arguments)
    assert starts == []


@pytest.mark.once
def test_an_uncompiled_model_is_refused(data):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="not compiled"):
        find_ticket(model, *data, rounds=1, steps=1)
    with pytest.raises(TypeError, match=r"Expected a `keras.Model`\. Received: 'model.keras'"):
        find_ticket("model.keras", *data, rounds=1, steps=1)


@pytest.mark.once
def test_a_loss_without_targets_is_refused(data):
    with pytest.raises(ValueError, match=r"pass `y`.*x of type ndarray, y=None"):
        find_ticket(make_model(), data[0], rounds=1, steps=1)
