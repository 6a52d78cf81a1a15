"""Masks under TensorFlow's distribution strategies: the same on all replicas, decided once.

Devices are configured before TensorFlow starts, so these tests run in processes of their own. So do
those of a strategy for one device: a strategy that stayed in scope would break all later tests.
"""

import json
import socket

import pytest

from processes import printed, printed_by_one, started

START = """
import sys
import keras
import numpy as np
import tensorflow as tf
from keras import layers
import masked_layers as ml
from lottery_ticket_pruner import DynamicSparseTraining, GradualPruning, LotteryTicketPruner
from lottery_ticket_pruner import training
from lottery_ticket_pruner.schedules import Polynomial

rng = np.random.default_rng(0)
x = rng.normal(size=(32, 6)).astype("float32")
y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)


def net():
    keras.utils.set_random_seed(0)
    plain = keras.Sequential(
        [keras.Input((6,)), layers.Dense(16, activation="relu"), layers.Dense(3)]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    plain.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return plain


def copies(variable):
    return [np.array(copy) for copy in variable.value.values]


def check(model, what):
    for ref in ml.masked_refs(model):
        own = [ref.mask.value] + ([] if ref.mask.frozen is None else [ref.mask.frozen])
        for variable in own:
            first, *others = copies(variable)
            assert all((first == other).all() for other in others), (what, variable.path)


def refused(function, words):
    before = ml.get_masks(model)
    try:
        function()
    except ValueError as error:
        assert words in str(error), error
    else:
        raise AssertionError(f"not refused: {words}")
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, before[path])
"""

SINGLE = """
import logging

from keras.src.backend.tensorflow.trainer import TFEpochIterator

from lottery_ticket_pruner import PrunerCallback
from masked_layers import _keras


class Largest(keras.callbacks.Callback):
    seen = ()

    def on_train_batch_end(self, batch, logs=None):
        pruned = [now[~mask] for *_, now, mask in pruner.iterate_prunables(self.model)]
        self.seen += (max(abs(part).max(initial=0) for part in pruned),)


strategy = tf.distribute.MirroredStrategy(["CPU:0"])
with strategy.scope():
    plain, twin, bare = net(), net(), net()
    _keras.check_strategy(bare)
    model = ml.convert_to_masked(bare)
    model.compile("adam", bare.loss)
_keras.check_strategy(net())
refused(lambda: _keras.check_strategy(bare), "strategy.scope")
refused(lambda: ml.convert_to_masked(bare), "strategy.scope")
ml.set_masks(model, {path: rng.random(m.shape) < 0.5 for path, m in ml.get_masks(model).items()})
for ref in ml.masked_refs(model):
    assert isinstance(ref.mask.value.value, tf.distribute.DistributedValues)
model.fit(x, y, verbose=0)
for ref in ml.masked_refs(model):
    assert not np.array(ref.layer.kernel)[~np.array(ref.mask.value)].any()

told = []
handler = logging.Handler()
handler.emit = lambda record: told.append(record.getMessage())
logging.getLogger("lottery_ticket_pruner").addHandler(handler)
# Keras' own `fit` is the check: if it discards no iterator, `_keras.built_from` can go.
discarded, reset = [], TFEpochIterator.reset
TFEpochIterator.reset = lambda it: (discarded.append(it._current_iterator is not None), reset(it))
training.fit(plain, x, y, batch_size=8, shuffle=False, validation_data=(x, y))
assert discarded and not any(discarded), discarded
twin.fit(x, y, batch_size=8, shuffle=False, verbose=0)
assert discarded[-1]
for ours, theirs in zip(plain.get_weights(), twin.get_weights(), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
ours = LotteryTicketPruner(model)
plainly = tf.data.Dataset.from_tensor_slices((x, y)).batch(8)
found = [ours.evaluate_supermask(x, y, batch_size=8, verbose=0)]
found += [ours.evaluate_supermask(plainly, verbose=0)]
assert not any(discarded[-2:])
assert found == [model.evaluate(x, y, batch_size=8, return_dict=True, verbose=0)] * 2
assert discarded[-1]
assert any("the model is distributed by MirroredStrategy" in message for message in told), told

pruner = LotteryTicketPruner(plain)
pruner.calc_prune_mask(plain, 0.5, "large_init")
largest = Largest()
plain.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[PrunerCallback(pruner), largest])
assert set(largest.seen) == {0.0}, largest.seen
assert not tf.distribute.has_strategy()
print("held")
"""

