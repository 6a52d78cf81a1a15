"""Calls neither read nor advance random generators of the process, and share none."""

import inspect
import itertools
import os
import random
import subprocess
import sys

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, find_ticket, training

pytestmark = pytest.mark.once("tensorflow")

X = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
Y = (X[:, 0] > 0).astype("int32")


def compiled():
    """Returns a model whose layers have no seeds."""
    layers = [
        keras.layers.Dense(6, activation="relu", name="a"),
        keras.layers.Dropout(0.2),
        keras.layers.Dense(6, activation="relu", name="b"),
        keras.layers.Dense(2, name="c"),
    ]
    model = keras.Sequential([keras.Input((6,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def states():
    """Returns the states of all generators of the process."""
    import tensorflow as tf
    from keras.src.random import seed_generator

    shared = seed_generator.global_seed_generator().state
    return {
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),  # noqa: NPY002
        "keras": keras.ops.convert_to_numpy(shared).tolist(),
        "tensorflow": tf.random.get_global_generator().state.numpy().tolist(),
    }


def test_calls_leave_the_generators_of_the_process_alone(tmp_path):
    plain, advanced = compiled(), {}

    def unchanged(call):
        before = states()
        result = call()
        names = [name for name, state in states().items() if state != before[name]]
        if names:
            advanced[inspect.getsource(call).strip()] = names
        return result

    masked = unchanged(lambda: ml.convert_to_masked(plain))
    pruner = unchanged(lambda: LotteryTicketPruner(masked))
    unchanged(lambda: training.train(masked, X, Y, steps=3, batch_size=8, seed=1))
    unchanged(lambda: training.fit(masked, X, Y, epochs=1, batch_size=8, seed=1))
    pruner.set_pretrained_weights()
    for criterion in ("random", "large_final"):
        unchanged(lambda criterion=criterion: pruner.update_masks(criterion, rate=0.3))
    unchanged(lambda: pruner.update_masks("snip", rate=0.1, data=(X, Y)))
    unchanged(lambda: pruner.treat("reinit", "zero"))
    unchanged(lambda: pruner.rewind())
    unchanged(lambda: pruner.evaluate_supermask(X, Y, verbose=0))
    unchanged(lambda: ml.save_ticket(masked, tmp_path / "t.safetensors"))
    unchanged(lambda: ml.load_ticket(tmp_path / "t.safetensors"))
    unchanged(lambda: ml.shrink(ml.strip_masks(masked)))
    unchanged(lambda: ml.convert_to_masked(plain, mask=ml.EdgePopupMask(seed=1)))
    search = {"rounds": 1, "rate": 0.2, "steps": 2, "batch_size": 8, "controls": ["random_mask"]}
    unchanged(lambda: find_ticket(masked, X, Y, **search))
    assert advanced == {}


def masks_of(seed, updates, criterion="random"):
    """Returns the masks after some updates, by path."""
    model = ml.convert_to_masked(compiled())
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights()
    for number in range(updates):
        pruner.update_masks(criterion, rate=0.5, seed=None if seed is None else seed + number)
    return ml.get_masks(model)


def test_random_masks_differ_between_layers_updates_and_seeds():
    one = masks_of(None, 1)
    drawn = [one["a/kernel"], one["b/kernel"], masks_of(9, 1)["a/kernel"]]
    # Of the second update alone: the weights that it has dropped, as if all had been kept.
    model = ml.convert_to_masked(compiled())
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", rate=0.0)
    pruner.update_masks("random", rate=0.5)
    drawn.append(ml.get_masks(model)["a/kernel"])
    for first, second in itertools.combinations(drawn, 2):
        assert not np.array_equal(first, second)
    np.testing.assert_array_equal(masks_of(None, 1)["a/kernel"], one["a/kernel"])


CODE = """
import hashlib, numpy as np
from lottery_ticket_pruner import selection
rng = np.random.default_rng(0)
kernels = {p: selection.Weights(mask=np.ones((9, 9), bool), final=rng.normal(size=(9, 9)).round(1))
           for p in ("a/kernel", "b/kernel", "c/kernel")}
for criterion in ("random", "large_final"):
    for scope in ("layer", "global", "output"):
        masks = selection.update(criterion, kernels, rate=0.5, scope=scope, seed=3)
        print(hashlib.sha256(b"".join(masks[p].tobytes() for p in sorted(masks))).hexdigest())
"""


@pytest.mark.slow
def test_masks_are_the_same_with_any_order_of_hashes():
    outputs = {
        subprocess.run(
            [sys.executable, "-c", CODE],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 6
