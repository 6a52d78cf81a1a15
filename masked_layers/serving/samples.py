"""Sample inputs, given or random, for comparing a model with what was exported from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import ml_dtypes  # Makes NumPy know the names of more dtypes.  # noqa: F401
import numpy as np

from masked_layers.inference import inferred


def samples_of(model: keras.Model, signature: Sequence[Any], given: object = None) -> list[Any]:
    """Returns the positional arguments for a call of a model, arrays of the signature's dtypes.

    Args:
        model: A Keras model.
        signature: Arguments of the model, as structures of `tf.TensorSpec` or `keras.InputSpec`.
        given: Inputs in the forms that `predict` accepts: in the structure of the model's inputs,
            where lists and tuples are equivalent; one array for a list of one input; a dict by
            input name; or a list in the order of an alphabetical dict. For a model with several
            arguments, a list of these. Default: seeded random numbers.

    Raises:
        ValueError: If `given` does not fit the signature.
    """
    if given is None:
        return _drawn(model, signature)
    # The single argument of a model is passed to `predict` directly, not in a list.
    structure = signature[0] if len(signature) == 1 else list(signature)
    try:
        names = [tensor.name for tensor in getattr(model, "inputs", None) or ()]
        leaves = _leaves(structure, _by_position(structure, given, names))
        specs = keras.tree.flatten(structure)
        arrays = [_array(*pair) for pair in zip(specs, leaves, strict=True)]
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            f"`sample_inputs` does not fit the model's inputs {list(signature)}: {error}"
        ) from error
    return keras.tree.pack_sequence_as(list(signature), arrays)


def outputs_of(
    model: keras.Model, arguments: Sequence[Any], *, given: bool
) -> tuple[list[np.ndarray], int]:
    """Returns the outputs of a model, flat, and the number of variables that the call changes.

    The variables keep their values.

    Args:
        model: A Keras model.
        arguments: Its positional arguments, as `samples_of` returns them.
        given: Whether the user chose them, for the message.

    Raises:
        ValueError: If the model cannot be called on them.
    """
    try:
        with keras.StatelessScope() as scope:
            outputs = keras.tree.flatten(inferred(model, *arguments))
    except Exception as error:  # Layers may raise any error.
        kind = "the given" if given else "random"
        raise ValueError(
            f"The model cannot be called on {kind} `sample_inputs`. Pass those that it accepts. "
            f"{error}"
        ) from error
    arrays = [np.asarray(keras.ops.convert_to_numpy(output)) for output in outputs]
    return arrays, len(scope.state_mapping)


def _drawn(model: keras.Model, signature: Sequence[Any]) -> list[Any]:
    rng = np.random.default_rng(0)
    # Keras' signatures have a free batch size even if the model does not, as with stateful layers.
    shapes = [x.shape for x in getattr(model, "inputs", None) or ()]
    batch = next((shape[0] for shape in shapes if shape and shape[0]), 2)

    def random(spec: Any) -> np.ndarray:
        # Long enough for windows that slide over images or time.
        free = 96 if len(spec.shape) == 4 else 8
        shape = [
            size if size is not None else batch if axis == 0 else free
            for axis, size in enumerate(spec.shape)
        ]
        if _dtype(spec) == "string":
            return np.full(shape, "", object)
        dtype = np.dtype(_dtype(spec))
        drawn = rng.integers(0, 2, shape) if dtype.kind in "biu" else rng.standard_normal(shape)
        return drawn.astype(dtype)

    return keras.tree.map_structure(random, list(signature))


def _dtype(spec: Any) -> str:
    return getattr(spec.dtype, "name", spec.dtype)


def _by_position(structure: object, given: object, names: Sequence[str]) -> Any:
    """Converts inputs by name to a list if the model's own inputs are not in a dict."""
    if not isinstance(given, Mapping) or isinstance(structure, Mapping):
        return given
    if set(given) != set(names):
        raise ValueError(f"expected the names {list(names)}, received {list(given)}")
    values = [given[name] for name in names]
    return values if isinstance(structure, list | tuple) else values[0]


def _leaves(structure: object, given: object) -> list[Any]:
    """Returns the parts of `given` in the order of `keras.tree.flatten(structure)`."""
    if isinstance(structure, Mapping):
        keys = sorted(structure)
        if isinstance(given, list | tuple) and keys == list(structure):
            given = dict(zip(keys, given, strict=True))
        if not isinstance(given, Mapping) or set(given) != set(keys):
            found = list(given) if isinstance(given, Mapping) else _described(given)
            raise ValueError(f"expected a dict of {keys}, received {found}")
        return [leaf for key in keys for leaf in _leaves(structure[key], given[key])]
    if isinstance(structure, list | tuple):
        if len(structure) == 1 and not isinstance(given, list | tuple):
            given = [given]
        if not isinstance(given, list | tuple) or len(given) != len(structure):
            raise ValueError(f"expected a list of {len(structure)}, received {_described(given)}")
        pairs = zip(structure, given, strict=True)
        return [leaf for pair in pairs for leaf in _leaves(*pair)]
    return [given]


def _array(spec: Any, value: Any) -> np.ndarray:
    def convert(value: object) -> np.ndarray:
        try:
            array = np.asarray(value)
            if _dtype(spec) == "string":
                return array.astype(object)
            if array.dtype.kind in "OSU":
                raise TypeError("not numbers")
            return array.astype(_dtype(spec))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{_described(value)} for {spec}: {error}") from error

    single = isinstance(value, list | tuple) and len(value) == 1
    if single and np.ndim(value[0]) == len(spec.shape):
        value = value[0]  # A list with the only input of a model.
    array = convert(value)
    # Keras does this for functional models.
    if array.ndim == len(spec.shape) - 1 and spec.shape[-1] == 1:
        array = array[..., None]
    elif array.ndim == len(spec.shape) + 1 and array.shape[-1] == 1:
        array = array[..., 0]
    fits = array.ndim == len(spec.shape) and all(
        size in (None, found) for size, found in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.shape[:1] == (0,):
        raise ValueError(f"shape {array.shape} for {spec}, with at least one row")
    return array


def _described(value: object) -> str:
    if isinstance(value, Mapping):
        return f"a dict of {list(value)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__} of shape {getattr(value, 'shape', ())}"
