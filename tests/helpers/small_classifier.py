"""A small classifier, its data, and options for short searches."""

import keras
import numpy as np
from keras import layers

SHORT = {"epochs": 2, "batch_size": 100}


def classes(size, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(size, 8)).astype("float32")
    return x, (x[:, 0] + 2 * x[:, 1] > 0).astype("int32")


DATA = (classes(600, 0), classes(300, 1), classes(300, 2))


def make_model(loss="sparse_categorical_crossentropy", metrics=("accuracy",), units=2):
    keras.utils.set_random_seed(0)
    activation = "softmax" if units > 1 else None
    model = keras.Sequential(
        [
            keras.Input((8,)),
            layers.Dense(24, activation="relu", name="hidden"),
            layers.Dense(units, activation=activation, name="output"),
        ]
    )
    model.compile(keras.optimizers.Adam(0.02), loss, metrics=list(metrics), jit_compile=False)
    return model
