"""Rankings, budgets and notices of channels in models, before and after `shrink`."""

import logging
import math
import re

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner
from lottery_ticket_pruner.structures import Channels

# Parts that are combined here are each tested on JAX, too.
pytestmark = pytest.mark.slow("jax")

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(24, 6, 6, 3)).astype("float32"), RNG.integers(0, 4, size=24)


def network(exclude=()):
    """Two equal residual blocks, and a unit without normalization."""
    keras.utils.set_random_seed(1)
    random = keras.initializers.RandomNormal(1, 0.3)
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(x)
    y = layers.BatchNormalization(gamma_initializer=random, name="stem_norm")(y)
    for i in range(2):
        z = layers.Conv2D(6, 3, padding="same", use_bias=False, name=f"in_{i}")(layers.ReLU()(y))
        z = layers.BatchNormalization(gamma_initializer=random, name=f"norm_{i}")(z)
        z = layers.Conv2D(8, 3, padding="same", name=f"out_{i}")(layers.ReLU()(z))
        y = layers.add([y, z])
    y = layers.Dense(10, activation="relu", name="hidden")(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    return ml.convert_to_masked(model, exclude=list(exclude))


def widths(model):
    return {row.layer: row.after for row in ml.shrink(model, return_report=True)[1]}


@pytest.mark.once
def test_scales_are_those_of_the_normalization_that_follows():
    model = network()
    LotteryTicketPruner(model).update_masks("scale", rate=0.5, structure="channels")
    masks = ml.get_masks(model)
    for layer, norm, kept in (
        ("stem", "stem_norm", 4),
        ("in_0", "norm_0", 3),
        ("in_1", "norm_1", 3),
    ):
        gamma = keras.ops.convert_to_numpy(model.get_layer(norm).gamma)
        left = masks[f"{layer}/kernel"].any((0, 1, 2))
        np.testing.assert_array_equal(
            np.flatnonzero(left), np.sort(np.argsort(np.abs(gamma))[-kept:])
        )
    assert masks["hidden/kernel"].any(0).all()  # Without a scale, it is not pruned.


@pytest.mark.parametrize(
    ("scope", "strategy"),
    # Only gradients depend on the backend. Every scope and every strategy, not every pair of them.
    [
        ("isomorphic", "saliency"),
        *(
            pytest.param(*pair, marks=pytest.mark.once)
            for pair in (
                *(("layer", "saliency"), ("global", "saliency"), ("isomorphic", "random")),
                *(("layer", "scale"), ("global", "scale"), ("isomorphic", "scale")),
                *(("layer", "random"), ("global", "geometric_median")),
            )
        ),
    ],
)
def test_every_ranking_gives_channels_that_shrink_removes(strategy, scope):
    model = network()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss)
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    pruner.update_masks(strategy, rate=0.5, scope=scope, structure="channels", data=(X, Y))
    smaller, report = ml.shrink(model, return_report=True)
    after = {row.layer: row.after for row in report}
    kept = after["stem"] + after["in_0"] + after["in_1"]
    if strategy == "scale":
        assert (kept, after["hidden"]) == (10, 10)
    else:
        assert kept + after["hidden"] == 15
    if scope != "global":
        assert after["in_0"] + after["in_1"] == 6
    expected = model.predict_on_batch(X)
    np.testing.assert_allclose(
        smaller.predict_on_batch(X), expected, rtol=0, atol=1e-5 * np.abs(expected).max()
    )


@pytest.mark.once
def test_equal_blocks_have_equal_forms():
    found = ml.channel_families(network())
    forms = {family.layers[0]: family.form for family in found.families}
    assert forms["in_0"] == forms["in_1"]
    assert len({forms[name] for name in ("stem", "in_0", "hidden")}) == 3


