"""The models of the conformance table: a name, a family, and a function that makes each."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

SEED = 19


@dataclasses.dataclass(frozen=True)
class Maker:
    """One row of the table.

    Attributes:
        name: Name of the row.
        family: Rows of one family have a table of their own.
        make: Returns a built model.
        free: Length of axes of inputs that have no fixed length.
        inputs: Returns inputs for a model that has no symbolic ones.
        legacy: Whether `make` may run with `tf_keras` in the place of Keras.
    """

    name: str
    family: str
    make: Callable[[], Any]
    free: int = 8
    inputs: Callable[[], Any] | None = None
    legacy: bool = False


def inputs_of(model: Any, maker: Maker) -> Any:
    """Returns seeded inputs for two examples, in the structure that the model is called with."""
    if maker.inputs is not None:
        return maker.inputs()
    rng = np.random.default_rng(SEED)
    given = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    if isinstance(given, dict):
        return {name: _drawn(rng, name, tensor, maker.free) for name, tensor in given.items()}
    if isinstance(given, list | tuple):
        return [_drawn(rng, tensor.name, tensor, maker.free) for tensor in given]
    return _drawn(rng, given.name, given, maker.free)


def _drawn(rng: np.random.Generator, name: str, tensor: Any, free: int) -> np.ndarray:
    images = len(tensor.shape) == 4 and tensor.shape[-1] == 3
    sizes = [2, *(size or (32 if images else free) for size in tensor.shape[1:])]
    # Of `tf_keras`, the dtype is an object.
    dtype = getattr(tensor.dtype, "name", tensor.dtype)
    array: np.ndarray
    if name.endswith("mask"):
        array = np.ones(sizes)
        array[1, -1] = 0
    elif name == "position_ids":
        array = np.broadcast_to(np.arange(sizes[-1]), sizes)
    elif name == "segment_ids":
        array = rng.integers(0, 2, sizes)
    elif "int" in dtype:
        array = rng.integers(1, 30, sizes)
    else:
        array = rng.uniform(-1, 1, sizes)
    return array.astype(dtype)


def randomize(model: Any) -> Any:
    """Gives weights that are all equal, such as biases and scales, different values.

    With Keras' initial values, many models have constant outputs (scales of zero), and a bias or
    scale that is lost would not be noticed.
    """
    from masked_layers._keras import flatten  # Not with `tf_keras` in the place of Keras.

    rng = np.random.default_rng(SEED)
    for variable in model.weights:
        value = np.asarray(variable)
        if value.size < 2 or value.dtype.kind in "iub" or np.ptp(value.astype("float32")):
            continue
        spread = rng.uniform(-0.1, 0.1, value.shape)
        variable.assign((value.astype("float32") + spread).astype(value.dtype))
    for layer in flatten(model):
        if isinstance(layer, keras.layers.Normalization):
            layer.finalize_state()  # Derives what it normalizes by from its variables.
    return model


def kernels(model: Any) -> dict[int, Any]:
    """Returns the weights of two or more axes that are not called biases, by identity.

    The bias of a GRU has two rows, and those of attention have an axis of heads.
    """
    names = {
        id(w): getattr(w, "path", w.name).split("/")[-1].partition(":")[0] for w in model.weights
    }
    return {id(w): w for w in model.weights if len(w.shape) > 1 and names[id(w)] != "bias"}
