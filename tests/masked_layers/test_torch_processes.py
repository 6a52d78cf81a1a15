"""One masked model trained by two processes of `torch.distributed` (DistributedDataParallel)."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml

PROGRAM = """
import os
import sys

import keras
import numpy as np
import torch
from keras import layers
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules, training

folder = sys.argv[1]
rank = 0 if os.fork() else 1  # After the imports, which take longer than all else.
torch.set_num_threads(1)
distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(64, 6)).astype("float32"), RNG.integers(0, 4, 64)


def net(seed):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(16, "relu"), layers.Dense(4)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss)
    return ml.convert_to_masked(model)


def train(model, called, pruning, part):
    for start in range(0, 64, 16):
        model.zero_grad()
        x, y = X[start:start + 16][part], torch.tensor(Y[start:start + 16][part])
        model.compute_loss(y=y, y_pred=called(torch.tensor(x), training=True)).backward()
        with torch.no_grad():
            weights = model.trainable_weights
            model.optimizer.apply([weight.value.grad for weight in weights], weights)
        pruning.advance()


def gradual(model):
    return GradualPruning(LotteryTicketPruner(model), schedules.Constant(0.5, frequency=2))


model = net(seed=rank)  # Other values on each process: the wrapper copies those of process 0.
together = DistributedDataParallel(model)
train(model, together, gradual(model), slice(rank, None, 2))
assert ml.sparsity_report(model).sparsity == 0.5
np.savez(f"{folder}/trained-{rank}.npz", *[v.numpy() for v in model.variables])
assert ml.broadcast_state(model) == 0, "masks by magnitude follow from equal weights"

pruner = LotteryTicketPruner(model)
pruner.update_masks("snip", sparsity=0.8, data=(X[rank::2], Y[rank::2]))  # each with its part
differing = ml.broadcast_state(model)
assert (differing > 0) == (rank == 1), differing
np.savez(f"{folder}/pruned-{rank}.npz", *[v.numpy() for v in model.variables])

if rank == 1:
    pruner.treat(pruned="freeze")
try:
    ml.broadcast_state(model)
except ValueError as error:
    assert "other variables" in str(error), error
else:
    raise AssertionError("different models were not noticed")
training.train(net(seed=0), X, Y, steps=1, batch_size=16)
distributed.destroy_process_group()

if rank == 0:
    alone = net(seed=0)
    train(alone, alone, gradual(alone), slice(None))
    np.savez(f"{folder}/alone.npz", *[v.numpy() for v in alone.variables])
    assert os.wait()[1] == 0, "the other process failed"
print("held")
"""


@pytest.mark.once("torch")
def test_masks_and_weights_are_equal_on_all_processes(tmp_path):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["held", "held"]
    assert done.stderr.count("each of them trains a model of its own") == 2

    def saved(name):
        with np.load(tmp_path / f"{name}.npz") as arrays:
            return list(arrays.values())

    for name in ("trained", "pruned"):
        for first, second in zip(saved(f"{name}-0"), saved(f"{name}-1"), strict=True):
            np.testing.assert_array_equal(first, second)
    for together, alone in zip(saved("trained-0"), saved("alone"), strict=True):
        np.testing.assert_allclose(together, alone, atol=1e-6)


def test_a_state_is_only_broadcast_between_processes_of_torch():
    model = ml.convert_to_masked(keras.Sequential([keras.Input((3,)), layers.Dense(2)]))
    torch = keras.backend.backend() == "torch"
    with pytest.raises(ValueError, match="init_process_group" if torch else "by the backend"):
        ml.broadcast_state(model)
