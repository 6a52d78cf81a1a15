"""A small model whose masks change during training, and what is recorded of them."""

import keras
import numpy as np
from keras import ops

import masked_layers as ml


def make_data(examples=60):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(examples, 8)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


def make_model(optimizer=None, **compile_arguments):
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(2)]
    )
    model = ml.convert_to_masked(model)
    model.compile(
        optimizer or keras.optimizers.SGD(0.05, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        **compile_arguments,
    )
    return model


def zeros(model):
    """Counts the zeros of effective weights, by layer."""
    return [
        int(np.count_nonzero(ops.convert_to_numpy(getattr(ref.layer, ref.name)) == 0))
        for ref in ml.masked_refs(model)
    ]


class Watch(keras.callbacks.Callback):
    """Records the masks before the first batch and at the end of every batch."""

    def on_train_begin(self, logs=None):
        self.zeros, self.masks = [zeros(self.model)], [ml.get_masks(self.model)]

    def on_train_batch_end(self, batch, logs=None):
        if hasattr(self.model, "jax_state_sync"):
            self.model.jax_state_sync()
        self.zeros.append(zeros(self.model))
        self.masks.append(ml.get_masks(self.model))


def same_masks(one, other):
    return all((one[path] == other[path]).all() for path in one)
