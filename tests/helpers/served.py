"""Small models for export, with pruned weights."""

from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml

tf = pytest.importorskip("tensorflow")


def prune(model, share=0.8, seed=0):
    """Sets random weights of a plain model to zero: those with at least two axes."""
    rng = np.random.default_rng(seed)
    for ref in ml.weight_refs(model):
        value = keras.ops.convert_to_numpy(ref.variable)
        # Scaled, so that the outputs of deep models do not vanish.
        ref.variable.assign(np.where(rng.random(value.shape) < share, 0, 4 * value))
    return model


def dense():
    return keras.Sequential(
        [
            keras.Input((20,), name="x"),
            layers.Dense(30, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(4),
        ]
    )


def convolutional():
    return keras.Sequential(
        [
            keras.Input((12, 12, 3)),
            layers.Conv2D(8, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.SeparableConv2D(6, 3),
            layers.GlobalAveragePooling2D(),
            layers.Dense(4),
        ]
    )


@keras.saving.register_keras_serializable(package="test_serving")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = layers.Dense(32, activation="relu")
        self.last = layers.Dense(3)

    def call(self, inputs, training=False):
        return {"logits": self.last(self.inner(inputs))}


def subclassed():
    model = Subclassed()
    model(np.zeros((1, 10), "float32"))
    return model


def contents(folder):
    """Returns the bytes of all files in a folder by path."""
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}
