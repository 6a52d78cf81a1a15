"""Training, pruning and searching under `keras.distribution` on JAX, on four devices."""

import os
import subprocess
import sys

import pytest

# The number of devices is fixed when JAX starts, so everything runs in one process.
PROGRAM = """
import sys

import jax
jax.config.update("jax_num_cpu_devices", 4)

import keras
import numpy as np
from keras import distribution, layers

import masked_layers as ml
from lottery_ticket_pruner import (
    DynamicSparseTraining, GradualPruning, LotteryTicketPruner, PrunerCallback, find_ticket,
    schedules, training,
)

devices = distribution.list_devices("cpu")
assert len(devices) == 4
if sys.argv[1] == "data":
    distribution.set_distribution(distribution.DataParallel(devices=devices))
else:
    layout = distribution.LayoutMap(distribution.DeviceMesh((2, 2), ("batch", "model"), devices))
    layout[".*dense.*kernel"] = (None, "model")
    layout[".*dense.*bias"] = ("model",)
    parallel = distribution.ModelParallel(layout_map=layout, batch_dim_name="batch")
    distribution.set_distribution(parallel)

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 6)).astype("float32"), RNG.integers(0, 4, 64)


def compiled(convert=ml.convert_to_masked):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(8), layers.Dropout(0.2),
                              layers.BatchNormalization(), layers.Dense(4)])
    model = convert(model)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    return model


# Metrics and slots of the optimizer are made by the first training, whichever it is.
for first in (training.train, training.fit):
    model = compiled()
    amount = {"steps": 4} if first is training.train else {"epochs": 1}
    first(model, X, Y, batch_size=16, **amount, validation_data=(X, Y))
    assert model.optimizer.iterations.numpy() == 4
    found = training.evaluate(model, X, Y)
    np.testing.assert_allclose(found["accuracy"], model.evaluate(X, Y, verbose=0)[1], atol=1e-6)
    training.train(model, X, Y, steps=3, batch_size=16)
    assert model.optimizer.iterations.numpy() == 7
model = compiled()
training.evaluate(model, X, Y)
model.fit(X, Y, batch_size=16, verbose=0)

pruner = LotteryTicketPruner(model)
pruner.set_pretrained_weights()
for strategy in ("large_final", "snip", "grasp", "synflow", "wanda"):
    pruner.reset_masks()
    assert pruner.update_masks(strategy, sparsity=0.5, data=(X, Y)).alive == 40
    pruner.rewind()
    model.fit(X, Y, batch_size=16, verbose=0)
for callback in (
    GradualPruning(pruner, schedules.Constant(0.75, frequency=1)),
    DynamicSparseTraining(pruner, steps=4, data=(X, Y), frequency=2),
):
    model.fit(X, Y, batch_size=16, verbose=0, callbacks=[callback])
    assert ml.sparsity_report(model).alive == 20

plain = compiled(lambda model: model)
pruner = LotteryTicketPruner(plain)
pruner.calc_prune_mask(plain, 0.5, "smallest_weights")
plain.fit(X, Y, batch_size=16, verbose=0, callbacks=[PrunerCallback(pruner)])
assert sum(int((w == 0).sum()) for w in plain.get_weights() if w.ndim == 2) == 40

for uneven in (
    lambda: training.fit(model, X[:61], Y[:61], batch_size=16),
    lambda: training.train(model, X, Y, steps=1, batch_size=16, validation_data=(X[:33], Y[:33])),
    lambda: training.evaluate(model, X[:33], Y[:33]),
):
    before = model.get_weights()
    try:
        uneven()
    except ValueError as error:
        assert "must be a multiple of" in str(error), error
    else:
        raise AssertionError("an uneven batch was divided")
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)

result = find_ticket(compiled(), X, Y, rounds=1, steps=4, batch_size=16, rate=0.5,
                     controls=(), validation_data=(X, Y), eval_every=2)
assert result.rows[-1]["sparsity"] == 0.5
print("done")
"""


@pytest.mark.once("jax")
@pytest.mark.parametrize("parallel", ["data", pytest.param("model", marks=pytest.mark.slow)])
def test_trainings_evaluations_updates_and_searches(parallel, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    run = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), parallel],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    assert run.stdout.endswith("done\n"), run.stderr
    # Logged once for any number of trainings.
    assert run.stderr.count("a `keras.distribution` is set") == 2, run.stderr
