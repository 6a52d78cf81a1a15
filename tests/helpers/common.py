"""Helpers that tests of several modules share: tensors as arrays, made-up data, random masks."""

import keras
import numpy as np
from keras import layers, ops

import masked_layers as ml


def numpy(x):
    """Returns a copy of a tensor as an array, which later updates do not change."""
    return np.array(ops.convert_to_numpy(x))


def half_masks(model, seed=1):
    """Prunes half of each weight at random."""
    rng = np.random.default_rng(seed)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(model).items()})


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def augmented():
    """Returns a model with layers that train by default, and others that follow them in that."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            layers.RandomFlip(seed=1),
            layers.Resizing(4, 4),
            layers.Flatten(),
            layers.BatchNormalization(),
            layers.Dropout(0.5, seed=2),
            layers.Dense(3),
        ]
    )
    model.layers[3].moving_mean.assign(data(48))
    return model


class HandingOn(keras.Model):
    """Hands on what it is called with, so that Keras records no shapes of its inputs."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(2)

    def call(self, *args, **kwargs):
        return self.inner(*args, **kwargs)
