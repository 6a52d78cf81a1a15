"""Masks of a model whose weights are distributed over devices (`ModelParallel`, on JAX)."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

from masked_layers import _keras

SCRIPT = """
import os
os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import sys
import keras
import numpy as np
from keras import layers
import masked_layers as ml
from lottery_ticket_pruner import (
    DynamicSparseTraining, GradualPruning, LotteryTicketPruner, schedules,
)

devices = keras.distribution.list_devices()
mesh = keras.distribution.DeviceMesh((1, 4), ("batch", "model"), devices)
layout_map = keras.distribution.LayoutMap(mesh)
layout_map[".*in/kernel"] = (None, "model")
layout_map[".*out/kernel"] = ("model", None)
distribution = keras.distribution.ModelParallel(layout_map=layout_map, batch_dim_name="batch")
keras.distribution.set_distribution(distribution)


def net(optimizer="sgd"):
    model = keras.Sequential(
        [keras.Input((6,)), layers.Dense(8, name="in"), layers.Dense(4, name="out")], name="net"
    )
    model.compile(optimizer, "mse")
    return model


def shards(variable):
    return sorted(
        (shard.device.id, str(shard.index)) for shard in variable.value.addressable_shards
    )


def check(model, what):
    for ref in ml.masked_refs(model):
        own = [ref.mask.scores] if ref.mask.learned else [ref.mask.value]
        own += [] if ref.mask.frozen is None else [ref.mask.frozen]
        assert len({index for _, index in shards(ref.variable)}) == 4, "the kernel is not spread"
        for variable in own:
            assert shards(variable) == shards(ref.variable), (what, ref.path, variable.path)


x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
y = x[:, :4]
plain = net()
before = plain.predict(x, verbose=0)
model = ml.convert_to_masked(plain)
check(model, "conversion")
np.testing.assert_array_equal(model.predict(x, verbose=0), before)
rng = np.random.default_rng(1)
masks = {path: rng.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
ml.set_masks(model, masks)
check(model, "set_masks")
for path, mask in ml.get_masks(model).items():
    np.testing.assert_array_equal(mask, masks[path])
model.fit(x, y, verbose=0)
check(model, "fit")
pruner = LotteryTicketPruner(model)
pruner.update_masks("smallest_weights", sparsity=0.7)
check(model, "update_masks")
pruner.treat(pruned="freeze")
assert all(ref.mask.frozen is not None for ref in ml.masked_refs(model))
check(model, "treat")
model.fit(x, y, verbose=0)
check(model, "fit with frozen values")
outputs = model.predict(x, verbose=0)
model.save(sys.argv[1])
loaded = keras.models.load_model(sys.argv[1])
check(loaded, "load_model")
np.testing.assert_allclose(loaded.predict(x, verbose=0), outputs, rtol=1e-6)
ml.convert_to_masked(plain, inplace=True)
check(plain, "conversion in place")
learned = ml.convert_to_masked(net(), mask="edge_popup")
check(learned, "learned")
learned.fit(x, y, verbose=0)
check(learned, "fit of scores")
check(ml.harden(learned), "harden")
pruner.rewind()
check(model, "rewind")
model.fit(x, y, verbose=0, callbacks=[
    GradualPruning(pruner, schedules.Constant(0.8, frequency=1)),
    DynamicSparseTraining(pruner, steps=4, data=(x, y), frequency=1),
])
check(model, "GradualPruning and RigL")

# Other names than those of the patterns: a copy has other paths, and a ticket is made from arrays.
named = keras.distribution.LayoutMap(mesh)
named["net/in/kernel"], named["net/out/kernel"] = (None, "model"), ("model", None)
keras.distribution.set_distribution(
    keras.distribution.ModelParallel(layout_map=named, batch_dim_name="batch")
)
plain = net("adam")
plain.fit(x, y, verbose=0)
keras.distribution.set_distribution(None)
copy = ml.convert_to_masked(plain)  # outside of the distribution
keras.distribution.set_distribution(distribution)
check(copy, "copy")
for old, new in zip(plain.optimizer.variables, copy.optimizer.variables, strict=True):
    assert shards(old) == shards(new), new.path
copy.fit(x, y, verbose=0)
ml.save_ticket(copy, sys.argv[1] + ".ticket")
check(ml.load_ticket(sys.argv[1] + ".ticket"), "load_ticket")
masks["in/kernel"][:] = masks["out/kernel"][:] = True
masks["in/kernel"][:, 0] = masks["out/kernel"][0] = False
ml.set_masks(copy, masks)
try:
    ml.shrink(copy)
except ValueError as error:
    assert "without one" in str(error), error
else:
    raise AssertionError("seven units were divided among four devices")
keras.distribution.set_distribution(None)
np.testing.assert_allclose(ml.shrink(copy)(x), copy(x), atol=1e-6)
print("held")
"""


@pytest.mark.once("jax")
def test_masks_are_spread_like_their_kernels(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "model.keras")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == "held"


@pytest.mark.once("jax")
def test_devices_of_jax_are_those_of_a_variable_that_is_made_later():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], keras.distribution.list_devices()[:1])
    layouts = keras.distribution.LayoutMap(mesh)
    layouts["like"] = ("batch", None)
    ones = keras.initializers.Ones()
    # At the end of the inner scope, the variables are made.
    with keras.distribution.ModelParallel(layout_map=layouts).scope(), keras.StatelessScope():
        like = keras.Variable(ones, shape=(2, 3), name="like")
        variable = keras.Variable(ones, shape=(2, 3))
        _keras.match_devices(variable, like)
        assert like._layout is None
    assert variable._layout is like._layout is layouts["like"]
