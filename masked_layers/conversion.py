"""Converts plain Keras models to masked ones and back."""

from __future__ import annotations

import contextlib
import difflib
import logging
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import keras
import numpy as np

from masked_layers import _keras, compiled, learned, quantization, randomness, workers
from masked_layers.copying import copy_model, renew_optimizer
from masked_layers.exactness import check_copy, check_masks, has_code_of_others
from masked_layers.inspection import (
    MaskedRef,
    channel_refs,
    check_no_channel_left_out,
    get_masks,
    lora_factor,
    masked_refs,
    refs_with_masks,
    weight_refs,
)
from masked_layers.layers import (
    MASKED_CLASSES,
    MaskedLayer,
    make_binary,
    mask_weights,
    mask_when_built,
    undone_on_error,
    unmask,
)
from masked_layers.learned import LearnedMask
from masked_layers.maskable import (
    NORMALIZATIONS,
    mask_of,
    maskable,
    own_weights,
    raw_variable,
    weights_inside,
    why_quantized,
)
from masked_layers.masks import Mask, raw_view
from masked_layers.paths import check_walk, plain_class, resolve, walk
from masked_layers.text_tables import shortened

Layer: TypeAlias = keras.layers.Layer
Filter = str | Iterable[str] | Callable[[Layer], bool]

# Maximum number of layer names in a message, since models can have a thousand layers.
_NAMED = 20

logger = logging.getLogger(__name__)


