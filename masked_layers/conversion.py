"""From a plain Keras model to a masked one and back."""

from __future__ import annotations

import contextlib
import logging
import operator
import re
import tempfile
import types
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import keras
import numpy as np

from masked_layers import _keras, learned
from masked_layers.inspection import WeightRef, get_masks, masked_refs, weight_refs
from masked_layers.layers import (
    MaskedLayer,
    by_hand,
    make_binary,
    mask_weights,
    mask_when_built,
    unmask,
)
from masked_layers.maskable import maskable, weights_inside
from masked_layers.masks import raw_view
from masked_layers.paths import plain_class, resolve, walk

Layer = keras.layers.Layer
Filter = str | Iterable[str] | Callable[[Layer], bool]

logger = logging.getLogger(__name__)


def convert_to_masked(
    model: keras.Model,
    *,
    include: Filter | None = None,
    exclude: Filter | None = None,
    mask_bias: bool = False,
    mask: Any = "binary",
    inplace: bool = False,
) -> keras.Model:
    """Returns a copy of a model whose maskable layers are masked; its outputs are the same bits.

    Masks start as ones. Weights, names, trainable flags, dtype policies, compilation and the state
    of the optimizer are carried over, so that a partly trained model continues where it stood.
    Layers that cannot be masked stay as they are; `sparsity_report(model)` lists them.

    Args:
        model: Sequential, functional or subclassed model, built or not, compiled or not.
        include: Which layers to mask: a regular expression searched in their names, a list of
            those, or a function of the layer (what `Model.quantize(filters=...)` takes). A layer
            that holds others stands for all of them. Default: all.
        exclude: Which layers to leave as they are; it outranks `include`.
        mask_bias: Whether biases get masks too.
        mask: Kind of the masks: `"binary"`; `"bernoulli"` or `"edge_popup"` for learned ones, whose
            scores are trained and the weights of their layers are not (layers without masks, such
            as normalization, train as before); a mask that is not built, as a prototype of all,
            such as `EdgePopupMask(sparsity=0.7, seed=1)`; the config of one, or a function that
            makes one. The optimizer starts afresh where masks are learned.
        inplace: Change `model` itself and return it. Needed for subclassed models that have no
            `get_config`.

    Returns:
        The masked model.

    Raises:
        TypeError: If `model` is no Keras model, or a filter is none of the kinds above.
        ValueError: If it has nothing to mask, cannot be copied, or is not built and has a layer
            that may make others when it is; if `mask` is no mask, cannot go over a weight, or is
            learned and there are masks already.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    _keras.check_strategy(model)
    prototype = None if mask == "binary" else learned.get(mask)
    if prototype is not None and any(ref.mask is not None for ref in weight_refs(model)):
        raise ValueError(
            f"'{model.name}' has masks already, which would stay. Call `strip_masks(model)` first, "
            f"and convert what it returns. Received: mask={mask!r}"
        )
    selected = _select(model, include, exclude, mask_bias)
    if not inplace:
        model = copy_model(model)
    weights = [path for path, unbuilt in selected if not unbuilt]
    mask_weights(model, weights, mask_bias=mask_bias, mask=prototype)
    for path, unbuilt in selected:
        if unbuilt:
            layer = resolve(model, f"{path}/")[-1][1]
            mask_when_built(layer, mask_bias=mask_bias, mask=prototype)
    if prototype is not None and prototype.learned:
        renew_optimizer(model)
    _keras.forget_functions(model)
    logger.info("Masked %d weights of '%s'.", len(selected), model.name)
    return model


def strip_masks(model: keras.Model, *, inplace: bool = False) -> keras.Model:
    """Returns a plain copy of a masked model: no masks, pruned weights exactly 0, same outputs.

    Frozen pruned weights (`Mask.freeze`) are folded in as what they are frozen at.

    The result is made of Keras' own layers (and the user's), loads without this library, and can be
    quantized and exported like any other.

    Args:
        model: A masked model.
        inplace: Change `model` itself and return it.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If it has no masked weight, cannot be copied, or has a masked layer that has no
            plain form or computes its weight from something else. Nothing is changed then.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    _check_strippable(model)
    _keras.sync(model)
    if not inplace:
        model = copy_model(model)
    for ref in masked_refs(model):
        _fold(ref)
    unmask(model)
    _keras.forget_functions(model)
    return model


