"""Budgets of latency in models: with a made-up clock, and once with the real one."""

import random
import re

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import Latency, LotteryTicketPruner
from lottery_ticket_pruner.selection import latency_search
from masked_layers import shrinking

X = np.random.default_rng(0).normal(size=(8, 6, 6, 3)).astype("float32")


def network(normalization=layers.BatchNormalization):
    keras.utils.set_random_seed(1)
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(16, 3, padding="same", name="stem")(x)
    z = layers.Conv2D(24, 3, padding="same", name="inner")(normalization()(y))
    y = layers.add([y, layers.Conv2D(16, 3, padding="same", name="outer")(z)])
    y = layers.Dropout(0.5)(layers.GlobalAveragePooling2D()(y))
    model = keras.Model(x, layers.Dense(4, name="head")(y))
    return ml.convert_to_masked(model, mask_normalization=True)


def milliseconds(compiled):
    """A made-up latency: an overhead, and the time of the weights that are there."""
    return 1 + compiled.model.count_params() / 2_000


class Clock:
    """Replaces the measurement of two models."""

    def __init__(self):
        self.slow, self.sizes = False, []

    def __call__(self, before, after, *, seconds=3.0, **limits):
        self.sizes.append((before.model.count_params(), after.model.count_params()))
        first, second = milliseconds(before), milliseconds(after)
        if seconds > 3 and self.slow:
            second = first
        times = [np.full((9, 2), each / 1e3) for each in (first, second)]
        return ml.Timing.of(*times)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(shrinking, "compare", clock)
    return clock


def state_of(model, besides=()):
    variables = [*model.variables, *(model.optimizer.variables if model.compiled else ())]
    return [keras.ops.convert_to_numpy(x).copy() for x in variables if id(x) not in besides]


def share_left(masked, dense):
    smaller = ml.shrink(masked, return_report=True)[0]
    first, second = (1 + each.count_params() / 2_000 for each in (dense, smaller))
    return second / first


@pytest.mark.once
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_smaller_model_meets_the_budget_closely(clock, scope):
    model = network()
    dense = ml.strip_masks(model)
    pruner = LotteryTicketPruner(model)
    pruner.update_masks(
        "smallest_weights", budget={"latency": 0.6}, scope=scope, structure="channels"
    )
    found = pruner.measured_latency
    assert found.measured == pytest.approx(share_left(model, dense))
    assert 0.5 < found.measured <= 0.6
    assert found.met
    assert found.trials == len(clock.sizes) - 1
    assert {before for before, _ in clock.sizes} == {dense.count_params()}
    assert "measured 0.5" in str(found)
    assert "batch size 1" in str(found)


@pytest.mark.once
def test_later_updates_count_from_the_model_without_pruning(clock):
    model = network(layers.LayerNormalization)  # In the second one, it leaves channels out.
    dense = ml.strip_masks(model)
    pruner = LotteryTicketPruner(model)
    for share in (0.8, 0.6):
        before = ml.get_masks(model)
        pruner.update_masks(
            "smallest_weights", budget={"latency": Latency(share)}, structure="channels"
        )
        assert share - 0.08 < share_left(model, dense) <= share
        assert all((before[path] >= mask).all() for path, mask in ml.get_masks(model).items())
    assert {before for before, _ in clock.sizes} == {dense.count_params()}
    pruner.set_pretrained_weights()
    pruner.update_masks("smallest_weights", rate=0.1, structure="channels")
    assert pruner.measured_latency is None


@pytest.mark.once
@pytest.mark.parametrize(("latency", "weights"), [(0.9, 0.4), (0.6, 0.95)])
def test_several_budgets_are_met_together(clock, latency, weights):
    model = network()
    dense = ml.strip_masks(model)
    LotteryTicketPruner(model).update_masks(
        "smallest_weights", budget={"latency": latency, "weights": weights}, structure="channels"
    )
    assert share_left(model, dense) <= latency
    smaller = ml.shrink(model)
    left, before = (
        sum(np.prod(x.shape) for x in each.weights if x.name == "kernel")
        for each in (smaller, dense)
    )
    assert min(latency, weights) / 2 < left / before <= weights