@pytest.mark.once
@pytest.mark.parametrize("name", ["macs", "weights"])
@pytest.mark.parametrize("exclude", [(), ("head",)])
def test_a_budget_is_that_of_all_kernels_of_the_smaller_model(name, exclude):
    model = network(exclude)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", budget={name: 0.6}, structure="channels")
    smaller = ml.shrink(model)

    def cost(each):
        kernels = [layer for layer in each.layers if hasattr(layer, "kernel")]
        return sum(
            math.prod(layer.kernel.shape)
            * (math.prod(layer.output.shape[1:-1]) if name == "macs" else 1)
            for layer in kernels
        )

    assert 0.45 < cost(smaller) / cost(model) <= 0.6


@pytest.mark.once
def test_multiply_adds_that_are_not_known_are_named(caplog):
    @keras.saving.register_keras_serializable("tests")
    class Own(layers.Dense):
        pass

    x = keras.Input((6,))
    y = layers.Dense(4, name="b")(Own(8, name="own")(layers.Dense(10, name="a")(x)))
    model = ml.convert_to_masked(keras.Model(x, layers.Dense(2)(layers.Dense(12, name="c")(y))))
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        LotteryTicketPruner(model).update_masks(
            "smallest_weights", budget={"macs": 0.9}, structure="channels"
        )
    assert "multiply-adds of these weights are not known" in caplog.text
    assert "own/kernel" in caplog.text


@pytest.mark.once
def test_layers_that_stay_whole_are_followed_and_named_once_per_training(caplog, monkeypatch):
    times = []
    follow = ml.channel_families

    def counted(model):
        times.append(model)
        return follow(model)

    monkeypatch.setattr(ml, "channel_families", counted)
    x = keras.Input((4,))
    y = layers.Lambda(lambda x: x, name="own")(layers.Dense(8, name="a")(x))
    model = ml.convert_to_masked(keras.Model(x, layers.Dense(2)(layers.Dense(6, name="b")(y))))
    model.compile("sgd", "mse")
    schedule = {
        "name": "polynomial", "initial_sparsity": 0.0, "final_sparsity": 0.5,
        "begin_step": 0, "end_step": 4, "frequency": 1,
    }  # fmt: skip
    structure = Channels(round_to=4)
    pruning = GradualPruning(LotteryTicketPruner(model), schedule, structure=structure)
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        model.fit(np.zeros((8, 4)), np.zeros((8, 2)), batch_size=2, verbose=0, callbacks=[pruning])
    assert len(times) == 1
    assert caplog.text.count("leaves layers") == 1
    assert widths(model)["b"] == 4
    # The rounding of earlier steps is not mentioned.
    assert caplog.text.count("fewer channels") == 1
    assert "fewer channels than a sparsity of 0.5 requires: b: 4 of 6 are kept" in caplog.text


@pytest.mark.once
@pytest.mark.parametrize(
    ("structure", "amount", "said"),
    [
        (Channels(round_to=4), {"sparsity": 0.3}, "a sparsity of 0.3 requires: .*in_0: 6 of 6"),
        (Channels(round_to=8), {"rate": 0.3, "scope": "global"}, "a rate of 0.3.* as a whole: "),
        (
            Channels(round_to=4),
            {"rate": {"^in_0": 0.3, "default": 0.0}},
            "requires: in_0: 6 of 6 are kept$",
        ),
        (Channels(), {"sparsity": 0.5}, None),
        (Channels(), {"rate": 0.3, "scope": "isomorphic"}, None),
    ],
)
def test_limits_that_hold_are_logged_for_all_amounts(caplog, structure, amount, said):
    with caplog.at_level(logging.WARNING, "lottery_ticket_pruner"):
        LotteryTicketPruner(network()).update_masks(
            "smallest_weights", structure=structure, **amount
        )
    messages = [record.getMessage() for record in caplog.records]
    if said is None:
        assert not messages
    else:
        (message,) = messages
        assert "pruned fewer channels than" in message
        assert re.search(said, message), message


@pytest.mark.once
def test_nothing_pruned_names_the_rounding():
    with pytest.warns(UserWarning, match="Nothing was pruned: .*lower `round_to`, raise `at_most`"):
        LotteryTicketPruner(network()).update_masks(
            "smallest_weights", rate=0.2, structure=Channels(round_to=64)
        )
