"""Masks of single weights that a smaller model keeps."""

import keras
import numpy as np
import pytest
from keras import layers

from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers import (
    convert_to_masked,
    get_masks,
    set_masks,
    set_rescale,
    shrink,
    sparsity_report,
    strip_masks,
)
from shrunk import assert_same_outputs, inputs_of, numpy, randomize

pytestmark = pytest.mark.usefixtures("nothing_drawn")


def pruned():
    """A net that has lost half of its channels, and then a third of the weights left."""
    x = keras.Input((6, 4))
    y = layers.Conv1D(8, 3, padding="same", activation="relu", name="a")(x)
    y = y + layers.MultiHeadAttention(2, 4, name="b")(y, y)
    y = layers.Bidirectional(layers.GRU(4), name="c")(y)
    model = convert_to_masked(randomize(keras.Model(x, layers.Dense(3, name="d")(y))))
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.5, structure="channels")
    pruner.update_masks("random", rate=1 / 3, seed=1)
    return model


@pytest.mark.slow("jax")
def test_pruned_weights_stay_pruned_while_the_smaller_model_trains():
    model = pruned()
    model.compile("adam", "mse")
    smaller = shrink(model, keep_masks=True)
    assert_same_outputs(model, smaller)
    dense = shrink(model)
    assert smaller.count_params() == dense.count_params() < model.count_params()
    report = sparsity_report(smaller)
    assert report.alive < report.size
    kept = sum(int(np.count_nonzero(mask)) for mask in get_masks(model).values())
    assert report.alive == kept
    before = get_masks(smaller)
    smaller.fit(inputs_of(smaller, batch=4), np.ones((4, 3)), verbose=0)
    plain = strip_masks(smaller)
    after = get_masks(smaller)
    assert all((after[path] == before[path]).all() for path in before)
    zeros = sum(int(np.count_nonzero(numpy(w) == 0)) for w in plain.weights if len(w.shape) > 1)
    assert zeros == report.size - report.alive


@pytest.mark.slow("jax")
def test_a_smaller_model_with_masks_can_be_pruned_further():
    smaller = shrink(pruned(), keep_masks=True)
    before = sparsity_report(smaller)
    LotteryTicketPruner(smaller).update_masks("smallest_weights", rate=0.5, structure="channels")
    assert shrink(smaller).count_params() < smaller.count_params()
    assert sparsity_report(smaller).alive < before.alive


@pytest.mark.once
def test_only_weights_that_were_masked_are_masked():
    x = keras.Input((4,))
    y = layers.Dense(5, "relu", name="a")(x)
    plain = randomize(keras.Model(x, layers.Dense(2, name="b")(layers.Dense(6, name="c")(y))))
    model = convert_to_masked(plain, exclude=["c"], mask_bias=True)
    masks = get_masks(model)
    masks["a/kernel"][:, 1] = masks["a/kernel"][0, 2] = masks["a/bias"][1] = False
    set_masks(model, masks)
    smaller, report = shrink(model, keep_masks=True, return_report=True)
    assert_same_outputs(model, smaller)
    assert smaller.get_layer("a").units == 4
    found = get_masks(smaller)
    assert set(found) == set(masks)
    np.testing.assert_array_equal(found["a/kernel"], np.delete(masks["a/kernel"], 1, axis=1))
    assert report.weights_after == smaller.count_params()


@pytest.mark.once
def test_rescaled_and_plain_models_are_refused():
    model = pruned()
    set_rescale(model, True)
    with pytest.raises(ValueError, match=r"`keep_masks=True` needs masks.*rescaled weights"):
        shrink(model, keep_masks=True)
    with pytest.raises(ValueError, match=r"`keep_masks=True` needs a masked model"):
        shrink(strip_masks(pruned()), keep_masks=True)
