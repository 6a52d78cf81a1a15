"""Checks that no code reads weights without their masks, and that copies have the same outputs.

Keras' layers read each weight through the attribute that its mask replaces, and their configs
describe them completely; tests verify both for all of them. Custom code may read a weight in
another way (`layer.weights[0]`, a private attribute, a tensor taken earlier) or leave an argument
out of its `get_config`. If a model contains custom code and inputs for it can be generated, this
module detects such faults in what the model does in inference.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras, _keras_trace
from masked_layers._keras import input_specs
from masked_layers.copying import held_by
from masked_layers.effective import EffectiveWeight
from masked_layers.inference import inferred
from masked_layers.inspection import MaskedRef, weight_refs
from masked_layers.masks import Mask, MaskedConstraint, MaskedRegularizer, raw_view
from masked_layers.notices import warn_outside
from masked_layers.paths import plain_class, walk

Layer: TypeAlias = keras.layers.Layer

logger = logging.getLogger(__name__)

# Inside these functions a raw weight is read to apply its mask.
_THROUGH_THE_MASK = {
    EffectiveWeight.__get__.__code__,
    MaskedRegularizer.__call__.__code__,
    MaskedConstraint.__call__.__code__,
}
_SIZES = (8, 32, 64, 128)  # Tried for unknown input sizes.


def check_masks(model: keras.Model, source: keras.Model | None = None) -> None:
    """Checks that the outputs of a model do not depend on the raw values of pruned weights.

    The model is not changed. If no inputs can be generated, nothing is checked.

    Args:
        model: A masked model.
        source: The original if `model` is a copy, which must not read the original's variables.

    Raises:
        ValueError: If a masked weight is read without its mask, a mask is compiled into a function
            as a constant, or a variable of `source` is read.
    """
    refs = {id(ref.variable): ref for ref in weight_refs(model) if isinstance(ref, MaskedRef)}
    with _traces_forgotten(model):
        _check_masks(model, refs, source)


def _check_masks(
    model: keras.Model, refs: dict[int, MaskedRef], source: keras.Model | None
) -> None:
    specs, reads = _first_reads(model, refs, source)
    if reads is None:
        return
    if reads.foreign:
        reader, path = reads.foreign
        raise ValueError(
            f"{reader} reads '{path}' of the original model through a function or object that "
            "the copy shares with it. Store the layer that has this weight as an attribute of the "
            "layer that reads it and describe it in the config, or pass `inplace=True` to change "
            "the model itself."
        )
    past = [ref for ref in refs.values() if id(ref.variable) in reads.past]
    for ref in _compiled_in(reads) or _read_past(model, specs, reads, past):
        known = reads.past.get(id(ref.variable))
        if known is None:
            others = sorted({plain_class(layer).__name__ for layer in _layers_of_others(model)})
            known = f"A custom layer (one of {others})"
        raise ValueError(
            f"{known} reads '{ref.path}' past its mask, so pruned weights would still have an "
            "effect. It reads the weight from `weights`, a private attribute or a tensor made "
            "earlier, or is compiled with it as a constant. Read the attribute "
            f"'{ref.name}' of '{ref.layer.name}' in `call`, outside of `jax.jit`, or leave that "
            f"layer out: `convert_to_masked(model, exclude={ref.layer.name!r})`."
        )


def check_copy(source: keras.Model, copy: keras.Model) -> None:
    """Checks that a copy has the same outputs as its original, if inputs can be generated.

    Random numbers of Keras' generators are the same for both. A model with random numbers from
    another source, such as NumPy, cannot be compared.

    Raises:
        ValueError: If the outputs differ by more than those of a repeated computation may.

    Warns:
        UserWarning: If the outputs of the original differ at each call.
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
                _warn_of_chance(source, "whether its copy has the same outputs")
                return
        others = sorted({plain_class(layer).__name__ for layer in _layers_of_others(source)})
        raise ValueError(
            f"A copy of '{source.name}' has other outputs. Either the `get_config()` of a class "
            "leaves out something that its call depends on, or a tensor was computed from a weight "
            f"before the weight had its value. Custom classes of the model: {others}. Correct "
            "this, or pass `inplace=True` to change the model itself."
        )


def has_code_of_others(model: keras.Model) -> bool:
    """Returns whether a model contains objects from outside Keras and this package."""
    return any(_is_of_others(value) for value in held_by(model))


def _layers_of_others(model: keras.Model) -> list[Layer]:
    return [layer for _, layer in walk(model) if _is_of_others(layer)]


def _is_of_others(value: object) -> bool:
    named = plain_class(value) if isinstance(value, keras.layers.Layer) else value
    named = named if hasattr(named, "__qualname__") else type(named)
    return (named.__module__ or "").partition(".")[0] not in ("keras", "masked_layers")


# --- What is read ---------------------------------------------------------------------------------


@contextlib.contextmanager
def _traces_forgotten(model: keras.Model) -> Iterator[None]:
    """Discards functions that are compiled in the scope, since they refer to temporary state."""
    try:
        yield
    finally:
        for _, layer in walk(model):
            _keras_trace.forget_traces(layer)