def harden(model: keras.Model, *, seed: int | None = None, inplace: bool = False) -> keras.Model:
    """Returns a copy of a model in which learned masks are binary ones; its weights train again.

    What it returns is a masked model like any other: reports, `update_masks`, `strip_masks` and
    exporters take it. Its outputs are those of the deterministic evaluation of the model given, or,
    with a seed, of one sample.

    Args:
        model: A model with learned masks.
        seed: None for the masks that `get_masks` gives; otherwise they are sampled, where training
            samples them.
        inplace: Change `model` itself and return it.

    Raises:
        TypeError: If `model` is no Keras model.
        ValueError: If it has no learned mask, or cannot be copied.
    """
    if not isinstance(model, keras.Model):
        raise TypeError(f"Expected a `keras.Model`. Received: {model!r}")
    masks = get_masks(model) if seed is None else sample_masks(model, seed)
    if not any(ref.mask.learned for ref in masked_refs(model)):
        raise ValueError(
            f"'{model.name}' has no learned mask. Convert a plain model with "
            "`convert_to_masked(model, mask=...)` and train it first."
        )
    if not inplace:
        model = copy_model(model)
    make_binary(model, {id(ref.variable): masks[ref.path] for ref in masked_refs(model)})
    renew_optimizer(model)
    _keras.forget_functions(model)
    return model


def sample_masks(model: keras.Model, seed: int) -> dict[str, np.ndarray]:
    """Returns a sample of every learned mask, and the others as they are: path to bool array.

    Args:
        model: A masked model.
        seed: A sample is a function of the scores, this seed and the path of the weight.

    Raises:
        ValueError: If the model has no masked weight.
    """
    _keras.sync(model)
    masks = {}
    for ref in masked_refs(model):
        rng = np.random.default_rng([seed, zlib.crc32(ref.path.encode())])
        masks[ref.path] = ref.mask.sample(rng) if ref.mask.learned else ref.mask.to_numpy()
    return masks


def renew_optimizer(model: keras.Model) -> None:
    """Gives a compiled model an optimizer that is not built: other variables are trainable now."""
    old = getattr(model, "optimizer", None)
    if old is not None:
        vars(model)["optimizer"] = type(old).from_config(old.get_config())


def compile_with(model: keras.Model, optimizer: keras.Optimizer) -> None:
    """Compiles a compiled model anew as it is, but for its optimizer."""
    config = model.get_compile_config()
    config["optimizer"] = keras.saving.serialize_keras_object(optimizer)
    with _keras.custom_object_scope(custom_objects_of(model)):
        model.compile_from_config(config)


def _check_strippable(model: keras.Model) -> None:
    for ref in masked_refs(model):
        if ref.mask.learned:
            raise ValueError(
                f"'{ref.path}' cannot be stripped: its mask is learned. Call "
                "`masked_layers.harden(model)` first, and strip what it returns."
            )
        if issubclass(plain_class(ref.layer), MaskedLayer):
            raise ValueError(
                f"'{ref.path}' cannot be stripped: {type(ref.layer).__name__} derives from a "
                "masked layer, so that there is no plain class to make of it. Derive it from the "
                "Keras layer and mask it with `convert_to_masked`."
            )
        with raw_view():
            derived = getattr(ref.layer, ref.name) is not ref.variable
        if derived and _lora_factor(ref) is None:
            raise ValueError(
                f"'{ref.path}' cannot be stripped: {plain_class(ref.layer).__name__} computes "
                f"'{ref.name}' from its variable, and what it makes of zeros there need not be "
                "zero. Serve the masked model, or leave the layer out: "
                "`convert_to_masked(model, exclude=...)`."
            )


def _fold(ref: WeightRef) -> None:
    """Writes the effective weight into the variable, and LoRA's addition with it."""
    factor = _lora_factor(ref)
    weight = ref.mask.apply(ref.variable) if factor is None else getattr(ref.layer, ref.name)
    ref.variable.assign(np.array(keras.ops.convert_to_numpy(weight)))
    if factor is not None:
        factor.assign(np.zeros(factor.shape))


def _lora_factor(ref: WeightRef) -> keras.Variable | None:
    """Returns the second factor of the product that LoRA adds to the weight, None without LoRA."""
    return getattr(ref.layer, f"lora_{ref.name}_b", None)


# --- What to mask ---------------------------------------------------------------------------------