def convert_to_masked(
    model: keras.Model,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    mask_bias: bool = False,
    mask_normalization: bool = False,
    mask: learned.Identifier = "binary",
    quantize: str | None = None,
    inplace: bool = False,
) -> keras.Model:
    """Returns a copy of a model with masks over its weights and the same outputs, bit for bit.

    New masks are all ones, and existing ones are kept. Weights, names, trainable flags, dtype
    policies, compilation and the state of the optimizer are copied, so that the training of a
    partly trained model can continue. Layers that cannot be masked are not changed;
    `sparsity_report(model)` lists them.

    If the model contains custom classes or functions, it is called on generated inputs to check
    that the outputs are the same and that no code reads a weight without its mask, both in
    inference. These checks are skipped if the inputs are strings or unknown, as for a subclassed
    model with several arguments. Methods of its layers under `tf.function` are compiled again, with
    the masks.

    Args:
        model: A sequential, functional or subclassed model, built or not, compiled or not.
        include: Layers to mask: a regular expression that is searched for in their names, a list of
            regular expressions, or a function of a layer, as for `Model.quantize(filters=...)`. A
            layer that contains other layers stands for all of them. Default: all layers.
        exclude: Layers not to mask, in the same forms. It takes precedence over `include`.
        mask_bias: Whether biases are masked too.
        mask_normalization: Whether normalization over channels gets masks that leave channels out:
            `LayerNormalization` and `RMSNormalization` of one axis, and `GroupNormalization` of one
            group. `structure="channels"` can then prune the channels that they normalize. Mean and
            variance are those of the kept channels. These masks are not counted as weights, but
            `get_masks`, `set_masks` and files include them.
        mask: Kind of the masks. `"binary"`, or `"bernoulli"` or `"edge_popup"` for learned masks;
            a mask that is not built, as a prototype, such as `EdgePopupMask(sparsity=0.7, seed=1)`;
            the config of a mask; or a function that returns one. With learned masks, scores are
            trained in place of the weights of the masked layers, layers without masks, such as
            normalization, are trained as before, and the state of the optimizer is reset.
        quantize: `"int8"` or `"int4"` for quantization-aware training, also of a model that already
            has masks: outputs are then not the same. Every masked kernel with two or more axes is
            rounded in the forward pass to codes from -127 to 127 (-7 to 7) times a scale for each
            index on its last axis (the output channel of most layers), the largest kept magnitude
            divided by 127 (7). The raw weights stay floats, and gradients pass straight through to
            them. `strip_masks` and exports have the rounded values, and
            `export_sparse_saved_model(values="int8")` stores these codes. Activations, biases, and
            the values of frozen pruned weights are not rounded. Default: None, which leaves masks
            that already round as they are.
        inplace: Whether to change `model` itself and return it. Needed for subclassed models
            without a `get_config`.

    Returns:
        The masked model.

    Raises:
        TypeError: If `model` is not a Keras model, or a filter has another type than listed above.
        ValueError: If the model has nothing to mask, cannot be copied, has layers that no path
            leads to, or is not built and has a layer that may create maskable layers when it is
            built. If `mask` is not a mask, cannot be used for a weight, or is learned and the model
            is already masked, its normalization is to be masked, or weights are to be quantized. If
            `quantize` has another value. If code of the model reads a weight without its mask, or a
            copy has other outputs. `model` is unchanged after an error.

    Warns:
        UserWarning: If a pattern or function of `include` or `exclude` matches no layer.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    _keras.check_strategy(model)
    check_walk(model)
    prototype = None if mask == "binary" else learned.get(mask)
    if prototype is not None and any(ref.mask is not None for ref in weight_refs(model)):
        raise ValueError(
            f"'{model.name}' already has masks, which would be kept. Call `strip_masks(model)` "
            f"first and convert the model that it returns. Received: mask={mask!r}"
        )
    quantization.check(quantize)
    if mask_normalization:
        _check_binary(model, prototype, "`mask_normalization=True`", "channels are pruned")
    if quantize is not None:
        _check_binary(model, prototype, "`quantize`", "they select the weights that scales are for")
    selected = _select(model, include, exclude, mask_bias, mask_normalization)
    source, model = model, model if inplace else copy_model(model)
    weights = [path for path, unbuilt in selected if not unbuilt]
    with undone_on_error(model), _quantized_as_before_on_error(model):
        mask_weights(model, weights, mask_bias=mask_bias, mask=prototype)
        if quantize is not None:
            _quantize(model, weights, quantize)
        for path, unbuilt in selected:
            if unbuilt:
                layer = resolve(model, f"{path}/")[-1][1]
                later = prototype if quantize is None else _quantizing(prototype, quantize)
                mask_when_built(layer, mask_bias=mask_bias, mask=later)
        traces = compiled.forget_functions(model, around=inplace)
        if inplace:
            check_masks(model)
        elif has_code_of_others(model):
            check_masks(model, source)
            if prototype is None and quantize is None:
                check_copy(source, model)
        if prototype is not None and prototype.learned:
            renew_optimizer(model)
        for variable in model.variables[:1]:
            workers.check_agreement(variable, model.weights, "weights")
    if inplace:
        compiled.warn_of_traces(model, _masked_variables(model), traces)
    logger.info("Masked %d weights of '%s'.", len(selected), model.name)
    return model


@contextlib.contextmanager
def _quantized_as_before_on_error(model: keras.Model) -> Iterator[None]:
    before = {ref.mask: ref.mask.quantization for ref in weight_refs(model) if ref.mask is not None}
    try:
        yield
    except BaseException:
        for mask, kind in before.items():
            mask.quantization = kind
        raise


def _quantizing(prototype: Mask | None, kind: str) -> Mask:
    prototype = prototype or Mask()
    return type(prototype).from_config({**prototype.get_config(), "quantization": kind})


def _quantize(model: keras.Model, paths: Iterable[str], kind: str) -> None:
    cache: dict[int, Any] = {}
    for path in paths:
        name, layer = resolve(model, path, cache)[-1]
        mask = mask_of(layer, name)
        if mask is None:
            layer._masking.mask = _quantizing(layer._masking.mask, kind)  # For when it is built.
        elif name in own_weights(layer):  # Not biases, or the channels of a normalization.
            mask.quantization = kind


def _check_binary(model: keras.Model, prototype: Any, argument: str, why: str) -> None:
    refs = weight_refs(model)
    found = [prototype, *(ref.mask for ref in refs)]
    if known := [mask for mask in found if mask is not None and mask.learned]:
        raise ValueError(
            f"{argument} needs binary masks, as {why}. Call "
            f"`masked_layers.harden(model)` first. Received: {known[0]!r}"
        )


def strip_masks(model: keras.Model, *, inplace: bool = False) -> keras.Model:
    """Returns a plain copy of a masked model: no masks, pruned weights exactly 0, same outputs.

    Frozen pruned weights (`Mask.freeze`) get the values at which they are frozen.

    The result consists of Keras layers and the user's own layers. It can be loaded without this
    library, and quantized and exported like any other model.

    Args:
        model: A masked model.
        inplace: Whether to change `model` itself and return it.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no masked weight, has learned masks, or cannot be copied. If a
            masked layer has no plain class or computes its weight from the variable. If a
            normalization leaves channels out, which the plain layer cannot: `shrink` removes them.
            If custom code reads a weight without its mask. `model` is unchanged after an error.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    _keras.sync(model)
    check_no_channel_left_out(model)
    return _stripped(model, inplace)


