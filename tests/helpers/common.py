"""Helpers that tests of several modules share: tensors as arrays, made-up data, random masks."""

import numpy as np
from keras import ops

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
