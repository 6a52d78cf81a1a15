"""Trains on several devices, and compares the masks of all of them after every update.

    python -m benchmarks.checks.replicas [--kinds NAME ...]

Each kind of distribution trains a masked network on logical CPU devices, in processes of its own,
and its masks change by `update_masks`, `GradualPruning` and RigL. Prints a table: the number of
updates, the mask elements that differ between two replicas, which must be 0, the mask elements that
differ from those on one device, and the largest difference of a trained weight from it.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH, EPOCHS = 16, 3
SECONDS = 900


def fit_by_keras(model: Any, x: np.ndarray, y: np.ndarray, callbacks: list[Any]) -> None:
    """Trains by `fit`."""
    model.fit(
        x,
        y,
        batch_size=BATCH,
        epochs=EPOCHS,
        shuffle=False,
        verbose=0,
        callbacks=callbacks,
    )


@dataclasses.dataclass(frozen=True)
class Place:
    """The devices of this process.

    Attributes:
        copies: Returns the values of a variable on all of them.
        fit: Trains a model on arrays, with callbacks.
    """

    copies: Callable[[Any], list[np.ndarray]]
    fit: Callable[[Any, np.ndarray, np.ndarray, list[Any]], None] = fit_by_keras


@contextlib.contextmanager
def one_device() -> Iterator[Place]:
    """Trains on one device, where a variable has one value."""
    yield Place(lambda variable: [np.array(variable.numpy())])


@contextlib.contextmanager
def mirrored() -> Iterator[Place]:
    """Trains on two logical CPU devices of TensorFlow."""
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
    with tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope():
        yield Place(_mirrored_copies)


def _mirrored_copies(variable: Any) -> list[np.ndarray]:
    return [np.array(copy) for copy in variable.value.values]


@contextlib.contextmanager
def multi_worker() -> Iterator[Place]:
    """Trains on two workers, of which this process is one.

    A custom loop, because `fit` of Keras 3 does not work with several workers.
    """
    import keras
    import tensorflow as tf

    strategy = tf.distribute.MultiWorkerMirroredStrategy()

    def fit(model: Any, x: np.ndarray, y: np.ndarray, callbacks: list[Any]) -> None:
        def part(context: tf.distribute.InputContext) -> tf.data.Dataset:
            workers = context.num_input_pipelines
            batches = tf.data.Dataset.from_tensor_slices((x, y)).batch(BATCH // workers)
            return batches.shard(workers, context.input_pipeline_id)

        def step(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                loss = model.compute_loss(x, y, model(x, training=True))
            variables = model.trainable_variables
            model.optimizer.apply(tape.gradient(loss, variables), variables)

        @tf.function
        def run(batch: Any) -> None:
            strategy.run(step, args=batch)

        model.optimizer.build(model.trainable_variables)
        chain = keras.callbacks.CallbackList(callbacks, model=model)
        chain.on_train_begin()
        for epoch in range(EPOCHS):
            chain.on_epoch_begin(epoch)
            for number, batch in enumerate(strategy.distribute_datasets_from_function(part)):
                chain.on_train_batch_begin(number)
                run(batch)
                chain.on_train_batch_end(number)
            chain.on_epoch_end(epoch)
        chain.on_train_end()

    with strategy.scope():
        yield Place(_mirrored_copies, fit)


@contextlib.contextmanager
def data_parallel() -> Iterator[Place]:
    """Trains on four logical CPU devices of JAX, which have all weights and a part of the batch."""
    from keras import distribution

    distribution.set_distribution(distribution.DataParallel(devices=distribution.list_devices()))
    yield Place(_sharded_copies)


@contextlib.contextmanager
def model_parallel() -> Iterator[Place]:
    """Trains on four logical CPU devices of JAX: two parts of each batch and of each kernel."""
    from keras import distribution

    mesh = distribution.DeviceMesh((2, 2), ("batch", "model"), distribution.list_devices())
    layouts = distribution.LayoutMap(mesh)
    layouts[".*first/kernel"] = (None, "model")
    layouts[".*(second|last)/kernel"] = ("model", None)
    distribution.set_distribution(distribution.ModelParallel(layout_map=layouts))
    yield Place(_sharded_copies)


def _sharded_copies(variable: Any) -> list[np.ndarray]:
    array = variable.value
    copies: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:
        copy = copies.setdefault(shard.replica_id, np.empty(array.shape, array.dtype))
        copy[shard.index] = np.asarray(shard.data)
    return list(copies.values())


@contextlib.contextmanager
def torch_processes() -> Iterator[Place]:
    """Trains by `DistributedDataParallel` in processes, of which this is one.

    A loop as in the guide of Keras, because `fit` does not average gradients among processes.
    """
    import keras
    import torch
    from torch import distributed

    import masked_layers as ml

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    count, rank = distributed.get_world_size(), distributed.get_rank()

    def fit(model: Any, x: np.ndarray, y: np.ndarray, callbacks: list[Any]) -> None:
        together = torch.nn.parallel.DistributedDataParallel(model)
        share = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda *_, **__: ml.broadcast_state(model)
        )
        *changing, last = callbacks
        chain = keras.callbacks.CallbackList([*changing, share, last], model=model)
        chain.on_train_begin()
        for epoch in range(EPOCHS):
            chain.on_epoch_begin(epoch)
            for number, start in enumerate(range(0, len(x), BATCH)):
                part = slice(start + rank, start + BATCH, count)
                chain.on_train_batch_begin(number)
                model.zero_grad()
                outputs = together(torch.tensor(x[part]), training=True)
                model.compute_loss(y=torch.tensor(y[part]), y_pred=outputs).backward()
                with torch.no_grad():
                    weights = model.trainable_weights
                    model.optimizer.apply([weight.value.grad for weight in weights], weights)
                chain.on_train_batch_end(number)
            chain.on_epoch_end(epoch)
        chain.on_train_end()

    yield Place(lambda variable: [np.array(variable.numpy())], fit)
    distributed.destroy_process_group()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of distribution.

    Attributes:
        backend: The backend of Keras.
        place: Returns a context in which the model is made and trained.
        processes: Number of processes that train together, found by the environment.
        environment: Variables of the environment.
    """

    backend: str
    place: Callable[[], contextlib.AbstractContextManager[Place]]
    processes: int = 1
    environment: dict[str, str] = dataclasses.field(default_factory=dict)


