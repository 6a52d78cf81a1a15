"""The served folder of a pruned model, next to that of the dense model: bytes and latency."""

import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

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
        milliseconds: Median milliseconds of a call with one example, called in turns, or None if
            they were not measured, as for models with several inputs.
    """

    nbytes: tuple[int, int]
    milliseconds: tuple[float, float] | None


class DenseFolder:
    """The served folder of a dense model, which lasts as long as the `with` block.

    Args:
        model: The dense model.
    """

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self._temporary = tempfile.TemporaryDirectory()
        self._path = Path(self._temporary.name, "dense")
        self._nbytes: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    def seconds_to_compare(self) -> float:
        """Exports the model, and returns how long `compare` will probably take then.

        If the export fails, `compare` fails as well, and takes no time.
        """
        started = time.perf_counter()
        try:
            self._export()
        except Exception:  # Whatever it is, `compare` raises it again.
            return 0.0
        # The other export, two folders loaded, and the calls.
        return 2 * (time.perf_counter() - started) + _SECONDS

    def compare(self, pruned: keras.Model, path: Path) -> Served:
        """Exports a pruned model to a folder, and compares it with that of the dense model.

        Args:
            pruned: The pruned model.
            path: The folder to write.

        Raises:
            Exception: Whatever an export raises.
        """
        before = self._export()
        after = ml.export_sparse_saved_model(pruned, path).disk_nbytes
        return Served((after, before), None)

    def timed(self, served: Served, path: Path, inputs: Arrays) -> Served:
        """Adds the time of calls to a comparison, unless the model has several inputs.

        Args:
            served: The comparison.
            path: The folder of the pruned model.
            inputs: Inputs of the model.

        Raises:
            Exception: Whatever TensorFlow raises.
        """
        arrays = keras.tree.flatten(inputs)
        if len(arrays) > 1:
            return served
        times = _milliseconds(path, self._path, arrays[0][:1])
        return dataclasses.replace(served, milliseconds=times)

    def _export(self) -> int:
        if self._nbytes is None:
            self._nbytes = ml.export_sparse_saved_model(self._model, self._path).disk_nbytes
        return self._nbytes


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