def _select(
    model: keras.Model, include: Filter | None, exclude: Filter | None, mask_bias: bool
) -> list[tuple[str, bool]]:
    """Returns (path, False) of each weight to mask and (path, True) of layers masked when built."""
    included = (lambda layer: True) if include is None else _predicate("include", include)
    excluded = (lambda layer: False) if exclude is None else _predicate("exclude", exclude)

    def chosen(chain: list[Layer]) -> bool:
        return any(map(included, chain)) and not any(map(excluded, chain))

    cache: dict[int, Any] = {}
    selected = []
    for path, *_ in weights_inside(model, biases=mask_bias):
        chain = [layer for _, layer in resolve(model, path, cache)]
        if chosen(chain[1:] or chain):
            selected.append((path, False))
    for path, layer in walk(model):
        if not layer.built and layer is not model and maskable(type(layer)) is None:
            chain = [layer for _, layer in resolve(model, f"{path}/", cache)]
            holds_more = not weights_inside(layer) and not isinstance(layer, MaskedLayer)
            if type(layer) in by_hand and holds_more and chosen(chain[1:]):
                selected.append((path, True))
            elif not model.built and _builds_itself(layer) and chosen(chain[1:]):
                raise ValueError(
                    f"'{model.name}' is not built yet, and '{path}' ({type(layer).__name__}) has a "
                    "`build` that may make the layers to be masked. Call "
                    "`model.build(input_shape)` or call the model on a batch first, or leave that "
                    "layer out: `convert_to_masked(model, exclude=...)`."
                )
    if not selected:
        reason = "its layers have no maskable weight"
        if include is not None or exclude is not None:
            reason = f"include={include!r}, exclude={exclude!r} leave no maskable layer"
        elif not model.built:
            reason = "it is not built yet: call `model.build(input_shape)` or call it on a batch"
        inside = sorted({plain_class(layer).__name__ for _, layer in walk(model)})
        raise ValueError(
            f"Nothing to mask in '{model.name}': {reason}. Its layers: {inside}. A layer of your "
            "own becomes maskable with `masked_layers.register(cls, weights=[...])`."
        )
    return selected


def _builds_itself(layer: Layer) -> bool:
    """True for a layer not of Keras with a `build` of its own."""
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


# --- Copying --------------------------------------------------------------------------------------


def copy_model(model: keras.Model, *, dtype: str | None = None) -> keras.Model:
    """Returns a model with the same layers, values, compilation and optimizer state.

    Nothing is shared with `model`.

    Args:
        model: The model.
        dtype: The float type that the copy is to compute and keep its weights in, whatever the
            model does. The copy is not compiled then.

    Raises:
        ValueError: If the model cannot be made again from its config.
    """
    _keras.sync(model)
    custom = custom_objects_of(model)
    try:
        with _lambdas_by_name(model, custom):
            config = _keras.serialize(model)
        compile_config = config.pop("compile_config", None)
        if dtype is not None:
            config, compile_config = _with_dtype(config, dtype), None
        with _keras.custom_object_scope(custom):
            copy = _keras.deserialize(config, custom)
    except Exception as error:
        raise ValueError(
            f"'{model.name}' ({plain_class(model).__name__}) cannot be copied, because Keras "
            f"cannot make it again from its config: {error}\nGive it a `get_config()` and "
            "`from_config()`, or pass `inplace=True` to change the model itself."
        ) from error
    _copy_state(model, copy)
    _keras.copy_called(model, copy)
    if compile_config:  # An empty one would compile with defaults.
        try:
            with _keras.custom_object_scope(custom):
                copy.compile_from_config(compile_config)
        except Exception as error:
            raise ValueError(
                f"'{model.name}' cannot be copied as it is compiled: {error}\nCompile it with "
                "named functions in place of lambdas, or pass `inplace=True` to change the model "
                "itself."
            ) from error
        _copy_optimizer(model, copy)
    return copy


def _with_dtype(config: Any, dtype: str) -> Any:
    """The config of a layer with another float type, all layers inside it included."""
    if isinstance(config, dict):
        return {
            key: dtype if key == "dtype" and _is_float(value) else _with_dtype(value, dtype)
            for key, value in config.items()
        }
    if isinstance(config, (list, tuple)):
        return type(config)(_with_dtype(value, dtype) for value in config)
    return config


def _is_float(dtype: Any) -> bool:
    if isinstance(dtype, dict):  # a policy
        dtype = dtype.get("config", {}).get("name")
    return isinstance(dtype, str) and "float" in dtype


@contextlib.contextmanager
def _lambdas_by_name(model: keras.Model, custom: dict[str, Any]) -> Iterator[None]:
    """Lets `Lambda` layers be serialized by the name of a custom object while it is open.

    Keras serializes the code of a lambda without the module it refers to: in a copy made of it,
    `lambda x: ops.tanh(x)` does not know `ops`.
    """
    named = {}
    for _, layer in walk(model):
        function = layer.function if isinstance(layer, keras.layers.Lambda) else None
        if getattr(function, "__name__", None) == "<lambda>":
            named[layer] = function
    try:
        for index, (layer, function) in enumerate(named.items()):
            name = f"<lambda {index}>"
            layer.function = types.FunctionType(
                function.__code__, {}, name, None, function.__closure__
            )
            custom[name] = function
        yield
    finally:
        for layer, function in named.items():
            layer.function = function


