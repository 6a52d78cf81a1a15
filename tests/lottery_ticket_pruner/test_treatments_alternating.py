"""Treatments that alternate between frozen values and zero: memory, and stale functions."""

import gc

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, training

RNG = np.random.default_rng(0)
X = RNG.normal(size=(32, 6)).astype("float32")
Y = RNG.normal(size=(32, 2)).astype("float32")


def pruned(weights=None):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8, "tanh"), layers.Dense(2)])
    model = ml.convert_to_masked(model)
    if weights is not None:
        model.set_weights(weights)
    model.compile("sgd", "mse")
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("large_init", rate=0.5)
    return model, pruner


def fit(model):
    model.fit(X, Y, batch_size=16, verbose=0, shuffle=False)
    return model.evaluate(X, Y, verbose=0)


def train(model):
    training.train(model, X, Y, steps=2, batch_size=16)


@pytest.mark.parametrize("run", [fit, train])
def test_memory_does_not_grow(run):
    model, pruner = pruned()

    def there_and_back():
        for treatment in ("freeze", "zero"):
            pruner.treat(pruned=treatment)
            run(model)
        gc.collect()
        return len(gc.get_objects())

    there_and_back()
    before = there_and_back()
    after = there_and_back()
    # A newly traced training step is more than a thousand objects, kept by TensorFlow.
    assert after - before < 200


def test_the_graph_is_always_the_present_one():
    model, pruner = pruned()
    initial = model.get_weights()
    for treatment in ("freeze", "zero", "freeze"):
        pruner.treat(pruned=treatment)
        other, fresh = pruned(initial)  # It has never had another treatment.
        fresh.treat(pruned=treatment)
        losses = [fit(trained) for trained in (model, other)]
        np.testing.assert_allclose(*losses, rtol=1e-5)
        for ours, theirs in zip(model.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.once
def test_gradients_of_functions_in_use_are_kept():
    import tensorflow as tf

    @tf.custom_gradient
    def cubed(x):
        return x**3, lambda upstream: upstream * 7

    model, pruner = pruned()
    users = tf.function(lambda x: cubed(model(x)))
    users(X)
    with pytest.warns(UserWarning, match="functions compiled before"):
        pruner.treat(pruned="freeze")
    x = tf.constant(X)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = users(x)
    # Differentiated for the first time here: the gradient is found by its name.
    assert np.abs(tape.gradient(y, x).numpy()).max() > 0
