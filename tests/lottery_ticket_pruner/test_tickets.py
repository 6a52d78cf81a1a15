"""Iterative pruning with rewinding: what each arm starts from, trains and keeps."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria, tickets, training
from lottery_ticket_pruner.augmentation import CropAndFlip
from lottery_ticket_pruner.tickets import find_ticket
from lottery_ticket_pruner.variables import read

BACKEND = keras.backend.backend()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 8)).astype("float32")
    return x, (x[:, 0] > x[:, 1]).astype("int32")


# Stretches of two steps throughout, so that the shared model is traced once.
SHORT = {"steps": 4, "batch_size": 20, "eval_every": 2}


def make_model(seed=0, optimizer="adam"):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(10, activation="relu", name="hidden"),
            layers.BatchNormalization(),
            layers.Dense(2, name="output"),
        ]
    )
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


@pytest.fixture(scope="module")
def shared():
    """A masked model whose functions are compiled once for the whole module."""
    return ml.convert_to_masked(make_model())


@pytest.fixture
def masked(shared):
    """The shared model with the weights of `make_model()`."""
    shared.set_weights(make_model().get_weights())
    return shared


@pytest.fixture
def starts(monkeypatch):
    """Records model weights and masks before every stretch of training."""
    seen = []
    original = training.train

    def recording(model, *args, **kwargs):
        state = (model.get_weights(), ml.get_masks(model), int(model.optimizer.iterations))
        seen.append(state)
        return original(model, *args, **kwargs)

    monkeypatch.setattr(training, "train", recording)
    return seen


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


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
        # Told while the arm trained, before its row was known.
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


def test_what_each_arm_starts_from(data, masked, starts):
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
        # Kernels are drawn anew, biases and statistics are those of step 0.
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
    order = training.batch_order(60, 4, 20, tickets._seed(4, "dense", 0, "train"))
    for indices in order:
        model.train_on_batch(data[0][indices], data[1][indices])
    for path, mask in result.masks[1].items():
        layer = model.get_layer(path.split("/")[0])
        sizes = np.abs(keras.ops.convert_to_numpy(layer.kernel))
        assert sizes[mask].min() > sizes[~mask].max()
        assert (~mask).sum() == int(0.3 * mask.size + 1e-6)


def test_rewinding_to_a_later_step(data, masked, starts):
    arguments = SHORT | {"steps": 6, "rewind_to": 2}
    result = find_ticket(masked, *data, rounds=1, validation_data=data, **arguments)
    first, dense, reinit, shuffled, ticket = starts
    assert_equal(dense[0], result.initial_weights)
    assert any((a != b).any() for a, b in zip(first[0], dense[0], strict=True))
    assert_equal(ticket[0], result.initial_weights)
    assert_equal(shuffled[0], result.initial_weights)
    # The reinitialised network starts from step 0: its other weights are not trained ones.
    assert_equal(reinit[0][1:2], first[0][1:2])
    assert all(row["early_stop_step"] in (4, 6) for row in result.rows[1:])


def test_the_early_stop_of_the_dense_run_may_be_before_the_rewinding_point(data, monkeypatch):
    train, losses = training.train, iter([[3.0, 1.0], [2.0, 4.0], [6.0, 5.0]])

    def looked_at(*args, **kwargs):
        history = train(*args, **kwargs)
        history.validation = [{"loss": loss} for loss in next(losses)]
        return history

    monkeypatch.setattr(training, "train", looked_at)
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


def test_a_learning_rate_schedule_starts_anew_in_every_search(data, starts):
    model = ml.convert_to_masked(scheduled_model())
    start, found = model.get_weights(), []
    for _ in range(2):
        model.set_weights(start)
        find_ticket(model, *data, rounds=1, steps=6, batch_size=20, rewind_to=2, controls=())
        found.append(model.get_weights())
    assert [iterations for *_, iterations in starts] == [0, 2, 2] * 2
    assert_equal(*found)


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


def test_what_dropout_draws_depends_on_seed_arm_and_round_alone(data):
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
    # Batches of all examples: their order is no part of the difference that the seed makes.
    whole = {"batch_size": 60, "controls": ()}
    assert np.abs(ticket(0, **whole)[0] - ticket(1, **whole)[0]).max() > 1e-4


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


def test_seeds_make_a_difference(data, masked):
    start = masked.get_weights()
    first = find_ticket(masked, *data, rounds=1, seed=0, **SHORT).ticket.get_weights()
    masked.set_weights(start)
    second = find_ticket(masked, *data, rounds=1, seed=1, **SHORT).ticket.get_weights()
    assert (first[0] != second[0]).any()


def test_a_masked_model_is_trained_itself_from_dense_masks_on(data, masked):
    start = masked.get_weights()
    first = find_ticket(masked, *data, rounds=1, rate=0.5, controls=(), **SHORT)
    trained = first.ticket.get_weights()
    assert first.ticket is masked
    masked.set_weights(start)
    second = find_ticket(masked, *data, rounds=1, rate=0.5, controls=(), **SHORT)
    assert_equal(trained, second.ticket.get_weights())
    assert second.masks[0]["output/kernel"].all()


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


def test_recurrent_and_convolutional_weights_are_drawn_again():
    model = keras.Sequential(
        [
            keras.Input((4, 3)),
            layers.SeparableConv1D(4, 2),
            layers.LSTM(3),
            layers.Dense(2, kernel_initializer="ones"),
        ]
    )
    masked = ml.convert_to_masked(model)
    before = {ref.path: keras.ops.convert_to_numpy(ref.variable) for ref in ml.masked_refs(masked)}
    tickets._draw_again(masked, (0, "random_reinit", 1))
    after = {ref.path: keras.ops.convert_to_numpy(ref.variable) for ref in ml.masked_refs(masked)}
    assert len(before) == 5
    for path, value in before.items():
        assert (after[path] == value).all() == path.startswith("dense")
    recurrent = next(after[path] for path in after if path.endswith("recurrent_kernel"))
    np.testing.assert_allclose(recurrent @ recurrent.T, np.eye(3), atol=1e-5)


def test_frozen_weights_are_not_drawn_again():
    model = ml.convert_to_masked(make_model())
    model.get_layer("hidden").trainable = False
    before = model.get_weights()
    tickets._draw_again(model, (0,))
    assert_equal(before[:1], model.get_weights()[:1])
    assert (before[-2] != model.get_weights()[-2]).all()


def test_a_weight_without_an_initializer_is_named(data, starts):
    class Odd(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], 2), name="table")

        def call(self, x):
            return keras.ops.matmul(x, self.table)

    ml.register(Odd, weights=["table"])
    model = keras.Sequential([keras.Input((8,)), Odd(name="odd")])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"odd/table cannot be drawn again.*table_initializer"):
        find_ticket(model, *data, rounds=1, **SHORT)
    assert starts == []
    find_ticket(model, *data, rounds=1, controls=("random_mask",), **SHORT)
    assert len(starts) == 4


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
        ({"controls": "random_mask"}, "list of some of.*Received: 'random_mask'"),
        ({"seed": -1}, "Received: -1"),
        ({"control_rounds": (0, 1)}, "out of 1 to 1"),
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


def test_an_uncompiled_model_is_refused(data):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(2)])
    with pytest.raises(ValueError, match="not compiled"):
        find_ticket(model, *data, rounds=1, steps=1)


def test_a_loss_without_targets_is_refused(data):
    with pytest.raises(ValueError, match=r"pass `y`.*x of type ndarray, y=None"):
        find_ticket(make_model(), data[0], rounds=1, steps=1)


# --- Retraining, more controls, going on after an interruption ------------------------------------


def scheduled_model():
    model = make_model()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.1, 0.01])
    model.compile(keras.optimizers.SGD(rate), model.loss, metrics=["accuracy"])
    return model


@pytest.mark.parametrize(
    ("retraining", "weights_stay", "step"),
    [
        ("weight_rewinding", False, 2),
        ("learning_rate_rewinding", True, 2),
        ("fine_tuning", True, 6),
    ],
)
def test_what_the_ticket_trains_from(data, starts, retraining, weights_stay, step):
    result = find_ticket(
        scheduled_model(), *data, rounds=1, steps=6, batch_size=20, rate=0.5, rewind_to=2,
        retraining=retraining, controls=("random_mask",),
    )  # fmt: skip
    at_rewinding_point, before_control, before_ticket = starts[1:]
    assert_equal(at_rewinding_point[0], before_control[0])
    assert before_control[2] == 2
    same = [
        np.array_equal(a, b) for a, b in zip(at_rewinding_point[0], before_ticket[0], strict=True)
    ]
    assert all(same) != weights_stay
    assert before_ticket[2] == step
    assert_equal(before_ticket[1].values(), result.masks[1].values())


def test_a_fine_tuned_ticket_starts_from_the_dense_weights(data, starts):
    result = find_ticket(
        make_model(), *data, rounds=1, steps=3, batch_size=20, controls=(), retraining="fine_tuning"
    )
    before_ticket = starts[2][0]  # after the stretches to the rewinding point and of the dense run
    model = ml.convert_to_masked(make_model())
    training.train(model, *data, steps=3, batch_size=20, seed=tickets._seed(0, "dense", 0, "train"))
    masks = {id(ref.variable): result.masks[1][ref.path] for ref in ml.masked_refs(model)}
    for variable, a, b in zip(model.weights, before_ticket, model.get_weights(), strict=True):
        kept = masks.get(id(variable), ...)
        a, b = a[kept], b[kept]
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_controls_keep_signs_or_counts(data, starts):
    model = make_model()
    initial = ml.convert_to_masked(model).get_weights()
    result = find_ticket(
        model, *data, rounds=1, steps=2, batch_size=20, rate=0.5, scope="global",
        controls=("reinit_same_sign", "random_mask", "reshuffled_mask"),
    )  # fmt: skip
    kernels = [position for position, value in enumerate(initial) if value.ndim == 2]
    signed, random, reshuffled = starts[2:5]
    for position in kernels:
        assert_equal([np.sign(initial[position])], [np.sign(signed[0][position])])
        assert not np.array_equal(initial[position], signed[0][position])
    ticket = result.masks[1]
    for weights, masks, _ in (random, reshuffled):
        assert_equal(initial, weights)
        assert sum(mask.sum() for mask in masks.values()) == 50
        assert any(not np.array_equal(masks[path], ticket[path]) for path in ticket)
    assert [m.sum() for m in reshuffled[1].values()] == [m.sum() for m in ticket.values()]
    assert [m.sum() for m in random[1].values()] != [m.sum() for m in ticket.values()]


def test_treatments_are_of_the_ticket_alone(data, starts):
    result = find_ticket(
        make_model(), *data, rounds=1, steps=2, batch_size=20, rate=0.5,
        kept="constant_same_sign", pruned="freeze", controls=("random_mask",),
    )  # fmt: skip
    initial = result.initial_weights
    control, ticket = starts[2][0], starts[3][0]
    assert_equal(initial, control)
    for ref in ml.masked_refs(result.ticket):
        position = [v is ref.variable for v in result.ticket.weights].index(True)
        mask, w0 = result.masks[1][ref.path], initial[position]
        expected = np.sign(w0) * np.std(w0.astype("float64"))
        np.testing.assert_allclose(ticket[position][mask], expected[mask], rtol=1e-6)
        effective = keras.ops.convert_to_numpy(getattr(ref.layer, ref.name))
        np.testing.assert_array_equal(effective[~mask], w0[~mask])


def test_a_criterion_of_gradients_ranks_the_trained_weights(data, masked):
    arguments = SHORT | {"rounds": 1, "rate": 0.5, "controls": ()}
    result = find_ticket(masked, *data, strategy="saliency", **arguments)
    assert [sum(m.sum() for m in masks.values()) for masks in result.masks] == [100, 50]


def test_controls_in_some_rounds(data):
    result = find_ticket(
        make_model(), *data, rounds=3, control_rounds=(2,), controls=("random_mask",), **SHORT
    )
    arms = [(row["round"], row["arm"]) for row in result.rows]
    assert arms == [(0, "dense"), (1, "ticket"), (2, "random_mask"), (2, "ticket"), (3, "ticket")]


class InterruptionError(Exception):
    pass


def everything(model):
    """All that a model and its optimizer hold, masks and what they freeze included."""
    return [read(v) for v in (*model.variables, *model.optimizer.variables)]


@pytest.mark.parametrize(
    ("retraining", "pruned", "controls", "rows_before", "known"),
    [
        ("weight_rewinding", "freeze", (), 3, 2),
        ("weight_rewinding", "zero", ("random_reinit",), 2, 1),
        ("learning_rate_rewinding", "zero", ("random_reinit",), 4, 3),
    ],
)
def test_a_search_goes_on_where_it_was_interrupted(
    data, tmp_path, retraining, pruned, controls, rows_before, known
):
    search = {
        "rounds": 2, "steps": 5, "batch_size": 20, "rate": 0.4, "rewind_to": 1,
        "controls": controls, "retraining": retraining, "pruned": pruned,
        "validation_data": data, "test_data": data, "deterministic": True,
    }  # fmt: skip
    told, told_again = [], []
    alone = find_ticket(make_model(), *data, on_evaluation=told.append, **search)
    seen = []

    def interrupt(row):
        seen.append(row)
        if len(seen) == rows_before:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        find_ticket(make_model(), *data, checkpoint=tmp_path, on_result=interrupt, **search)
    again = []
    resumed = find_ticket(
        make_model(), *data, checkpoint=tmp_path, on_result=again.append,
        on_evaluation=told_again.append, **search,
    )  # fmt: skip
    # All before the round in which it was interrupted is known and not trained again.
    assert again[:known] == seen[:known]
    untimed = [[{**row, "seconds": 0} for row in found.rows] for found in (alone, resumed)]
    assert untimed[0] == untimed[1]
    assert told == told_again
    assert_equal(alone.initial_weights, resumed.initial_weights)
    assert_equal(everything(alone.ticket), everything(resumed.ticket))
    for masks, others in zip(alone.masks, resumed.masks, strict=True):
        assert_equal(masks.values(), others.values())
    assert {file.name for file in tmp_path.iterdir()} == {
        "state.json", "pruner-02.npz", "model-02.npz",
        "masks-00.npz", "masks-01.npz", "masks-02.npz",
    }  # fmt: skip
    finished = find_ticket(make_model(), *data, checkpoint=tmp_path, **search)
    assert finished.rows == resumed.rows
    assert_equal(everything(alone.ticket), everything(finished.ticket))
    with pytest.raises(ValueError, match=r"state of another search.*'rate': \(0.4, 0.3\)"):
        find_ticket(make_model(), *data, checkpoint=tmp_path, **search | {"rate": 0.3})
    (tmp_path / "state.json").write_text("[]")
    with pytest.raises(ValueError, match="not the state of a search"):
        find_ticket(make_model(), *data, checkpoint=tmp_path, **search)


def test_numbers_and_ranges_of_other_types_go_into_a_checkpoint(data, tmp_path):
    numbers = {"rounds": np.int64(2), "steps": np.int64(1), "seed": np.int64(3)}
    arguments = {"control_rounds": range(1, 3), "replicate": np.int64(1), "checkpoint": tmp_path}
    found = find_ticket(make_model(), *data, **numbers, **arguments)
    plain = {name: int(number) for name, number in numbers.items()}
    again = find_ticket(make_model(), *data, **plain, **arguments | {"control_rounds": (1, 2)})
    assert again.rows == found.rows
    with pytest.raises(ValueError, match=r"'control_rounds': \(\[1, 2\], \[1\]\)"):
        find_ticket(make_model(), *data, **plain, **arguments | {"control_rounds": range(1, 2)})


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_go_on_from_a_checkpoint(data, tmp_path, dtype):
    def model():
        keras.utils.set_random_seed(0)
        hidden = layers.Dense(6, "relu", dtype=dtype)
        model = keras.Sequential([keras.Input((8,)), hidden, layers.Dense(2, dtype=dtype)])
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
        return model

    search = {"rounds": 2, "rate": 0.4, "controls": (), "pruned": "freeze", "test_data": data}
    search |= SHORT | {"deterministic": True}
    alone = find_ticket(model(), *data, **search)

    def interrupt(row):
        if row["round"] == 2:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        find_ticket(model(), *data, checkpoint=tmp_path, on_result=interrupt, **search)
    resumed = find_ticket(model(), *data, checkpoint=tmp_path, **search)
    assert {v.dtype for v in resumed.ticket.weights} == {dtype}
    assert_equal(everything(alone.ticket), everything(resumed.ticket))
    untimed = [[{**row, "seconds": 0} for row in found.rows] for found in (alone, resumed)]
    assert untimed[0] == untimed[1]


def test_a_search_of_another_model_or_of_other_data_does_not_go_on(data, tmp_path):
    x, y = data
    arguments = {"rounds": 1, "steps": 1, "controls": (), "checkpoint": tmp_path}
    arguments |= {"validation_data": data, "test_data": data}

    def search(model=None, x=x, y=y, **changed):
        return find_ticket(model or make_model(), x, y, **arguments | changed)

    found = search()
    other_loss = make_model()
    other_loss.compile(
        other_loss.optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"]
    )
    for change, what in [
        ({"model": make_model(seed=1)}, "initial_weights"),
        ({"model": make_model(optimizer=keras.optimizers.Adam(0.1))}, "optimizer.learning_rate"),
        ({"model": make_model(optimizer="sgd")}, "optimizer"),
        ({"model": other_loss}, "loss"),
        ({"x": x + 1e-6}, "data"),
        ({"y": y.astype("int64")}, "data"),
        ({"y": 1 - y}, "data"),
        ({"validation_data": (x, 1 - y)}, "validation_data"),
        ({"validation_data": None}, "validation_data"),
        ({"test_data": (x, 1 - y)}, "test_data"),
        ({"augment": CropAndFlip(2)}, "augment"),
    ]:
        with pytest.raises(ValueError, match="holds the state of another search") as caught:
            search(**change)
        changed = re.findall(r"'([\w.]+)': \(", str(caught.value))
        assert changed == [what] or {key.partition(".")[0] for key in changed} == {what}
    # The same, made anew: names that Keras gives and types of containers say nothing.
    again = search(x=x.copy(), validation_data=list(data))
    assert again.rows == found.rows


def test_criteria_for_new_models_rank_the_rewound_one(data):
    model = ml.convert_to_masked(make_model(optimizer=keras.optimizers.SGD(0.5)))
    untrained = ml.convert_to_masked(make_model())
    pruner = LotteryTicketPruner(untrained)
    arguments = SHORT | {"rounds": 2, "sparsity": 0.75, "controls": ("random_mask",)}
    names = [name for name in criteria.names() if criteria.get(name).at_initialization]
    assert names == ["snip", "grasp", "synflow"]
    for strategy in ("snip", "synflow"):
        model.set_weights(make_model().get_weights())
        found = find_ticket(model, *data, strategy=strategy, rewind_to=2, **arguments)
        untrained.set_weights(found.initial_weights)
        pruner.reset_masks()
        for number, sparsity in ((1, 0.5), (2, 0.75)):
            seed = tickets._integer(0, "masks", number)
            pruner.update_masks(strategy, sparsity=sparsity, data=data, seed=seed)
            assert_equal(found.masks[number].values(), ml.get_masks(untrained).values())
            assert sum(mask.sum() for mask in found.masks[number].values()) == 100 / 2**number


def test_criteria_that_look_at_the_model_get_its_data(masked, data):
    result = find_ticket(
        masked, *data, rounds=2, sparsity=0.75, strategy="wanda", controls=(), **SHORT
    )
    sizes = [sum(mask.sum() for mask in masks.values()) for masks in result.masks]
    # It drops 7 of the 10 inputs of both outputs of the last layer.
    assert sizes == [100, 50, 26]
