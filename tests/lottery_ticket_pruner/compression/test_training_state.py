"""Trained and untrained models are told apart, and left as they were."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner.compression.training_state import has_initial_weights, is_trained

pytestmark = pytest.mark.once
RNG = np.random.default_rng(0)
X = RNG.normal(size=(400, 4)).astype("float32")
Y = (X[:, 0] + X[:, 1] > 0).astype("int32")


def make_model(seed=0, use_bias=True):
    keras.utils.set_random_seed(seed)
    parts = [layers.Dense(16, "relu", use_bias=use_bias), layers.Dense(2, use_bias=use_bias)]
    model = keras.Sequential([keras.Input((4,)), *parts])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.02), loss, jit_compile=False)
    return model


def masked(model):
    return ml.convert_to_masked(model)


@pytest.mark.parametrize("seed", range(8))
def test_new_models_are_not_trained_even_if_they_are_good_by_chance(seed):
    assert not is_trained(masked(make_model(seed)), (X, Y))


def test_trained_models_are_recognized_and_not_changed():
    model = make_model()
    model.fit(X, Y, epochs=15, verbose=0)
    model = masked(model)
    before = model.get_weights()
    assert is_trained(model, (X, Y))
    for left, right in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(left, right)


def test_without_biases_the_loss_decides():
    model = make_model(use_bias=False)
    assert not has_initial_weights(model)
    model.fit(X, Y, epochs=15, verbose=0)
    assert is_trained(masked(model), (X, Y))


def test_a_new_head_on_a_trained_base_is_not_trained():
    base = make_model()
    base.fit(X, Y, epochs=15, verbose=0)
    base.layers[-1].kernel.assign(RNG.normal(size=(16, 2)))
    base.layers[-1].bias.assign(np.zeros(2))
    assert not is_trained(masked(base), (X, Y))
    base.layers[0].trainable = False
    assert has_initial_weights(base)