@contextlib.contextmanager
def _attributes_kept(model: keras.Model) -> Iterator[None]:
    """Restores attributes in which layers cache tensors during a call in the scope.

    The tensors of a symbolic call have no values and must not be used by a later call.
    """
    before = [(layer, dict(vars(layer))) for _, layer in walk(model)]
    try:
        yield
    finally:
        for layer, attributes in before:
            # Bypasses Keras' tracking, which does not concern tensors.
            for name, value in list(vars(layer).items()):
                if value is attributes.get(name, before) or not _holds_tensor(value):
                    continue
                if name in attributes:
                    vars(layer)[name] = attributes[name]
                else:
                    del vars(layer)[name]


def _holds_tensor(value: object) -> bool:
    # On TensorFlow a Keras variable counts as a tensor; variables created in the call are kept.
    return any(
        keras.ops.is_tensor(each) and not isinstance(each, keras.Variable)
        for each in keras.tree.flatten(value)
    )


class _Reads:
    """Records which weights and masks one call of a model reads.

    Attributes:
        past: Name of the layer that reads a weight past its mask, by the id of the variable.
        masks: Ids of the masks that are read.
        constant: Ids of the masks that only the first call reads.
        foreign: Name of the layer that reads a variable of the original model, and the path of the
            variable.
    """

    def __init__(
        self, model: keras.Model, refs: dict[int, MaskedRef], source: keras.Model | None
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
            if isinstance(layer, keras.layers.Layer) and not isinstance(layer, Mask):
                path = next((path for path, inner in walk(self.model) if inner is layer), "")
                return f"'{path or layer.name}' ({plain_class(layer).__name__})"
        return f"'{self.model.name}'"


def _first_reads(
    model: keras.Model, refs: dict[int, MaskedRef], source: keras.Model | None
) -> tuple[Any, _Reads | None]:
    """Returns the first input specs that the model accepts and its reads, or (None, None)."""
    call = functools.partial(inferred, model)
    for specs in _input_specs(model):
        reads, again = _Reads(model, refs, source), _Reads(model, refs, source)
        try:
            with _attributes_kept(model):
                _keras_trace.watch(call, specs, reads)
            if keras.backend.backend() == "jax":
                # Values that a function reads while JAX compiles it become constants.
                with _attributes_kept(model):
                    _keras_trace.watch(call, specs, again)
                reads.constant = reads.masks - again.masks
            return specs, reads
        except Exception as error:
            logger.info("'%s' cannot be called on generated inputs: %s", model.name, error)
    return None, None


def _compiled_in(reads: _Reads) -> list[MaskedRef]:
    return [ref for ref in reads.refs.values() if id(ref.mask) in reads.constant]


# --- What is computed -----------------------------------------------------------------------------


def _read_past(
    model: keras.Model, specs: Any, reads: _Reads, past: list[MaskedRef]
) -> list[MaskedRef]:
    """Returns weights whose pruned raw values change the outputs, under random masks."""
    binary = [ref for ref in reads.refs.values() if not ref.mask.learned]
    suspects = [ref for ref in binary if ref in past or id(ref.mask) not in reads.masks]
    if keras.backend.backend() != "jax" and has_code_of_others(model):
        # On these backends, a tensor taken earlier may share the memory of the variable.
        suspects = [ref for ref in binary if ref in past or not _is_derived(ref)]
    wrong = [ref for ref in past if ref.mask.learned]
    if suspects and _depends_on_pruned(model, specs, suspects):
        wrong += [ref for ref in suspects if _depends_on_pruned(model, specs, [ref])]
    return wrong


def _is_derived(ref: MaskedRef) -> bool:
    """Returns whether a layer computes a weight from its variable before the mask is applied."""
    with raw_view():
        return getattr(ref.layer, ref.name) is not ref.variable


def _depends_on_pruned(model: keras.Model, specs: Any, refs: list[MaskedRef]) -> bool:
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
    """Yields symbolic inputs that a model may accept, with values for all unknown sizes."""
    try:
        specs = input_specs(model)
    except Exception as error:  # A model may have a custom `get_build_config`.
        logger.info("Outputs are not compared: %s", error)
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
    """Returns the outputs of a model on generated inputs, or None if it does not accept them."""
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
        # This scope does not change statistics and the states of random generators.
        with _attributes_kept(model), keras.StatelessScope(), _keras.same_draws():
            outputs = inferred(model, keras.tree.map_structure(made_up, specs))
        return [
            keras.ops.convert_to_numpy(output).astype("float64")
            for output in keras.tree.flatten(outputs)
        ]
    except Exception as error:
        logger.info("'%s' cannot be called on generated inputs: %s", model.name, error)
        return None


def _warn_of_chance(model: keras.Model, unknown: str) -> None:
    warn_outside(
        f"'{model.name}' has different outputs at each call on the same inputs, so it could not "
        f"be checked {unknown}. This is expected if inference uses random numbers that are not "
        "from `keras.random`: compare the means of many calls before and after.",
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
