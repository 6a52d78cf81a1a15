"""Small pruned models, and functions to compare them."""

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner


def compiled(model, optimizer=None, **kwargs):
    model.compile(
        optimizer or keras.optimizers.SGD(0.01, momentum=0.9),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        **kwargs,
    )
    return model


def plain_model(seed=0):
    """Returns a model with a kernel, batch normalization, dropout, a head and nonzero biases."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(10, "relu", bias_initializer="random_normal", name="hidden"),
            layers.BatchNormalization(),
            layers.Dropout(0.2),
            layers.Dense(2, name="head"),
        ]
    )


def masked_model(optimizer=None, seed=0, **kwargs):
    return compiled(ml.convert_to_masked(plain_model(seed)), optimizer, **kwargs)


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def moved():
    """Returns an uncompiled model with weights that differ from the initial ones, as if trained."""
    model = ml.convert_to_masked(plain_model())
    pruner = LotteryTicketPruner(model)
    rng = np.random.default_rng(1)
    model.set_weights([w + rng.normal(0, 0.1, w.shape) for w in model.get_weights()])
    pruner.set_pretrained_weights()
    return model, pruner


def trained(data, **kwargs):
    model = masked_model(**kwargs)
    pruner = LotteryTicketPruner(model)
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    return model, pruner