_FOUR = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
KINDS = {
    "MirroredStrategy": Kind("tensorflow", mirrored),
    "MultiWorkerMirroredStrategy": Kind("tensorflow", multi_worker, processes=2),
    "JAX DataParallel": Kind("jax", data_parallel, environment=_FOUR),
    "JAX ModelParallel": Kind("jax", model_parallel, environment=_FOUR),
    "torch DDP": Kind("torch", torch_processes, processes=2),
}


def work(kind: Kind) -> dict[str, np.ndarray]:
    """Trains and prunes; returns the masks of every device after every update, and the weights."""
    import keras
    from keras import layers

    import masked_layers as ml
    from lottery_ticket_pruner import DynamicSparseTraining, GradualPruning, LotteryTicketPruner
    from lottery_ticket_pruner.schedules import Polynomial

    rng = np.random.default_rng(0)
    x = rng.normal(size=(4 * BATCH, 8)).astype("float32")
    y = (x[:, 0] > 0).astype("int32") + (x[:, 1] > 0)
    with kind.place() as place:
        keras.utils.set_random_seed(0)
        plain = keras.Sequential(
            [
                keras.Input((8,)),
                layers.Dense(32, activation="relu", name="first"),
                layers.Dense(16, activation="relu", name="second"),
                layers.Dense(3, name="last"),
            ]
        )
        plain.compile(
            keras.optimizers.SGD(0.1, momentum=0.9),
            keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        )
        model = ml.convert_to_masked(plain)
        pruner = LotteryTicketPruner(model)
        found: dict[str, np.ndarray] = {}

        def note(*_: Any, **__: Any) -> None:
            ml.sync(model)
            number = len({name.split("/")[1] for name in found})
            for ref in ml.masked_refs(model):
                for device, mask in enumerate(place.copies(ref.mask.value)):
                    found[f"mask/{number}/{device}/{ref.path}"] = mask

        def fit(*callbacks: keras.callbacks.Callback) -> None:
            after = keras.callbacks.LambdaCallback(on_train_batch_end=note)
            place.fit(model, x, y, [*callbacks, after])

        fit()
        pruner.set_pretrained_weights()
        pruner.update_masks("large_final", rate=0.3)
        note()
        pruner.rewind()
        fit(GradualPruning(pruner, Polynomial(0.4, 0.6, begin_step=1, end_step=9, frequency=2)))
        pruner.rewind()
        moving = DynamicSparseTraining(pruner, 4 * EPOCHS, data=(x, y), frequency=2, until=1.0)
        fit(moving)
        weights = {f"weight/{i}": value for i, value in enumerate(model.get_weights())}
    return found | weights


