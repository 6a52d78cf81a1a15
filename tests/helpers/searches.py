"""A small model for ticket searches."""

import keras
import numpy as np
from keras import layers

# All stretches have two steps, so that the shared model is traced once.
SHORT = {"steps": 4, "batch_size": 20, "eval_every": 2}


def make_model(seed=0, optimizer=None):
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
        optimizer or keras.optimizers.SGD(0.1, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,
    )
    return model


def assert_equal(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(a, b)


def scheduled_model():
    model = make_model()
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([4], [0.1, 0.01])
    model.compile(keras.optimizers.SGD(rate), model.loss, metrics=["accuracy"])
    return model
