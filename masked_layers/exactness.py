"""Checks that a model computes what its masks say, and a copy what the model computes.

The layers of Keras read each weight through the attribute that a mask is over, and their configs
describe them; tests hold both for all of them. Code of others may read a weight in another way
(`layer.weights[0]`, a private attribute, a tensor taken earlier) or forget an argument in its
`get_config`. Where a model holds such code and inputs for it can be made up, this is found here.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from masked_layers import _keras, _keras_trace
from masked_layers._keras import input_specs
from masked_layers.copying import held_by
from masked_layers.inspection import WeightRef, weight_refs
from masked_layers.layers import EffectiveWeight
from masked_layers.masks import Mask, MaskedConstraint, MaskedRegularizer, raw_view
from masked_layers.notices import warn_outside
from masked_layers.paths import plain_class, walk

Layer = keras.layers.Layer

logger = logging.getLogger(__name__)

# In a call of one of these, reading a raw weight is how its mask is applied.
_THROUGH_THE_MASK = {
    EffectiveWeight.__get__.__code__,
    MaskedRegularizer.__call__.__code__,
    MaskedConstraint.__call__.__code__,
}
_SIZES = (8, 32, 64, 128)  # What unknown sizes of inputs are tried with.


def check_masks(model: keras.Model, source: keras.Model | None = None) -> None:
    """Makes sure that the masks of a model are all that its calls know of the pruned weights.

    Nothing of the model changes. Where no inputs can be made up nothing is checked.

    Args:
        model: A masked model.
        source: The model that it is a copy of, whose variables it must not read.

    Raises:
        ValueError: If a weight with a mask is read past it, a mask is compiled into a function as a
            constant, or a variable of `source` is read.
    """
    refs = {id(ref.variable): ref for ref in weight_refs(model) if ref.mask is not None}
    with _traces_forgotten(model):
        _check_masks(model, refs, source)


def _check_masks(
    model: keras.Model, refs: dict[int, WeightRef], source: keras.Model | None
) -> None:
    specs, reads = _first_reads(model, refs, source)
    if reads is None:
        return
    if reads.foreign:
        reader, path = reads.foreign
        raise ValueError(
            f"{reader} reads '{path}' of the model that is copied: a function or an object that "
            "both share holds it. Let the layer that reads it hold the layer around it as an "
            "attribute and describe it in its config, or pass `inplace=True` to change the model "
            "itself."
        )
    past = [ref for ref in refs.values() if id(ref.variable) in reads.past]
    for ref in _compiled_in(reads) or _read_past(model, specs, reads, past):
        reader = reads.past.get(id(ref.variable))
        if reader is None:
            others = sorted({plain_class(layer).__name__ for layer in _layers_of_others(model)})
            reader = f"A layer of a class that is not of Keras (one of {others})"
        raise ValueError(
            f"{reader} reads '{ref.path}' past its mask, so that pruned weights would still count: "
            "it takes it from `weights`, a private attribute or a tensor made before, or is "
            f"compiled with it as a constant. Let it read the attribute '{ref.name}' of "
            f"'{ref.layer.name}' in its `call`, outside of `jax.jit`, or leave that layer out: "
            f"`convert_to_masked(model, exclude={ref.layer.name!r})`."
        )


def check_copy(source: keras.Model, copy: keras.Model) -> None:
    """Makes sure that a copy has the outputs of its original, where inputs can be made up.

    What Keras' generators draw is the same for both. Of a model that draws in other ways, as from
    NumPy, nothing is known.

    Raises:
        ValueError: If it has others, by more than a computation repeated may differ.

    Warns:
        UserWarning: The original has other outputs at each call.
    """
    for specs in _input_specs(source):
        precise = all("16" not in layer.compute_dtype for _, layer in walk(source))
        with _traces_forgotten(source), _traces_forgotten(copy):
            before, after = _outputs(source, specs), _outputs(copy, specs)
            if before is None or after is None:
                continue
            if _close(before, after, precise):
                return
            if not _close(before, _outputs(source, specs), precise):
                _warn_of_chance(source, "whether its copy has the same ones")
                return
        others = sorted({plain_class(layer).__name__ for layer in _layers_of_others(source)})
        raise ValueError(
            f"A copy of '{source.name}' has other outputs. Either the `get_config()` of a class "
            "leaves out what its call depends on, or a tensor was made of a weight before the "
            f"weight had its value. Its classes that are not of Keras: {others}. Mend that, or "
            "pass `inplace=True` to change the model itself."
        )


def has_code_of_others(model: keras.Model) -> bool:
    """True if something in a model is neither of Keras nor of this package."""
    return any(_is_of_others(value) for value in held_by(model))


def _layers_of_others(model: keras.Model) -> list[Layer]:
    return [layer for _, layer in walk(model) if _is_of_others(layer)]


def _is_of_others(value: Any) -> bool:
    named = plain_class(value) if isinstance(value, Layer) else value
    named = named if hasattr(named, "__qualname__") else type(named)
    return (named.__module__ or "").partition(".")[0] not in ("keras", "masked_layers")


# --- What is read ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _traces_forgotten(model: keras.Model) -> Iterator[None]:
    """Discards functions compiled inside: they read temporary state that users must not run."""
    try:
        yield
    finally:
        for _, layer in walk(model):
            _keras_trace.forget_traces(layer)


@contextlib.contextmanager
def _attributes_kept(model: keras.Model) -> Iterator[None]:
    """Takes back the tensors that layers keep of a call inside, for their next one.

    Those of a symbolic call have no values.
    """
    before = [(layer, dict(vars(layer))) for _, layer in walk(model)]
    try:
        yield
    finally:
        for layer, attributes in before:
            # Past Keras' tracking, which has no part in tensors.
            for name, value in list(vars(layer).items()):
                if value is attributes.get(name, before) or not _holds_tensor(value):
                    continue
                if name in attributes:
                    vars(layer)[name] = attributes[name]
                else:
                    del vars(layer)[name]


def _holds_tensor(value: Any) -> bool:
    # On TensorFlow a variable of Keras passes for a tensor; one that is created here stays.
    return any(
        keras.ops.is_tensor(each) and not isinstance(each, keras.Variable)
        for each in keras.tree.flatten(value)
    )


class _Reads:
    """Records what one call of a model reads.

    Attributes:
        past: Who reads a weight past its mask, by the id of the variable.
        masks: Ids of the masks that are read.
        constant: Ids of those that only the first call reads.
        foreign: Who reads a variable of the model that was copied, and the path of that.
    """

    def __init__(
        self, model: keras.Model, refs: dict[int, WeightRef], source: keras.Model | None
    ) -> None:
        self.model, self.refs = model, refs
        self.owners = {
            id(variable): id(ref.mask)
            for ref in refs.values()
            for variable in _keras.own_variables(ref.mask)
        }
        variables = [] if source is None else source.variables
        self.others = {id(variable): variable for variable in variables}
        self.past: dict[int, str] = {}
        self.masks: set[int] = set()
        self.constant: set[int] = set()
        self.foreign: tuple[str, str] | None = None

    def __call__(self, variable: keras.Variable) -> None:
        key = id(variable)
        if key in self.owners:
            self.masks.add(self.owners[key])
        elif key in self.others:
            self.foreign = self.foreign or (self._reader(), variable.path)
        elif key in self.refs and key not in self.past:
            frames = _keras_trace.callers()
            if not any(frame.f_code in _THROUGH_THE_MASK for frame in frames):
                self.past[key] = self._reader()

    def _reader(self) -> str:
        for frame in _keras_trace.callers():
            layer = frame.f_locals.get("self")
            if isinstance(layer, Layer) and not isinstance(layer, Mask):
                path = next((path for path, inner in walk(self.model) if inner is layer), "")
                return f"'{path or layer.name}' ({plain_class(layer).__name__})"
        return f"'{self.model.name}'"


def _first_reads(
    model: keras.Model, refs: dict[int, WeightRef], source: keras.Model | None
) -> tuple[Any, _Reads | None]:
    """Returns the first inputs that the model takes and what it reads, (None, None) without any."""
    for specs in _input_specs(model):
        reads, again = _Reads(model, refs, source), _Reads(model, refs, source)
        try:
            with _attributes_kept(model):
                _keras_trace.watch(model, specs, reads)
            if keras.backend.backend() == "jax":
                # There, what a function reads while it is compiled is a constant of it.
                with _attributes_kept(model):
                    _keras_trace.watch(model, specs, again)
                reads.constant = reads.masks - again.masks
            return specs, reads
        except Exception as error:
            logger.info("'%s' cannot be called on made-up inputs: %s", model.name, error)
    return None, None


def _compiled_in(reads: _Reads) -> list[WeightRef]:
    return [ref for ref in reads.refs.values() if id(ref.mask) in reads.constant]


# --- What is computed -----------------------------------------------------------------------------


def _read_past(
    model: keras.Model, specs: Any, reads: _Reads, past: list[WeightRef]
) -> list[WeightRef]:
    """Returns weights of which the outputs depend where they are pruned, under random masks."""
    binary = [ref for ref in reads.refs.values() if not ref.mask.learned]
    suspects = [ref for ref in binary if ref in past or id(ref.mask) not in reads.masks]
    if keras.backend.backend() != "jax" and has_code_of_others(model):
        # There, a tensor taken earlier may be the memory of the variable itself.
        suspects = [ref for ref in binary if ref in past or not _is_derived(ref)]
    wrong = [ref for ref in past if ref.mask.learned]
    if suspects and _depends_on_pruned(model, specs, suspects):
        wrong += [ref for ref in suspects if _depends_on_pruned(model, specs, [ref])]
    return wrong


def _is_derived(ref: WeightRef) -> bool:
    """True where a layer computes a weight from its variable, before the mask."""
    with raw_view():
        return getattr(ref.layer, ref.name) is not ref.variable


def _depends_on_pruned(model: keras.Model, specs: Any, refs: list[WeightRef]) -> bool:
    rng = np.random.default_rng(0)
    masks = [ref.mask.to_numpy() for ref in refs]
    raw = [np.array(keras.ops.convert_to_numpy(ref.variable)) for ref in refs]
    try:
        for ref, mask in zip(refs, masks, strict=True):
            ref.mask.value.assign(rng.random(mask.shape) < 0.5)
        before = _outputs(model, specs)
        for ref, weight in zip(refs, raw, strict=True):
            noise = np.where(ref.mask.to_numpy(), 0, rng.standard_normal(weight.shape))
            ref.variable.assign((weight + noise).astype(weight.dtype))
        after = _outputs(model, specs)
        if before is None or after is None or _close(before, after, precise=True):
            return False
        for ref, weight in zip(refs, raw, strict=True):
            ref.variable.assign(weight)
        if _close(before, _outputs(model, specs), precise=True):
            return True
        _warn_of_chance(model, "whether something reads a weight past its mask")
        return False
    finally:
        for ref, mask, weight in zip(refs, masks, raw, strict=True):
            ref.mask.value.assign(mask)
            ref.variable.assign(weight)


def _input_specs(model: keras.Model) -> Iterator[Any]:
    """Yields symbolic inputs that a model may take, with sizes for all that is not fixed."""
    try:
        specs = input_specs(model)
    except Exception as error:  # A model may have a `get_build_config` of its own.
        logger.info("Nothing is compared: %s", error)
        return
    flat = keras.tree.flatten(specs)
    if any(spec.dtype == "string" or spec.shape is None for spec in flat):
        return
    free = any(None in spec.shape[1:] for spec in flat)
    for size in _SIZES if free else _SIZES[:1]:

        def known(spec: Any, size: int = size) -> Any:
            batch = 2 if spec.shape[0] is None else spec.shape[0]
            sizes = [size if axis is None else axis for axis in spec.shape[1:]]
            return keras.KerasTensor((batch, *sizes), spec.dtype)

        yield keras.tree.map_structure(known, specs)


def _outputs(model: keras.Model, specs: Any) -> list[np.ndarray] | None:
    """Returns the outputs of a model on made-up inputs, None if it does not take them."""
    rng = np.random.default_rng(0)
    embeddings = [layer for _, layer in walk(model) if isinstance(layer, keras.layers.Embedding)]
    tokens = min([layer.input_dim for layer in embeddings], default=2)

    def made_up(spec: Any) -> Any:
        if "int" in spec.dtype:
            values = rng.integers(min(1, tokens - 1), tokens, spec.shape)
        elif spec.dtype == "bool":
            values = np.ones(spec.shape)
        else:
            values = rng.random(spec.shape)
        return keras.ops.convert_to_tensor(values, dtype=spec.dtype)

    try:
        # In it, statistics and the states of random generators stay as they are.
        with _attributes_kept(model), keras.StatelessScope(), _keras.same_draws():
            outputs = model(keras.tree.map_structure(made_up, specs))
        return [
            keras.ops.convert_to_numpy(output).astype("float64")
            for output in keras.tree.flatten(outputs)
        ]
    except Exception as error:
        logger.info("'%s' cannot be called on made-up inputs: %s", model.name, error)
        return None


def _warn_of_chance(model: keras.Model, unknown: str) -> None:
    warn_outside(
        f"'{model.name}' has other outputs at each call on the same inputs, so that it could not "
        f"be told {unknown}. Where it draws at inference by other means than `keras.random`, that "
        "is to be expected: compare the mean of many calls before and after.",
        "masked_layers",
    )


def _close(a: list[np.ndarray], b: list[np.ndarray] | None, precise: bool) -> bool:
    if b is None or [x.shape for x in a] != [x.shape for x in b]:
        return False
    share = 1e-5 if precise else 0.05
    for x, y in zip(a, b, strict=True):
        largest = np.max(np.abs(x), initial=0.0, where=np.isfinite(x))
        if not np.allclose(x, y, rtol=0.0, atol=share * largest, equal_nan=True):
            return False
    return True
