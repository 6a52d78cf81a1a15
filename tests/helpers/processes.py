"""Code that runs in processes of its own, such as that of TensorFlow's strategies."""

import os
import signal
import subprocess
import sys
from pathlib import Path


def started(code, *arguments, **variables):
    """Returns a process that runs code with Keras on TensorFlow."""
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), *sys.path])
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": "tensorflow", **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def printed(processes):
    """Returns the words that each process printed, and fails if one failed."""
    try:
        said = [process.communicate(timeout=1800) for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, (_, error) in zip(processes, said, strict=True):
        assert process.returncode == 0, error
    return [out.split() for out, _ in said]


def printed_by_one(code, *arguments):
    """Returns what a process printed, which is started again if TensorFlow crashed in Keras' `fit`.

    In every call under a strategy, `fit` and `evaluate` of Keras discard an iterator over the
    devices. TensorFlow 2.21 destroys it while its background thread still reads from it, and then
    crashes within some hundred calls on a busy machine.
    """
    for _ in range(3):
        process = started(code, *arguments, PYTHONFAULTHANDLER="1")
        try:
            return printed([process])[0]
        except AssertionError as error:
            frame = "keras/src/backend/tensorflow/trainer.py"
            if process.returncode != -signal.SIGSEGV or frame not in str(error):
                raise
    raise AssertionError("TensorFlow crashed three times.")