def _copy_state(source: keras.Model, target: keras.Model) -> None:
    pairs = list(zip(walk(source), walk(target), strict=False))
    for old, new in zip(weight_refs(source), weight_refs(target), strict=False):
        if old.mask is not None and new.mask is not None and old.mask.frozen is not None:
            new.mask.freeze(keras.ops.convert_to_numpy(old.mask.frozen))
    before, after = ([tuple(v.shape) for v in model.variables] for model in (source, target))
    if before != after:
        raise ValueError(
            f"The copy of '{source.name}' that its config makes has other variables "
            f"({len(after)}) than the model itself ({len(before)}): its `get_config()` does not "
            "describe it fully, or it is not built. Build it by calling it on a batch, mend "
            "`get_config()`, or pass `inplace=True` to change the model itself."
        )
    for (_, old), (_, new) in pairs:
        if new.name != old.name:  # An automatic name inside a composite layer.
            new.name = old.name
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(source.variables, target.variables, strict=True):
        # Through the host: on JAX an assigned variable shares its buffer with the other one.
        new.assign(np.array(keras.ops.convert_to_numpy(old)))
        if new.trainable != old.trainable:
            new.trainable = old.trainable
    for old, new in zip(weight_refs(source), weight_refs(target), strict=True):
        if old.mask is not None:
            new.mask.rescale = old.mask.rescale
    for (_, old), (_, new) in pairs:
        copy_assets(old, new)


def copy_assets(source: Layer, target: Layer) -> None:
    """Copies what a layer keeps beside its variables: vocabularies, adapted statistics."""
    if hasattr(source, "save_assets"):
        with tempfile.TemporaryDirectory() as folder:
            source.save_assets(folder)
            target.load_assets(folder)
    if hasattr(target, "finalize_state") and target.built:
        target.finalize_state()


def _copy_optimizer(source: keras.Model, target: keras.Model) -> None:
    old, new = getattr(source, "optimizer", None), getattr(target, "optimizer", None)
    if old is None or new is None or not old.built:
        return
    if not new.built:
        new.build(target.trainable_variables)
    shapes = [[tuple(v.shape) for v in o.variables] for o in (old, new)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"The state of the optimizer of '{source.name}' does not fit the copy: "
            f"{len(shapes[0])} variables before, {len(shapes[1])} after. Compile the model anew "
            "before it is converted."
        )
    for a, b in zip(old.variables, new.variables, strict=True):
        b.assign(np.array(keras.ops.convert_to_numpy(a)))


def _same(a: Any, b: Any) -> bool:
    """True for one object, and for functions made anew by the same code from the same objects."""
    if a is b or not all(isinstance(value, types.FunctionType) for value in (a, b)):
        return a is b
    made_of = [
        (*(f.__defaults__ or ()), *(cell.cell_contents for cell in f.__closure__ or ()))
        for f in (a, b)
    ]
    return a.__code__ is b.__code__ and all(map(operator.is_, *made_of))


def custom_objects_of(model: keras.Model) -> dict[str, Any]:
    """Returns the classes and functions in use that Keras could not find by name by itself.

    Classes of Keras are left out: one named like an op of Keras would stand in for it.

    Raises:
        ValueError: If two different ones have the same name.
    """
    found: dict[str, Any] = {}

    def add(value: Any) -> None:
        if isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif isinstance(value, dict):
            for item in value.values():
                add(item)
        elif isinstance(value, types.FunctionType):
            if value.__name__ != "<lambda>":
                add_named(value)
        elif hasattr(value, "get_config"):
            add_named(plain_class(value))

    def add_named(value: Any) -> None:
        ours = value.__module__.partition(".")[0] in ("keras", "masked_layers")
        if not ours:
            name = _keras.get_registered_name(value)
            if not _same(found.setdefault(name, value), value):
                raise ValueError(
                    f"'{model.name}' cannot be copied: it uses {found[name]!r} and {value!r}, and "
                    f"Keras knows both as '{name}'. Rename one, or pass `inplace=True` to change "
                    "the model itself."
                )

    for _, layer in walk(model):
        add(layer)
        if isinstance(layer, MaskedLayer):
            add([layer._masking.mask, layer._masking.initializer])
        for key, value in vars(layer).items():
            # Keras wraps some methods of a layer, which then stand among its attributes.
            if key not in ("_layers", "_modules") and not callable(getattr(type(layer), key, None)):
                add(value)
    add(_keras.compile_arguments(model))
    return found
