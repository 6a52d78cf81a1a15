"""The option --devices of commands."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

pytest.importorskip("tyro")

from lottery_ticket_pruner.commands import sweep
from lottery_ticket_pruner.experiments import devices

# Devices are configured before the backend starts.
RUN = """
import os
import sys

if os.environ["KERAS_BACKEND"] == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    two = [tf.config.LogicalDeviceConfiguration()] * 2
    tf.config.set_logical_device_configuration(cpu, two)
from lottery_ticket_pruner import cli

line = "run --rounds 1 --steps 6 --seeds 0 --controls random_mask --quiet --out"
for folder, more in (("one", []), ("two", ["--devices", "2"])):
    if status := cli.main([*line.split(), folder, *more]):
        sys.exit(status)
"""


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
    if keras.backend.backend() == "torch":
        words = "needs TensorFlow or JAX"
    with pytest.raises(ValueError, match=words), devices.distributed(named):
        raise AssertionError("distributed")


def test_without_the_option_nothing_is_distributed():
    with devices.distributed(()) as count:
        assert count == 1
        assert keras.distribution.distribution() is None


def test_a_batch_is_divided_equally():
    devices.check_batch_size(60, 4)
    with pytest.raises(ValueError, match=r"--batch-size 60 .* multiple of 7"):
        devices.check_batch_size(60, 7)


def test_runs_of_a_sweep_do_not_share_devices():
    with pytest.raises(ValueError, match="--jobs 1"):
        sweep.plan(sweep.SweepConfig(over=("rate=0.2,0.4",), devices=("2",)))


@pytest.mark.slow
@pytest.mark.once("tensorflow", "jax")
def test_a_distributed_run_has_the_results_of_one_device(tmp_path):
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": os.pathsep.join([str(root), *sys.path]),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    assert "distributed over 2 devices (cpu:0, cpu:1)" in done.stderr
    one, two = (
        list(csv.DictReader((tmp_path / name / "results.csv").open())) for name in ("one", "two")
    )
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        for name in ("sparsity", "test_accuracy", "validation_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-3), name
