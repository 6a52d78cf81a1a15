"""The option --devices of commands."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

pytest.importorskip("tyro")

import masked_layers as ml
from lottery_ticket_pruner.commands import executors, prune, seed_jobs, sweep
from lottery_ticket_pruner.experiments import devices
from lottery_ticket_pruner.experiments.config import RunConfig

# Devices are configured before the backend starts.
COMMANDS = """
import sys

import tensorflow as tf

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from lottery_ticket_pruner import cli

for name, line in (
    ("run", "run --rounds 1 --steps 3 --controls random_mask --seeds 0"),
    ("supermask", "supermask --steps 3 --criteria large_final --sparsities 0.5 --seeds 0"),
    ("learned", "supermask --learn bernoulli --samples 2 --steps 3 --seeds 0"),
    ("instability", "instability --steps 3 --points 2 --rewind-to 1it --seeds 0"),
    ("prune", "prune lenet-300-100 --epochs 1 --batch-size 440 --sparsity 0.5"),
):
    for folder, more in (("one", []), ("two", ["--devices", "2"])):
        if status := cli.main([*line.split(), "--quiet", "--out", f"{folder}/{name}", *more]):
            sys.exit(status)
"""
# Of the results of these commands, or the text in their tables.
NOT_COMPARED = {"seconds", "criterion", "weights", "dwr", "arm", "data", "network", "strategy"}


@pytest.mark.once("tensorflow")
@pytest.mark.parametrize(
    ("named", "words"),
    [
        (("512",), "has 1 of the kind.*: (cpu|gpu):0"),
        (("gpu:7", "cpu:0"), "has 1 of the kind.*: (cpu|gpu):0"),
        (("1",), "at least two"),
        (("cpu:0", "cpu:0"), "at least two"),
    ],
)
def test_devices_that_are_not_there_are_refused(named, words):
    with pytest.raises(ValueError, match=words):
        devices.check(named, 512)


@pytest.mark.once("tensorflow")
def test_the_devices_are_those_that_keras_names():
    with pytest.raises(ValueError, match=": " + ", ".join(keras.distribution.list_devices())):
        devices.check(("512",), 512)


def test_only_tensorflow_trains_on_several(monkeypatch):
    monkeypatch.setattr(devices.keras.backend, "backend", lambda: "jax")
    with pytest.raises(ValueError, match="needs TensorFlow, not jax"):
        devices.check(("2",), 60)


@pytest.mark.once
def test_a_batch_is_divided_equally(monkeypatch):
    monkeypatch.setattr(devices, "_there", lambda: [f"cpu:{i}" for i in range(7)])
    with pytest.warns(UserWarning, match=r"4 devices \(cpu:0, cpu:1, cpu:2, cpu:3\)"):
        devices.check(("4",), 60)
    with pytest.raises(ValueError, match=r"--batch-size 60 .* multiple of 7"):
        devices.check(("7",), 60)


@pytest.mark.once
def test_jobs_are_refused_before_any_is_started(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "_there", lambda: ["cpu:0", "cpu:1"])
    with pytest.raises(ValueError, match="--jobs 1"):
        sweep.plan(sweep.SweepConfig(over=("devices=2",)))
    with pytest.raises(ValueError, match="--batch-size 61"), pytest.warns(match="2 devices"):
        sweep.plan(sweep.SweepConfig(over=("batch_size=60,61",), devices=("2",), jobs=1))
    config = RunConfig(devices=("4",), executor="local", jobs=1, out=tmp_path / "run")
    with pytest.raises(ValueError, match="this machine has 2"):
        seed_jobs.run(config)
    assert not config.folder.exists()


@pytest.mark.once
def test_jobs_on_a_cluster_look_for_devices_themselves():
    on_cluster = sweep.SweepConfig(executor="ray")
    executors.check_devices(on_cluster, ("gpu:0", "gpu:1"), 60)
    with pytest.raises(ValueError, match="--batch-size 61"):
        executors.check_devices(on_cluster, ("gpu:0", "gpu:1"), 61)


@pytest.mark.once
def test_latency_is_that_of_one_device():
    config = prune.PruneConfig(model="conv-2", latency="0.5", devices=("2",), method="channels")
    with pytest.raises(ValueError, match="leave out --devices"):
        prune.prune(config)


@pytest.mark.slow
@pytest.mark.once("tensorflow")
def test_commands_have_the_results_of_one_device(tmp_path):
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stderr
    assert "distributed over 2 devices (cpu:0, cpu:1)" in done.stderr
    for file in sorted((tmp_path / "one").rglob("*.csv")):
        name = file.relative_to(tmp_path / "one")
        one, two = (list(csv.DictReader((tmp_path / d / name).open())) for d in ("one", "two"))
        assert len(one) == len(two) > 0, name
        for ours, theirs in zip(two, one, strict=True):
            for column in theirs.keys() - NOT_COMPARED:
                assert ours[column] == theirs[column] or np.isclose(
                    float(ours[column]), float(theirs[column]), atol=5e-3
                ), (name, column)
    for name in ("run/served/1", "prune/served/1"):
        assert (tmp_path / "two" / name / "saved_model.pb").is_file()
    one, two = (ml.load_ticket(tmp_path / d / "run/ticket.safetensors") for d in ("one", "two"))
    for ours, theirs in zip(two.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