def without_masks(model: keras.Model) -> keras.Model:
    """Returns what `strip_masks` does, or the model itself if it is plain."""
    masked = any(ref.mask is not None for ref in weight_refs(model)) or channel_refs(model)
    return strip_masks(model) if masked else model


def strip_weight_masks(model: keras.Model) -> keras.Model:
    """Returns what `strip_masks` does, on which normalizations still leave channels out.

    Their scale and shift are 0 for these channels.
    """
    return _stripped(model, inplace=False)


def _stripped(model: keras.Model, inplace: bool) -> keras.Model:
    _check_strippable(model)
    _keras.sync(model)
    others = has_code_of_others(model)
    if others:
        check_masks(model)
    source, model = model, model if inplace else copy_model(model)
    refs = [ref for ref in weight_refs(model) if isinstance(ref, MaskedRef)]
    for ref in refs:
        _fold(ref)
    leaving = [ref for ref in channel_refs(model) if not ref.mask.to_numpy().all()]
    for ref in leaving:
        _zero_left_out(ref)
    unmask(model, besides=[ref.layer for ref in leaving])
    traces = compiled.forget_functions(model, around=inplace)
    if inplace:
        compiled.warn_of_traces(model, [ref.variable for ref in refs], traces)
    if others and not inplace:
        check_masks(model, source)
        check_copy(source, model)
    return model


