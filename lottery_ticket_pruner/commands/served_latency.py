"""The served folder of a pruned model, next to that of the dense model: bytes and latency."""

import dataclasses
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras

import masked_layers as ml
from lottery_ticket_pruner.training import Arrays
from masked_layers import turns

_ROUNDS, _SECONDS = (20, 200), 3.0


@dataclasses.dataclass(frozen=True)
class Served:
    """Comparison of two served folders, the pruned one first.

    Attributes:
        nbytes: Bytes on disk.
        milliseconds: Median milliseconds of a call with one example, called in turns, or None for
            models with several inputs.
    """

    nbytes: tuple[int, int]
    milliseconds: tuple[float, float] | None


def compare(pruned: keras.Model, model: keras.Model, path: Path, inputs: Arrays) -> Served:
    """Exports a pruned model to a folder, and compares it with a folder of the dense model.

    Args:
        pruned: The pruned model.
        model: The dense model.
        path: The folder to write.
        inputs: Inputs of the model.

    Raises:
        Exception: Whatever the export raises.
    """
    with tempfile.TemporaryDirectory() as temporary:
        dense = Path(temporary, "dense")
        before = ml.export_sparse_saved_model(model, dense).disk_nbytes
        after = ml.export_sparse_saved_model(pruned, path).disk_nbytes
        arrays = keras.tree.flatten(inputs)
        times = None if len(arrays) > 1 else _milliseconds(path, dense, arrays[0][:1])
    return Served((after, before), times)


def _milliseconds(first: Path, second: Path, example: Any) -> tuple[float, float]:
    calls = {"first": _call_of(first, example), "second": _call_of(second, example)}
    times = turns.seconds_per_call(calls, rounds=_ROUNDS, seconds=_SECONDS, warm=3)
    return 1e3 * statistics.median(times["first"]), 1e3 * statistics.median(times["second"])


def _call_of(folder: Path, example: Any) -> Callable[[], None]:
    import tensorflow as tf  # As in serving, whatever the backend.

    loaded = tf.saved_model.load(str(folder))
    signature = loaded.signatures["serving_default"]
    ((name, spec),) = signature.structured_input_signature[1].items()
    value = tf.cast(example, spec.dtype)

    def call() -> None:
        assert loaded is not None  # Its resources live as long as it does.
        for output in signature(**{name: value}).values():
            output.numpy()

    return call
