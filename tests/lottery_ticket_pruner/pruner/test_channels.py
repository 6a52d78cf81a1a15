"""Coupled channels, pruned by the pruner and by schedules, and removed by `shrink`."""

import logging

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner
from lottery_ticket_pruner.structures import Channels

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(32, 8, 8, 3)).astype("float32"), RNG.integers(0, 4, size=32)


def network(shift=0.3):
    """Returns a small residual model whose normalization layers have random shifts."""
    keras.utils.set_random_seed(0)
    x = keras.Input((8, 8, 3))
    y = stream = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    for i in range(2):
        y = layers.BatchNormalization(beta_initializer=keras.initializers.RandomNormal(0, shift))(y)
        y = layers.Conv2D(6, 3, padding="same", activation="relu", name=f"in_{i}")(layers.ReLU()(y))
        y = layers.Conv2D(8, 3, padding="same", name=f"out_{i}")(y)
        y = stream = layers.add([stream, y])
    y = layers.GlobalAveragePooling2D()(layers.ReLU()(y))
    model = ml.convert_to_masked(keras.Model(x, layers.Dense(4, name="head")(y)))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


def checked(model):
    """Shrinks a model and compares the outputs."""
    smaller, report = ml.shrink(model, return_report=True)
    expected = model.predict_on_batch(X)
    got = smaller.predict_on_batch(X)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return smaller, report


def widths(report):
    return {row.layer: row.after for row in report}


@pytest.mark.once
@pytest.mark.parametrize("shift", [0.0, 0.3])
@pytest.mark.parametrize("strategy", ["smallest_weights", "random", "snip"])
def test_half_of_the_channels_are_removed_from_all_joined_layers(strategy, shift):
    model = network(shift)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks(strategy, rate=0.5, structure="channels", data=(X, Y))
    _, report = checked(model)
    after = widths(report)
    assert after["stem"] == after["out_0"] == after["out_1"]
    assert after["head"] == 4
    assert after["stem"] + after["in_0"] + after["in_1"] == 10
    if strategy != "snip":  # It ranks all layers together.
        assert after["stem"] == 4
        assert after["in_0"] == after["in_1"] == 3


def test_shrink_removes_exactly_the_pruned_channels_after_rounds_of_training():
    model = network()
    pruner = LotteryTicketPruner(model)
    for _ in range(3):
        model.fit(X, Y, batch_size=16, verbose=0)
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", rate=0.3, scope="global", structure="channels")
        pruner.rewind()
    smaller, report = checked(model)
    total = sum(row.after for row in report if row.layer not in ("out_0", "out_1", "head"))
    assert total == 7  # Of 20 channels: 14, 10, 7.
    assert smaller.count_params() < model.count_params() / 3


@pytest.mark.once
def test_a_schedule_prunes_channels_while_the_model_trains():
    model = network()
    pruner = LotteryTicketPruner(model)
    schedule = {
        "name": "polynomial",
        "initial_sparsity": 0.0,
        "final_sparsity": 0.5,
        "begin_step": 0,
        "end_step": 4,
        "frequency": 1,
    }
    model.fit(
        X,
        Y,
        batch_size=4,
        verbose=0,
        callbacks=[GradualPruning(pruner, schedule, structure="channels")],
    )
    _, report = checked(model)
    assert widths(report)["stem"] == 4
    assert widths(report)["in_0"] == widths(report)["in_1"] == 3


@pytest.mark.once
def test_a_schedule_beyond_at_most_is_refused_before_training():
    schedule = {"name": "constant", "sparsity": 0.95}
    pruner = LotteryTicketPruner(network())
    with pytest.raises(ValueError, match=r"reaches a sparsity of 0.95, .* at most 0.9 of"):
        GradualPruning(pruner, schedule, structure="channels")
    GradualPruning(pruner, schedule, structure=Channels(at_most=0.95))


@pytest.mark.once
def test_layers_that_stay_whole_are_named_before_anything_is_pruned(caplog):
    keras.utils.set_random_seed(0)
    x = keras.Input((4,))
    y = layers.LayerNormalization(name="norm")(layers.Dense(8, name="a")(x))
    model = keras.Model(x, layers.Dense(2, name="c")(layers.Dense(6, name="b")(y)))
    model = ml.convert_to_masked(model)
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        LotteryTicketPruner(model).update_masks("smallest_weights", rate=0.5, structure="channels")
    assert "norm: it normalizes all channels together, and leaves none of them out" in caplog.text
    assert "a: 'norm', which is left whole, reads it" in caplog.text
    masks = ml.get_masks(model)
    assert masks["a/kernel"].all()
    np.testing.assert_array_equal(np.sort(masks["b/kernel"].all(axis=0)), [False] * 3 + [True] * 3)


@pytest.mark.once
def test_families_limited_by_at_most_are_logged(caplog):
    model = network()
    pruner = LotteryTicketPruner(model)
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        pruner.update_masks("smallest_weights", rate=0.7, structure=Channels(at_most=0.5))
    assert (
        "pruned fewer channels than a rate of 0.7 requires: stem, out_0, out_1: 4 of 8 are kept"
        in caplog.text
    )


@pytest.mark.once
def test_a_subclassed_model_is_refused_and_its_kept_biases_are_logged(caplog):
    class Net(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = layers.Dense(6), layers.Dense(2)

        def call(self, x):
            return self.b(self.a(x))

    net = Net()
    net(np.zeros((1, 4), "float32"))
    model = ml.convert_to_masked(net)
    pruner = LotteryTicketPruner(model)
    with pytest.raises(ValueError, match="Expected a Sequential or Functional model"):
        pruner.update_masks("smallest_weights", rate=0.5, structure="channels")
    assert all(mask.all() for mask in ml.get_masks(model).values())
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        pruner.update_masks("smallest_weights", rate=0.5, structure="units")
    assert "so the biases of pruned outputs" in caplog.text


@pytest.mark.once
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smaller_model_meets_a_budget_of_multiply_adds(scope):
    model = network()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", budget={"macs": 0.5}, structure="channels", scope=scope)
    smaller, report = checked(model)
    counted = []
    for each in (model, smaller):
        total = 0
        for layer in each.layers:
            if hasattr(layer, "kernel"):
                total += np.prod(layer.kernel.shape) * np.prod(layer.output.shape[1:-1])
        counted.append(total)
    assert [report.macs_before, report.macs_after] == counted
    assert 0.35 < counted[1] / counted[0] <= 0.5
    assert f"multiply-adds: {counted[0]:,.0f} -> {counted[1]:,.0f}" in str(report)