def harden(model: keras.Model, *, seed: int | None = None, inplace: bool = False) -> keras.Model:
    """Returns a copy of a model with binary masks in place of learned ones and trainable weights.

    The result is a masked model like any other, for reports, `update_masks`, `strip_masks` and
    exporters. Its outputs equal those of `model` in deterministic evaluation or, with a seed,
    those of one sample.

    Args:
        model: A model with learned masks.
        seed: Seed for sampling those masks that training samples. Default: None, the deterministic
            masks that `get_masks` returns.
        inplace: Whether to change `model` itself and return it.

    Raises:
        TypeError: If `model` is not a Keras model.
        ValueError: If the model has no learned mask or cannot be copied, or was created under a
            `tf.distribute` strategy that is not in scope.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    _keras.check_strategy(model, "harden")
    masks = get_masks(model) if seed is None else sample_masks(model, seed)
    if not any(ref.mask.learned for ref in masked_refs(model)):
        raise ValueError(
            f"'{model.name}' has no learned mask. Convert a plain model with "
            "`convert_to_masked(model, mask=...)` and train it first."
        )
    if not inplace:
        model = copy_model(model)
    renew_optimizer(model)
    make_binary(model, {id(ref.variable): masks[ref.path] for ref in masked_refs(model)})
    traces = compiled.forget_functions(model, around=inplace)
    if inplace:
        compiled.warn_of_traces(model, _masked_variables(model), traces)
    return model


def _masked_variables(model: keras.Model) -> list[keras.Variable]:
    return [ref.variable for ref in weight_refs(model) if ref.mask is not None]


def sample_masks(model: keras.Model, seed: int) -> dict[str, np.ndarray]:
    """Returns one sample of every learned mask, together with the binary masks.

    Args:
        model: A masked model.
        seed: Seed. A sample depends only on the scores, the seed and the path of the weight.

    Returns:
        A dict from paths to bool arrays, True where a weight is kept.

    Raises:
        ValueError: If the model has no masked weight.
    """
    _keras.sync(model)
    masks = {}
    for ref in masked_refs(model):
        rng = randomness.stream("sampled masks", seed, ref.path)
        mask = ref.mask
        masks[ref.path] = mask.sample(rng) if isinstance(mask, LearnedMask) else mask.to_numpy()
    return masks


def _check_strippable(model: keras.Model) -> None:
    for ref in refs_with_masks(model):
        if ref.mask.learned:
            raise ValueError(
                f"'{ref.path}' cannot be stripped: its mask is learned. Call "
                "`masked_layers.harden(model)` first and strip the model that it returns."
            )
        if issubclass(plain_class(ref.layer), MaskedLayer):
            raise ValueError(
                f"'{ref.path}' cannot be stripped: {type(ref.layer).__name__} derives from a "
                "masked layer and therefore has no plain class. Derive it from the Keras layer "
                "and mask it with `convert_to_masked`."
            )
        with raw_view():
            derived = getattr(ref.layer, ref.name) is not ref.variable
        if derived and lora_factor(ref) is None:
            raise ValueError(
                f"'{ref.path}' cannot be stripped: {plain_class(ref.layer).__name__} computes "
                f"'{ref.name}' from its variable, and zeros in the variable may not give zeros in "
                "the weight. Serve the masked model, or leave the layer out: "
                "`convert_to_masked(model, exclude=...)`."
            )


def _fold(ref: MaskedRef) -> None:
    """Writes the effective weight, including LoRA's addition, into the variable."""
    factor = lora_factor(ref)
    weight = ref.mask.apply(ref.variable) if factor is None else getattr(ref.layer, ref.name)
    ref.variable.assign(np.array(keras.ops.convert_to_numpy(weight)))
    if factor is not None:
        factor.assign(np.zeros(factor.shape))


def _zero_left_out(ref: MaskedRef) -> None:
    """Gives the channels that a normalization leaves out a scale and a shift of 0."""
    for variable in (ref.variable, raw_variable(ref.layer, "beta")):
        if variable is not None:
            value = keras.ops.convert_to_numpy(variable)
            variable.assign(np.where(ref.mask.to_numpy(), value, np.zeros((), value.dtype)))


# --- What to mask ---------------------------------------------------------------------------------


def _select(
    model: keras.Model,
    include: Filter | None,
    exclude: Filter | None,
    mask_bias: bool,
    mask_normalization: bool,
) -> list[tuple[str, bool]]:
    """Returns (path, False) of each weight to mask and (path, True) of layers masked when built."""
    include, exclude = (
        list(value) if isinstance(value, Iterable) and not isinstance(value, str) else value
        for value in (include, exclude)
    )
    included = (lambda layer: True) if include is None else _predicate("include", include)
    excluded = (lambda layer: False) if exclude is None else _predicate("exclude", exclude)

    def chosen(chain: list[Layer]) -> bool:
        return any(map(included, chain)) and not any(map(excluded, chain))

    cache: dict[int, Any] = {}
    selected = []
    holders: list[Layer] = []  # Layers that are maskable or contain something maskable.
    for path, *_ in weights_inside(model, biases=mask_bias, channels=mask_normalization):
        chain = [layer for _, layer in resolve(model, path, cache)]
        holders += chain[1:] or chain
        if chosen(chain[1:] or chain):
            selected.append((path, False))
    for path, layer in walk(model):
        if not layer.built and layer is not model and maskable(type(layer)) is None:
            chain = [layer for _, layer in resolve(model, f"{path}/", cache)]
            holds_more = not weights_inside(layer) and not isinstance(layer, MaskedLayer)
            if type(layer) in MASKED_CLASSES and holds_more and type(layer) not in NORMALIZATIONS:
                holders += chain[1:]
                if chosen(chain[1:]):
                    selected.append((path, True))
            elif not model.built and _builds_itself(layer) and chosen(chain[1:]):
                raise ValueError(
                    f"'{model.name}' is not built yet, and '{path}' ({type(layer).__name__}) has a "
                    "`build` method that may create layers to be masked. First call "
                    "`model.build(input_shape)` or call the model on a batch, or leave that "
                    "layer out: `convert_to_masked(model, exclude=...)`."
                )
    if not selected:
        raise ValueError(
            f"Nothing to mask in '{model.name}': {_why_nothing(model, holders, include, exclude)}"
        )
    _warn_of_idle(model, include=include, exclude=exclude)
    return selected


