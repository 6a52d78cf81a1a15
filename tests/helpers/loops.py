"""Small models and data for compiled loops, and functions to compare results."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import engine

BACKEND = keras.backend.backend()
COMPILED = BACKEND in ("tensorflow", "jax")
needs_loop = pytest.mark.skipif(not COMPILED, reason="no compiled loop on this backend")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int32")
WEIGHT = RNG.uniform(0.5, 2, 50).astype("float32")


def dense():
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu"), layers.Dense(2)])


def with_state(dropout=0.3):
    """Returns a model with dropout, statistics, a penalty, a constraint and masks."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", kernel_regularizer="l2", kernel_constraint="max_norm"),
            layers.BatchNormalization(),
            layers.Dropout(dropout, seed=3),
            layers.Dense(2),
        ]
    )
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def two_inputs():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    return keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])))


def compiled(make, optimizer=None, **kwargs):
    if BACKEND == "tensorflow":
        # Like the loop, because TensorFlow draws different random numbers under XLA.
        kwargs.setdefault("jit_compile", make is with_state)
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
        **kwargs,
    )
    return model


def everything(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def by_xla(monkeypatch):
    monkeypatch.setattr(training.settings, "xla_steps", 0)


def through_fit(model):
    """Returns why a long training goes through `fit` as a text, or True if `fit` is faster."""
    current = engine.engine_of(model)
    if current._why_fit is not None or not current._loops.kinds(1000):
        return current._why_fit or True
    return any(comparison.fit_is_faster for comparison in current._comparisons.values())


def with_own_loss():
    """Has no targets: the loss is added by a layer."""

    class Sparse(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(keras.ops.abs(x)))
            return x

    return keras.Sequential([keras.Input((6,)), layers.Dense(2), Sparse()])