MIRRORED = """
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
with strategy.scope():
    model = ml.convert_to_masked(net())
assert len(copies(ml.masked_refs(model)[0].mask.value)) == 2


def prune(model):
    pruner = LotteryTicketPruner(model)
    schedule = Polynomial(0.2, 0.6, begin_step=1, end_step=3, frequency=2)
    callback = GradualPruning(pruner, schedule)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
    check(model, "gradual pruning") if model is distributed else None
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.3)
    pruner.rewind()
    moving = DynamicSparseTraining(pruner, 4, data=(x, y), frequency=2, until=1.0)
    model.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[moving])
    check(model, "RigL") if model is distributed else None
    return model


distributed = model
one = prune(ml.convert_to_masked(net()))
prune(model)
for path, mask in ml.get_masks(one).items():
    np.testing.assert_array_equal(ml.get_masks(model)[path], mask)
for ours, theirs in zip(model.get_weights(), one.get_weights(), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)

pruner = LotteryTicketPruner(model)
refused(lambda: strategy.run(lambda: pruner.update_masks("random", rate=0.5)), "strategy.run")
refused(lambda: ml.convert_to_masked(model), "strategy.scope()")
with strategy.scope():
    refused(lambda: ml.export_sparse_saved_model(model, sys.argv[1]), "Call it outside")
refused(lambda: training.evaluate(model, x[:1], y[:1]), "2 examples or more")
# Acts on batches, so that `fit` of Keras validates: a first batch of 7 is for one replica alone.
watching = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
seven = (x[:7], y[:7])
found = training.fit(model, x, y, batch_size=32, validation_data=seven, callbacks=[watching])
loss = training.evaluate(model, *seven)["loss"]
np.testing.assert_allclose(found.history["val_loss"], loss, rtol=1e-5)
variable = ml.masked_refs(model)[0].mask.value


@tf.function
def assign():
    replica = tf.distribute.get_replica_context().replica_id_in_sync_group
    variable.assign(tf.fill(variable.shape, replica == 0))


strategy.run(assign)
check(model, "assignment in strategy.run")
assert copies(variable)[1].all()
pruner.set_pretrained_weights()
pruner.update_masks("large_final", rate=0.3)
pruner.treat(pruned="freeze")
check(model, "treat")
model.save_weights(sys.argv[1])
with strategy.scope():
    model = ml.convert_to_masked(net())
model.load_weights(sys.argv[1])
check(model, "load_weights")
print("held")
"""

WORKER = """
import hashlib
import os

strategy = tf.distribute.MultiWorkerMirroredStrategy()
with strategy.scope():
    model = ml.convert_to_masked(net())
    model.optimizer.build(model.trainable_variables)
pruner = LotteryTicketPruner(model)
schedule = Polynomial(0.2, 0.6, begin_step=1, end_step=3, frequency=2)
pruning = GradualPruning(pruner, schedule)


def part(context):
    batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(8 // context.num_input_pipelines)
    return batches.shard(context.num_input_pipelines, context.input_pipeline_id)


def step(x, y):
    with tf.GradientTape() as tape:
        loss = model.compute_loss(x, y, model(x, training=True))
    variables = model.trainable_variables
    model.optimizer.apply(tape.gradient(loss, variables), variables)


@tf.function
def train(batch):
    strategy.run(step, args=batch)


for batch in strategy.distribute_datasets_from_function(part):
    train(batch)
    pruning.advance()
pruner.update_masks("snip", rate=0.3, data=(x, y))
me = strategy.cluster_resolver.task_id
other = {path: rng.random(mask.shape) < 0.3 + me / 2 for path, mask in ml.get_masks(model).items()}
refused(lambda: ml.set_masks(model, other), "different masks")
refused(lambda: pruner.update_masks("snip", rate=0.3, data=(x + me, y)), "different masks")
keras.utils.set_random_seed(me)
plain = keras.Sequential([keras.Input((6,)), layers.Dense(4)])
with strategy.scope():
    refused(lambda: ml.convert_to_masked(plain), "different weights")
try:
    training.fit(model, x, y, batch_size=8)
except Exception as error:  # If Keras can do this now, docs/distribution.md is outdated.
    assert "strategy.run" in error.__notes__[0]
    print("no fit")
digest = hashlib.sha256()
for mask in ml.get_masks(model).values():
    digest.update(mask.tobytes())
for weight in model.get_weights():
    digest.update(weight.tobytes())
one = ml.convert_to_masked(net())
own = LotteryTicketPruner(one)
pruning = GradualPruning(own, schedule)
one.fit(x, y, batch_size=8, shuffle=False, verbose=0, callbacks=[pruning])
own.update_masks("snip", rate=0.3, data=(x, y))
for path, mask in ml.get_masks(one).items():
    np.testing.assert_array_equal(ml.get_masks(model)[path], mask)
for ours, theirs in zip(model.get_weights(), one.get_weights(), strict=True):
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
print(digest.hexdigest())
"""


@pytest.mark.slow
@pytest.mark.once("tensorflow")
def test_models_of_a_single_device_are_distributed_too():
    assert printed_by_one(START + SINGLE)[-1] == "held"


@pytest.mark.once("tensorflow")
def test_mirrored_replicas_have_the_masks_of_one_device(tmp_path):
    assert printed_by_one(START + MIRRORED, tmp_path / "model.weights.h5")[-1] == "held"


@pytest.mark.slow
@pytest.mark.once("tensorflow")
def test_workers_agree_on_masks_or_are_refused():
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    settings = [json.dumps({"cluster": cluster, "task": task}) for task in tasks]
    one, other = printed([started(START + WORKER, TF_CONFIG=setting) for setting in settings])
    assert one[-3:-1] == ["no", "fit"]
    assert one[-1] == other[-1]
