"""Updates, rewinding and loading hold few copies of the weights of a large model."""

import tracemalloc

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.variables import viewed

WIDTH, COUNT = 512, 8
LAYER = 4 * WIDTH**2


def peak(call):
    """Returns the largest memory of NumPy's arrays during a call, above what was there before."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.fixture
def pruner():
    layers = [keras.layers.Dense(WIDTH, kernel_initializer="ones") for _ in range(COUNT)]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((WIDTH,)), *layers]), inplace=True)
    rng = np.random.default_rng(0)
    for ref in ml.masked_refs(model):
        ref.variable.assign(rng.standard_normal((WIDTH, WIDTH), dtype="float32"))
    return LotteryTicketPruner(model)


def test_memory_of_updates_and_rewinding(pruner, tmp_path):
    masks = COUNT * LAYER // 4
    limit = 2 * LAYER + 2 * masks  # Of 8 layers of weights.
    pruner.set_pretrained_weights()
    for criterion, sparsity in (("large_final", 0.5), ("smallest_weights", 0.8)):
        update = {"sparsity": sparsity, "scope": "global"}
        assert peak(lambda c=criterion, u=update: pruner.update_masks(c, **u)) < limit
        report = ml.sparsity_report(pruner.model)
        assert report.alive == report.size - int(sparsity * report.size)
    assert peak(pruner.rewind) < limit
    pruner.save(tmp_path / "state")
    records = 2 * COUNT * LAYER  # Of the initial and final weights.
    loaded = peak(lambda: LotteryTicketPruner.load(tmp_path / "state", pruner.model))
    assert loaded < records + limit


def test_a_view_is_the_value_of_its_time(pruner):
    variable = ml.masked_refs(pruner.model)[0].variable
    before = np.array(viewed(variable))
    view = viewed(variable)
    np.testing.assert_array_equal(view, before)
    assert not view.flags.writeable
    if keras.backend.backend() != "torch":
        variable.assign(np.zeros((WIDTH, WIDTH), "float32"))
        np.testing.assert_array_equal(view, before)
    half = keras.Variable(np.ones(3), dtype="bfloat16")
    assert viewed(half).dtype == "float32"
