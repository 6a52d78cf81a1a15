"""The earlier API on plain models: rescaling of restored weights, masks by layer."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, PrunerCallback

X = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
BACKEND = keras.backend.backend()
Y = np.random.default_rng(1).integers(0, 2, 32)


def network(rate=0.0):
    model = keras.Sequential([keras.Input((8,)), layers.Dense(10, "relu"), layers.Dense(2)])
    model.compile(
        keras.optimizers.SGD(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    return model


def other_weights(model, seed=5):
    """Returns weights that are not recorded."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=weight.shape).astype("float32") for weight in model.get_weights()]


def expected_rescaled(pruner, weights):
    """Returns the kernels multiplied by size / ones, computed only from the masks."""
    masks = [mask for *_, mask in pruner.iterate_prunables(pruner.model)]
    return [
        np.where(mask, weight * (mask.size / mask.sum()), 0)
        for mask, weight in zip(masks, weights[::2], strict=True)
    ]


def prune_and_rescale(pruner, rate, how):
    pruner.calc_prune_mask(pruner.model, rate, "smallest_weights")
    if how == "calls":
        pruner.apply_pruning(pruner.model)
        pruner.apply_dwr(pruner.model)
    else:  # a rate of 0 trains nothing
        callback = PrunerCallback(pruner, use_dwr=True)
        pruner.model.fit(X, Y, epochs=2, verbose=0, callbacks=[callback])


@pytest.mark.parametrize("how", ["calls", "callback"])
@pytest.mark.parametrize("same", [True, False])
def test_weights_that_the_caller_puts_back_are_rescaled_from_one(how, same):
    model = network()
    pruner = LotteryTicketPruner(model)
    for number, rate in enumerate((0.5, 0.2, 0.3)):
        weights = other_weights(model, seed=5 if same else number)
        model.set_weights(weights)
        prune_and_rescale(pruner, rate, how)
        for found, expected in zip(
            model.get_weights()[::2], expected_rescaled(pruner, weights), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("how", ["calls", "callback"])
def test_weights_trained_since_the_last_rescaling_keep_one_factor(how):
    model = network(rate=0.001)
    pruner = LotteryTicketPruner(model)
    model.set_weights(other_weights(model))
    pruner.calc_prune_mask(model, 0.5, "smallest_weights")
    pruner.apply_pruning(model)
    pruner.apply_dwr(model)
    model.fit(X, Y, verbose=0, callbacks=[PrunerCallback(pruner, use_dwr=how == "callback")])
    trained = model.get_weights()[::2]
    pruner.set_pretrained_weights()  # including the factor
    first = [mask for *_, mask in pruner.iterate_prunables(model)]
    pruner.calc_prune_mask(model, 0.2, "smallest_weights")
    pruner.apply_dwr(model)
    second = [mask for *_, mask in pruner.iterate_prunables(model)]
    for found, weight, old, new in zip(
        model.get_weights()[::2], trained, first, second, strict=True
    ):
        # From size / old ones to size / new ones.
        expected = np.where(new, weight * (old.sum() / new.sum()), 0)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_weights_that_have_moved_far_in_a_training_are_not_rescaled_again():
    """Even if they are closer to the weights before the first rescaling."""
    model = network(rate=0.0)
    pruner = LotteryTicketPruner(model)
    model.set_weights(other_weights(model))
    pruner.calc_prune_mask(model, 0.5, "smallest_weights")
    masks = [mask for *_, mask in pruner.iterate_prunables(model)]

    class Shrink(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if BACKEND == "jax":
                self.model.jax_state_sync()
            self.model.set_weights([0.3 * weight for weight in self.model.get_weights()])

    callback = PrunerCallback(pruner, use_dwr=True)
    model.fit(X, Y, verbose=0, callbacks=[callback, Shrink()])
    shrunk = model.get_weights()
    assert all((w[m == 0] == 0).all() for w, m in zip(shrunk[::2], masks, strict=True))
    model.fit(X, Y, verbose=0, callbacks=[callback])
    pruner.apply_dwr(model)
    for found, expected in zip(model.get_weights(), shrunk, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_other_weights_put_in_after_a_training_are_rescaled_from_one():
    model = network(rate=0.01)
    pruner = LotteryTicketPruner(model)
    for seed in (5, 6):
        weights = other_weights(model, seed)
        model.set_weights(weights)
        pruner.calc_prune_mask(model, 0.4, "smallest_weights")
        pruner.apply_pruning(model)
        pruner.apply_dwr(model)
        for found, expected in zip(
            model.get_weights()[::2], expected_rescaled(pruner, weights), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-6)
        model.fit(X, Y, verbose=0, callbacks=[PrunerCallback(pruner)])


@pytest.mark.once
def test_a_loaded_pruner_tells_them_apart_too(tmp_path):
    model = network()
    pruner = LotteryTicketPruner(model)
    weights = other_weights(model)
    model.set_weights(weights)
    prune_and_rescale(pruner, 0.5, "calls")
    pruner.save(tmp_path / "pruner")
    loaded = LotteryTicketPruner.load(tmp_path / "pruner", model)
    loaded.apply_dwr(model)  # does nothing
    for put_back in (False, True):
        if put_back:
            model.set_weights(weights)
            loaded.apply_dwr(model)
        for found, expected in zip(
            model.get_weights()[::2], expected_rescaled(loaded, weights), strict=True
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.once
@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_masks_are_found_by_layer_and_by_position_among_its_weights(convert):
    inner = keras.Sequential([layers.Dense(4, name="first"), layers.Dense(3, name="second")])
    inputs = keras.Input((8,))
    outputs = layers.Dense(2)(layers.BatchNormalization()(inner(layers.Dense(8)(inputs))))
    model = convert(keras.Model(inputs, outputs))
    pruner = LotteryTicketPruner(model)
    assert pruner.prunable_tuples == [(1, (0,)), (2, (0, 2)), (4, (0,))]
    assert pruner.cumulative_pruning_rate == 0.0
    pruner.calc_prune_mask(model, 0.5, "random")
    pruner.calc_prune_mask(model, 0.2, "random")
    masks = pruner.prune_masks_map
    assert list(masks) == pruner.prunable_tuples
    assert [mask is None for mask in masks[2, (0, 2)]] == [False, True, False, True]
    found = [masks[key][index] for key in masks for index in key[1]]
    for one, (*_, other) in zip(found, pruner.iterate_prunables(model), strict=True):
        np.testing.assert_array_equal(one, other)
    pruned, size = sum(int((mask == 0).sum()) for mask in found), sum(mask.size for mask in found)
    assert pruner.cumulative_pruning_rate == pruned / size
    assert abs(pruner.cumulative_pruning_rate - 0.6) < 4 / size
    with pytest.raises(ValueError, match="read-only"):
        found[0][:] = True
    weights = np.arange(masks[1, (0,)][0].size).reshape(masks[1, (0,)][0].shape)
    weights = weights * masks[1, (0,)][0]
    weights *= 2.5  # except where integers meet a bool mask
    pruner.reset_masks()
    assert pruner.cumulative_pruning_rate == 0.0
    assert all(pruner.prune_masks_map[key][key[1][0]].all() for key in masks)
