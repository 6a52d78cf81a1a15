"""The start of a ticket's and its controls' trainings, and criteria that measure the model."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, arms, criteria, training
from lottery_ticket_pruner.tickets import find_ticket
from masked_layers import randomness
from searches import SHORT, assert_equal, make_model, scheduled_model


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
    arms.draw_again(masked, (0, "random_reinit", 1))
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
    arms.draw_again(model, (0,))
    assert_equal(before[:1], model.get_weights()[:1])
    assert (before[-2] != model.get_weights()[-2]).all()


@pytest.mark.once
def test_a_weight_without_an_initializer_is_named(data, starts):
    class Odd(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], 2), name="table")

        def call(self, x):
            return keras.ops.matmul(x, self.table)

    ml.register(Odd, weights=["table"])
    model = keras.Sequential([keras.Input((8,)), Odd(name="odd")])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    with pytest.raises(ValueError, match=r"odd/table cannot be reinitialized.*table_initializer"):
        find_ticket(model, *data, rounds=1, **SHORT)
    assert starts == []
    find_ticket(model, *data, rounds=1, controls=("random_mask",), **SHORT)
    assert len(starts) == 4


@pytest.mark.once
@pytest.mark.parametrize(
    ("retraining", "weights_stay", "step"),
    [
        ("weight_rewinding", False, 2),
        ("learning_rate_rewinding", True, 2),
        ("fine_tuning", True, 6),
    ],
)
def test_starting_weights_of_the_ticket(data, starts, retraining, weights_stay, step):
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
    seed = randomness.words(0, "dense", 0, "train")
    training.train(model, *data, steps=3, batch_size=20, seed=seed)
    masks = {id(ref.variable): result.masks[1][ref.path] for ref in ml.masked_refs(model)}
    for variable, a, b in zip(model.weights, before_ticket, model.get_weights(), strict=True):
        kept = masks.get(id(variable), ...)
        a, b = a[kept], b[kept]
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.once
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


@pytest.mark.slow("jax")
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


@pytest.mark.slow("jax")
def test_a_criterion_of_gradients_ranks_the_trained_weights(data, masked):
    arguments = SHORT | {"rounds": 1, "rate": 0.5, "controls": ()}
    result = find_ticket(masked, *data, strategy="saliency", **arguments)
    assert [sum(m.sum() for m in masks.values()) for masks in result.masks] == [100, 50]


@pytest.mark.once
def test_controls_in_some_rounds(data):
    result = find_ticket(
        make_model(), *data, rounds=3, control_rounds=(2,), controls=("random_mask",), **SHORT
    )
    arms = [(row["round"], row["arm"]) for row in result.rows]
    assert arms == [(0, "dense"), (1, "ticket"), (2, "random_mask"), (2, "ticket"), (3, "ticket")]


@pytest.mark.once
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
            seed = randomness.integer("arms of a search", 0, "masks", number)
            pruner.update_masks(strategy, sparsity=sparsity, data=data, seed=seed)
            assert_equal(found.masks[number].values(), ml.get_masks(untrained).values())
            assert sum(mask.sum() for mask in found.masks[number].values()) == 100 / 2**number


@pytest.mark.once
def test_criteria_that_look_at_the_model_get_its_data(masked, data):
    result = find_ticket(
        masked, *data, rounds=2, sparsity=0.75, strategy="wanda", controls=(), **SHORT
    )
    sizes = [sum(mask.sum() for mask in masks.values()) for masks in result.masks]
    # It prunes 7 of the 10 inputs of both outputs of the last layer.
    assert sizes == [100, 50, 26]