def train(kind: Kind, folder: Path, name: str) -> list[dict[str, np.ndarray]]:
    """Trains in new processes, and returns what each of them found."""
    running, files = [], []
    ports = [_free_port() for _ in range(kind.processes)]
    workers = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    for index in range(kind.processes):
        environment = {**os.environ, **kind.environment, "KERAS_BACKEND": kind.backend}
        environment["TF_CPP_MIN_LOG_LEVEL"] = "3"
        if kind.processes > 1:
            task = {"type": "worker", "index": index}
            environment["TF_CONFIG"] = json.dumps({"cluster": workers, "task": task})
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(ports[0])}
            environment |= {"RANK": str(index), "WORLD_SIZE": str(kind.processes)}
        files.append(folder / f"{name}-{index}.npz")
        line = [sys.executable, "-m", "benchmarks.checks.replicas", "--one", name, str(files[-1])]
        running.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=SECONDS)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    for process, error in zip(running, errors, strict=True):
        if process.returncode:
            raise RuntimeError(f"{name} failed: {error[-3000:]}")
    found = []
    for file in files:
        with np.load(file) as arrays:
            found.append(dict(arrays))
    return found


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


def row(name: str, found: list[dict[str, np.ndarray]], one: dict[str, np.ndarray]) -> list[str]:
    """Returns the row of a kind, given what its processes found and what one device did."""
    masks: dict[tuple[str, str], list[np.ndarray]] = {}
    for process in found:
        for key, array in process.items():
            if key.startswith("mask/"):
                _, update, _, path = key.split("/", 3)
                masks.setdefault((update, path), []).append(array)
    replicas = {len(copies) for copies in masks.values()}
    differing = sum(
        int((copy != copies[0]).sum()) for copies in masks.values() for copy in copies[1:]
    )
    expected = {
        (key.split("/")[1], key.split("/", 3)[3]): one[key] for key in one if "mask/" in key
    }
    if expected.keys() != masks.keys():
        raise RuntimeError(f"{name} has masks of other updates than one device.")
    away = sum(int((masks[key][0] != mask).sum()) for key, mask in expected.items())
    largest = max(
        float(np.abs(process[key] - one[key]).max())
        for process in found
        for key in one
        if key.startswith("weight/")
    )
    changes = _changes(expected)
    return [name, *map(str, replicas), str(changes), str(differing), str(away), f"{largest:.1e}"]


def _changes(masks: dict[tuple[str, str], np.ndarray]) -> int:
    """Returns how often a mask is not what it was before, the first masks not counted."""
    numbers = sorted({int(number) for number, _ in masks})
    paths = {path for _, path in masks}
    pairs = itertools.pairwise(numbers)
    return sum(
        any((masks[str(a), path] != masks[str(b), path]).any() for path in paths) for a, b in pairs
    )


def main(arguments: Any = None) -> int:
    """Prints the table; returns 1 if a mask differs between replicas."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checks.replicas",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    there = [name for name, kind in KINDS.items() if importlib.util.find_spec(kind.backend)]
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=there)
    parser.add_argument("--one", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        name, file = options.one
        kind = KINDS.get(name) or Kind(name, one_device)
        np.savez(file, allow_pickle=False, **work(kind))
        return 0
    headings = ["kind", "replicas", "updates", "differing", "from one device", "weights"]
    print("| " + " | ".join(headings) + " |")
    print("|---|" + "---:|" * (len(headings) - 1))
    wrong = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder, single = Path(temporary), {}
        for name in options.kinds:
            kind = KINDS[name]
            if kind.backend not in single:
                alone = Kind(kind.backend, one_device)
                single[kind.backend] = train(alone, folder, kind.backend)[0]
            cells = row(name, train(kind, folder, name), single[kind.backend])
            wrong += int(cells[3])
            print("| " + " | ".join(cells) + " |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
