"""Models and pruners in several threads share no state."""

import concurrent.futures
import os
import warnings

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, training

pytestmark = pytest.mark.once

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 4)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def compiled(units):
    initializer = keras.initializers.GlorotUniform(seed=units)
    layers = [
        keras.layers.Dense(units, activation="relu", kernel_initializer=initializer),
        keras.layers.Dropout(0.2, seed=units),
        keras.layers.Dense(2, kernel_initializer=initializer),
    ]
    model = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), *layers]))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss)
    return model


def work(model, seed, folder):
    """Trains, prunes, rewinds, writes files; returns weights, masks and what the files have."""
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("snip", rate=0.1, data=(X, Y), scope="global")
    for number in range(2):
        training.train(model, X, Y, steps=20, batch_size=10, seed=(seed, number))
        pruner.set_pretrained_weights()
        pruner.update_masks("random", rate=0.3, seed=seed + number)
        pruner.rewind()
    training.train(model, X, Y, steps=20, batch_size=10, seed=seed)
    masks = ml.get_masks(model)
    results = [w.copy() for w in model.get_weights()] + [masks[path] for path in sorted(masks)]
    file = folder / f"{seed}.safetensors"
    ml.save_ticket(model, file)
    results += ml.load_ticket(file).get_weights()
    ml.export_sparse_saved_model(model, folder / f"{seed}")
    import tensorflow as tf

    loaded = tf.saved_model.load(str(folder / f"{seed}"))
    return [*results, loaded.serve(X).numpy()]


@pytest.mark.slow
def test_threads_compute_what_they_compute_alone(tmp_path):
    sizes = (5, 6)
    alone = [work(compiled(units), units, tmp_path) for units in sizes]
    before, mask = [*warnings.filters], os.umask(0o22)
    models = [compiled(units) for units in sizes]
    with concurrent.futures.ThreadPoolExecutor(len(sizes)) as threads:
        together = list(threads.map(work, models, sizes, [tmp_path] * len(sizes)))
    assert (warnings.filters, os.umask(mask)) == (before, 0o22)
    for one, other in zip(alone, together, strict=True):
        for first, second in zip(one, other, strict=True):
            np.testing.assert_array_equal(first, second)
