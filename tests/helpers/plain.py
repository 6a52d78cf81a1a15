"""A plain classifier, and the largest weight that a mask prunes."""

import keras
import numpy as np
from keras import layers

from pruned import compiled


def classifier(seed=0, **compile_kwargs):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(10, "relu"), layers.Dense(2)])
    return compiled(model, **compile_kwargs)


def sparsities(pruner, model):
    return {key: 1 - mask.mean() for key, *_, mask in pruner.iterate_prunables(model)}


def largest_pruned(pruner, model):
    largest = [
        np.abs(now[~mask]).max(initial=0) for *_, now, mask in pruner.iterate_prunables(model)
    ]
    assert sum(int((~mask).sum()) for *_, mask in pruner.iterate_prunables(model)) > 0
    return max(largest)