@pytest.mark.once
def test_a_budget_of_milliseconds(clock):
    model = network()
    pruner = LotteryTicketPruner(model)
    limit = 1 + ml.strip_masks(model).count_params() / 4_000
    pruner.update_masks(
        "smallest_weights", budget={"latency": Latency(milliseconds=limit)}, structure="channels"
    )
    smaller = ml.shrink(model, return_report=True)[0]
    reached = 1 + smaller.count_params() / 2_000
    assert 0.8 * limit < reached <= limit
    assert pruner.measured_latency.measured == pytest.approx(reached)
    assert pruner.measured_latency.met


@pytest.mark.once
def test_trying_smaller_models_changes_nothing_but_the_masks(clock):
    model = network()
    model.compile("adam", "mse")
    model.fit(X, np.zeros((8, 4)), verbose=0)
    pruner = LotteryTicketPruner(model)
    masks = {id(ref.mask.value) for ref in [*ml.masked_refs(model), *ml.channel_refs(model)]}
    before, draws = state_of(model, masks), random.getstate()
    pruner.update_masks("smallest_weights", budget={"latency": 0.7}, structure="channels")
    assert all(map(np.array_equal, before, state_of(model, masks)))
    assert random.getstate() == draws


@pytest.mark.parametrize(
    "fault",
    [
        "interrupted",
        pytest.param("interrupted between masks", marks=pytest.mark.once),
        pytest.param("unreachable", marks=pytest.mark.once),
    ],
)
def test_nothing_changes_after_an_error(clock, monkeypatch, fault):
    model = network()
    pruner = LotteryTicketPruner(model)
    before = state_of(model)
    expected, message = ValueError, r"at most 0\.1 of the .*\(batch size 8\).*0\.\d+ of the"
    if fault == "interrupted":

        def interrupt(model, **_):
            assert not all(map(np.array_equal, before, state_of(model)))
            raise KeyboardInterrupt

        monkeypatch.setattr(ml, "shrink", interrupt)
        expected, message = KeyboardInterrupt, None
    elif fault == "interrupted between masks":
        set_masks = ml.set_masks

        def set_one(model, masks):
            monkeypatch.setattr(ml, "set_masks", set_masks)
            set_masks(model, dict(list(masks.items())[:1]))
            assert not all(map(np.array_equal, before, state_of(model)))
            raise KeyboardInterrupt

        monkeypatch.setattr(ml, "set_masks", set_one)
        expected, message = KeyboardInterrupt, None
    with pytest.raises(expected, match=message):
        pruner.update_masks(
            "smallest_weights",
            budget={"latency": Latency(0.1, batch_size=8)},
            structure="channels",
        )
    assert all(map(np.array_equal, before, state_of(model)))
    assert pruner.measured_latency is None


@pytest.mark.once
def test_a_result_above_the_budget_is_a_warning(clock, monkeypatch):
    clock.slow = True  # Longer measurements always find the smaller model to be as slow.
    pruner = LotteryTicketPruner(network())
    monkeypatch.setattr(latency_search, "_TRIALS", 2)
    with pytest.warns(UserWarning, match="slower than its budget") as caught:
        pruner.update_masks("smallest_weights", budget={"latency": 0.7}, structure="channels")
    (warning,) = (each for each in caught if each.category is UserWarning)
    assert warning.filename == __file__
    assert not pruner.measured_latency.met


@pytest.mark.once
def test_sizes_of_inputs_have_to_be_fixed():
    x = keras.Input((None, 3))
    y = layers.GlobalAveragePooling1D()(layers.Conv1D(8, 3)(x))
    model = ml.convert_to_masked(keras.Model(x, layers.Dense(2)(y)))
    with pytest.raises(ValueError, match=re.escape("is not fixed: (None, None, 3)")):
        LotteryTicketPruner(model).update_masks(
            "smallest_weights", budget={"latency": 0.5}, structure="channels"
        )


@pytest.mark.slow("jax")
def test_a_real_measurement():
    """Any latency meets this budget, so that noise cannot change the result."""
    model = network()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks(
        "smallest_weights",
        budget={"weights": 0.5, "latency": Latency(milliseconds=1e6, batch_size=4)},
        structure="channels",
    )
    found = pruner.measured_latency
    assert found.trials == 1
    assert found.met
    assert 0 < found.timing.fastest[1] <= found.timing.after == found.measured < 1e6
    assert found.timing.rounds >= 15
    smaller = ml.shrink(model, return_report=True)[0]
    assert smaller.count_params() < 0.6 * model.count_params()
    # The model works as before.
    np.testing.assert_allclose(model.predict_on_batch(X), smaller.predict_on_batch(X), atol=1e-5)
