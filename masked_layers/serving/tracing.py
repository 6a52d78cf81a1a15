"""Traces a Keras model into a TensorFlow function with new variables for its weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from masked_layers import _keras
from masked_layers.inference import inferred
from masked_layers.inspection import WeightRef, check_no_channel_left_out, lora_factor, weight_refs
from masked_layers.keras_files import reason_of
from masked_layers.masks import raw_view
from masked_layers.model_state import state_variables
from masked_layers.normalization import without_masks

if TYPE_CHECKING:
    import tensorflow as tf


@dataclass(frozen=True)
class Traced:
    """A serving function and the variables and resources that it reads.

    Attributes:
        function: `tf.function` with one concrete function, which takes the arguments of the model.
        signature: Specs of the arguments, a structure of `tf.TensorSpec`.
        prefix: Prefix of the names of the variables, different for each model.
        variables: The weights that it reads, by path; none of them is a variable of the model.
        resources: Other objects that it reads and that are saved unchanged: lookup tables, and
            variables that are not Keras variables.
    """

    function: Any
    signature: Any
    prefix: str
    variables: dict[str, tf.Variable]
    resources: list[Any]


class EffectiveValues(Mapping[str, np.ndarray]):
    """The effective values of all variables by path, without the masks, computed when read.

    Args:
        model: A model.
        finish: Function of a path and an array, whose result is taken. Default: the array.

    Raises:
        ValueError: If a mask is learned, or leaves channels out of a normalization.
    """

    def __init__(
        self, model: keras.Model, finish: Callable[[str, np.ndarray], np.ndarray] | None = None
    ) -> None:
        _keras.sync(model)
        check_no_channel_left_out(model)
        # As in `strip_masks`, LoRA's product is in the values of the weight to which it is added
        # before the mask, and one of its factors is zero.
        self._merged: dict[int, WeightRef] = {}
        self._zeroed: set[int] = set()
        for ref in weight_refs(model):
            if ref.mask is not None and ref.mask.learned:
                raise ValueError(
                    f"The mask of '{ref.path}' is learned. Call `masked_layers.harden(model)` "
                    "first and export the model that it returns."
                )
            if ref.mask is not None and (factor := lora_factor(ref)) is not None:
                self._merged[id(ref.variable)] = ref
                self._zeroed.add(id(factor))
        self._state = state_variables(model)
        self._finish = finish

    def __getitem__(self, path: str) -> np.ndarray:
        """Returns a copy of the values of a variable."""
        variable, mask = self._state[path]
        merged = self._merged.get(id(variable))
        if merged is not None:
            value = getattr(merged.layer, merged.name)
        else:
            value = variable if mask is None else mask.apply(variable)
        array = np.array(keras.ops.convert_to_numpy(value))
        if id(variable) in self._zeroed:
            array[...] = 0
        return array if self._finish is None else self._finish(path, array)

    def __iter__(self) -> Iterator[str]:
        """Returns an iterator over the paths."""
        return iter(self._state)

    def __len__(self) -> int:
        """Returns the number of variables."""
        return len(self._state)


def effective_values(model: keras.Model) -> dict[str, np.ndarray]:
    """Returns the effective values of all variables by path, without the masks themselves.

    Raises:
        ValueError: If a mask is learned, or leaves channels out of a normalization.
    """
    return dict(EffectiveValues(model))


def values_of(variable: tf.Variable) -> np.ndarray:
    """Returns the value that a variable has now, without a copy if NumPy has its type."""
    import tensorflow as tf

    try:
        return np.asarray(memoryview(tf.convert_to_tensor(variable)))
    except ValueError:  # bfloat16, for example
        return variable.numpy()


def bytes_of(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array, in C order, without a copy if they have this order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def trace(
    model: keras.Model,
    values: Mapping[str, np.ndarray],
    input_signature: Any = None,
) -> Traced:
    """Traces the inference pass of a model with TensorFlow variables that have the given values.

    The graph contains no masks, because the variables have effective values.

    Args:
        model: A built model, plain or masked.
        values: The values of `effective_values(model)`, or `EffectiveValues(model)`, of which one
            is read at a time.
        input_signature: Same as in `keras.Model.export`.

    Raises:
        ImportError: If TensorFlow, or a package for tracing into it from another backend, is
            missing.
        NotImplementedError: If the backend cannot trace into TensorFlow, or a call changes a
            variable that the model does not track.
        ValueError: If the model cannot be traced without sizes that the signature leaves out.
    """
    backend = keras.backend.backend()
    if backend not in ("tensorflow", "jax"):
        raise NotImplementedError(
            f"Keras cannot trace a model into TensorFlow under the '{backend}' backend without "
            "further packages. Save it with `masked_layers.strip_masks(model).save('model.keras')` "
            "and export that file in a process with KERAS_BACKEND=tensorflow (or jax)."
        )
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ImportError(
            "Writing a SavedModel requires TensorFlow, which is not installed. Install it in "
            f"addition to {backend}: `pip install tensorflow`."
        ) from error
    signature = _keras.export_signature(model, input_signature)
    sources = {path: variable for path, (variable, _) in state_variables(model).items()}

    # A prefix that no other model in the process has: variables with the same name are the same
    # variable in a session, and two models may be loaded into one session.
    digest = hashlib.sha256(model.name.encode())
    for path, value in values.items():
        digest.update(f"{path}{value.dtype}{value.shape}".encode())
        digest.update(bytes_of(value))
    prefix = digest.hexdigest()[:10]
    with tf.device("CPU"):
        variables = {
            path: tf.Variable(
                values[path], name=f"{prefix}/{i}", trainable=source.trainable, dtype=source.dtype
            )
            for i, (path, source) in enumerate(sources.items())
        }

    make = _tensorflow_function if backend == "tensorflow" else _jax_function
    # The inference pass does not read some variables (seeds of dropout layers, metrics), which only
    # the graph shows. The second trace leaves them out.
    function, reads = make(model, signature, sources, variables)
    _check_traceable(model, function, signature)
    used = {path for path, read in reads.items() if read.consumers()}
    if used < sources.keys():
        sources = {path: source for path, source in sources.items() if path in used}
        variables = {path: variable for path, variable in variables.items() if path in used}
        function, _ = make(model, signature, sources, variables)

    return Traced(
        function, signature, prefix, variables, _other_resources(model, function, variables)
    )


def _check_traceable(model: keras.Model, function: Any, signature: Any) -> None:
    """Traces a function, and says what helps if layers need the sizes that are not given."""
    try:
        function.get_concrete_function()
    except NotImplementedError:
        raise
    except Exception as error:
        shapes = [tuple(spec.shape) for spec in keras.tree.flatten(signature)]
        if not any(None in shape[1:] for shape in shapes):
            raise
        raise ValueError(
            f"'{model.name}' cannot be traced for inputs of the shapes {shapes}: "
            f"{reason_of(error)} If its layers need sizes that are None here, pass an "
            "`input_signature` that gives them."
        ) from error


Maker = Callable[[keras.Model, Any, dict[str, Any], dict[str, Any]], tuple[Any, dict[str, Any]]]


def _tensorflow_function(
    model: keras.Model, signature: Any, sources: dict[str, Any], variables: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    import tensorflow as tf

    reads: dict[str, Any] = {}

    def serve(*args: Any) -> Any:
        reads.update({path: tf.convert_to_tensor(v) for path, v in variables.items()})
        outputs, updates = _call(model, sources, reads, args)
        for path, value in updates.items():
            variables[path].assign(value)
        return outputs

    return tf.function(serve, input_signature=signature, autograph=False), reads


def _jax_function(
    model: keras.Model, signature: Any, sources: dict[str, Any], variables: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    import tensorflow as tf
    from jax.experimental import jax2tf

    reads: dict[str, Any] = {}
    free = iter(range(10**6))

    def polymorphic(spec: Any) -> str:
        # Keras' convention: the first free dimension is the batch, the same for all inputs.
        names = [
            str(size) if size is not None else "batch" if axis == 0 else f"d{next(free)}"
            for axis, size in enumerate(spec.shape)
        ]
        return f"({', '.join(names)})"

    convert = jax2tf.convert(
        lambda values, *args: _call(model, sources, values, args),
        polymorphic_shapes=[None, *keras.tree.map_structure(polymorphic, list(signature))],
        with_gradient=False,
    )

    def serve(*args: Any) -> Any:
        reads.update({path: tf.convert_to_tensor(v) for path, v in variables.items()})
        outputs, updates = convert(dict(reads), *args)
        for path, value in updates.items():
            variables[path].assign(tf.cast(value, variables[path].dtype))
        return outputs

    return tf.function(serve, input_signature=signature, autograph=False), reads


def _call(
    model: keras.Model, sources: dict[str, Any], values: Mapping[str, Any], args: tuple[Any, ...]
) -> tuple[Any, dict[str, Any]]:
    """Returns the outputs of a model over `values`, and the variables that the call updated."""
    mapping = [(source, values[path]) for path, source in sources.items()]
    with raw_view(), without_masks(), keras.StatelessScope(mapping) as scope:
        before = {path: scope.get_current_value(source) for path, source in sources.items()}
        outputs = inferred(model, *args)
        after = {path: scope.get_current_value(source) for path, source in sources.items()}
    known = {id(variable) for variable, _ in state_variables(model).values()}
    if scope.state_mapping.keys() - known:
        raise NotImplementedError(
            f"A call of '{model.name}' changes a variable that the model does not track, as "
            "`keras.random` does without a seed. The SavedModel would keep using its old value. "
            "Give the layer a `keras.random.SeedGenerator`, or track the variable in it."
        )
    return outputs, {path: after[path] for path in after if after[path] is not before[path]}


def _other_resources(
    model: keras.Model, function: Any, variables: Mapping[str, tf.Variable]
) -> list[Any]:
    """Returns other objects that a function reads: TensorFlow variables and lookup tables."""
    import tensorflow as tf

    concrete = function.get_concrete_function()
    own = {id(variable) for variable in variables.values()}
    others = [variable for variable in concrete.variables if id(variable) not in own]
    if len(concrete.captured_inputs) == len(concrete.variables):
        return others

    class View(tf.train.TrackableView):
        # The public view lists the objects in a checkpoint, which do not include tables.
        @classmethod
        def children(cls, obj: Any, save_type: str = "savedmodel", **kwargs: Any) -> Any:
            return super().children(obj, save_type, cache={}, **kwargs)

    resource = tf.saved_model.experimental.TrackableResource
    return others + [found for found in View(model).descendants() if isinstance(found, resource)]