def _warn_of_idle(model: keras.Model, **filters: Filter | None) -> None:
    """Warns about each pattern and function that matches no layer of the model."""
    layers = [layer for _, layer in walk(model)]
    for argument, value in filters.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not any(map(_predicate(argument, one), layers)):
                warnings.warn(
                    f"{argument}={one!r} matches no layer of '{model.name}' and has no effect. "
                    "Patterns are searched for in the names of layers: "
                    f"{_named([layer for layer in layers if not _is_input(layer)], one)}",
                    stacklevel=4,
                )


def _why_nothing(
    model: keras.Model, holders: list[Layer], include: Filter | None, exclude: Filter | None
) -> str:
    """Returns the end of the error message for a model without layers to mask."""
    if holders and (include is not None or exclude is not None):
        return (
            f"include={include!r}, exclude={exclude!r} leave no maskable layer. Patterns are "
            "searched for in the names of layers, and a layer that contains others stands for "
            f"them. Maskable layers and the layers that contain them: {_named(holders, include)}"
        )
    reason = "its layers have no maskable weight"
    if not model.built:
        reason = "it is not built yet: call `model.build(input_shape)` or call it on a batch"
    if quantized := why_quantized(model):
        return quantized
    inside = sorted({plain_class(layer).__name__ for _, layer in walk(model)})
    return (
        f"{reason}. Its layers: {inside}. To make a custom layer maskable, call "
        "`masked_layers.register(cls, weights=[...])`."
    )


def _named(layers: Iterable[Layer], wanted: object) -> str:
    """Lists names of layers, up to a maximum number, and suggests those similar to patterns."""
    names = sorted({layer.name for layer in layers})
    shown = shortened(list(map(repr, names)), _NAMED)
    patterns = wanted if isinstance(wanted, list) else [wanted]
    texts = [one for one in patterns if isinstance(one, str)]
    close = dict.fromkeys(name for one in texts for name in difflib.get_close_matches(one, names))
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"{shown}.{hint}"


def _is_input(layer: Layer) -> bool:
    return isinstance(layer, keras.layers.InputLayer)


def _builds_itself(layer: Layer) -> bool:
    """Returns whether the layer has a custom `build` method."""
    return type(layer).build.__module__.partition(".")[0] != "keras"


def _predicate(argument: str, value: Filter) -> Callable[[Layer], bool]:
    if isinstance(value, str):
        value = [value]
    if callable(value):
        return lambda layer: bool(value(layer))
    if isinstance(value, Iterable):
        patterns = list(value)
        if all(isinstance(pattern, str) for pattern in patterns):
            try:
                compiled = [re.compile(pattern) for pattern in patterns]
            except re.error as error:
                raise ValueError(
                    f"`{argument}` must be a regular expression: {error}. Received: {value!r}"
                ) from error
            return lambda layer: any(pattern.search(layer.name) for pattern in compiled)
    raise TypeError(
        f"`{argument}` must be a regular expression, a list of them or a function of a layer. "
        f"Received: {value!r}"
    )
