"""The registry of layer classes and their maskable weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from typing import TypeAlias

import keras
from keras import layers

from masked_layers._keras import ConvLSTMCell, own_variables
from masked_layers.masks import Mask, raw_view
from masked_layers.paths import join, plain_class, walk

Layer: TypeAlias = layers.Layer


@dataclasses.dataclass(frozen=True)
class Maskable:
    """The weights of one layer class that can be masked, by attribute name.

    Attributes:
        weights: Kernels, which are masked by default.
        biases: Weights that are masked only on request.
        output_axes: Function of the layer and the name of a kernel that returns the axes of the
            kernel that index outputs. Default: the last axis.
        input_axes: Function of the same arguments that returns the axes that are summed over,
            outermost first, without those of a convolution's window. Default: the second to last
            axis.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...] = ()
    output_axes: Callable[[Layer, str], tuple[int, ...]] = lambda layer, name: (-1,)
    input_axes: Callable[[Layer, str], tuple[int, ...]] = lambda layer, name: (-2,)


def _einsum_outputs(layer: layers.EinsumDense, name: str) -> tuple[int, ...]:
    inputs, kernel, outputs = _einsum_indices(layer)
    return tuple(
        axis - len(kernel) for axis, i in enumerate(kernel) if i in outputs and i not in inputs
    )


def _einsum_inputs(layer: layers.EinsumDense, name: str) -> tuple[int, ...]:
    inputs, kernel, outputs = _einsum_indices(layer)
    return tuple(
        axis - len(kernel) for axis, i in enumerate(kernel) if i in inputs and i not in outputs
    )


def _einsum_indices(layer: layers.EinsumDense) -> tuple[str, str, str]:
    operands, outputs = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    return inputs, kernel, outputs


def _none(layer: Layer, name: str) -> tuple[int, ...]:
    return ()


def _separable_outputs(layer: Layer, name: str) -> tuple[int, ...]:
    return (-2, -1) if name == "depthwise_kernel" else (-1,)


def _separable_inputs(layer: Layer, name: str) -> tuple[int, ...]:
    return () if name == "depthwise_kernel" else (-2,)


_registry: dict[type[Layer], Maskable] = {}

for _cls in (layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D):
    _registry[_cls] = Maskable(("kernel",), ("bias",))
_registry[layers.EinsumDense] = Maskable(("kernel",), ("bias",), _einsum_outputs, _einsum_inputs)
for _cls in (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose):
    _registry[_cls] = Maskable(
        ("kernel",), ("bias",), lambda layer, name: (-2,), lambda layer, name: (-1,)
    )
for _cls in (layers.DepthwiseConv1D, layers.DepthwiseConv2D):
    _registry[_cls] = Maskable(("kernel",), ("bias",), lambda layer, name: (-2, -1), _none)
for _cls in (layers.SeparableConv1D, layers.SeparableConv2D):
    _registry[_cls] = Maskable(
        ("depthwise_kernel", "pointwise_kernel"), ("bias",), _separable_outputs, _separable_inputs
    )
_registry[layers.Embedding] = Maskable(("embeddings",), input_axes=_none)
_registry[layers.ReversibleEmbedding] = Maskable(
    ("embeddings", "reverse_embeddings"), input_axes=_none
)
for _cls in (layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell, ConvLSTMCell):
    _registry[_cls] = Maskable(("kernel", "recurrent_kernel"), ("bias",))

# Layers whose scale can have a mask that leaves channels out: see `channel_weights`.
NORMALIZATIONS = (layers.LayerNormalization, layers.RMSNormalization, layers.GroupNormalization)

# Layers that overwrite the weights of their inner layer, where a mask would have no effect.
_OPAQUE = (layers.SpectralNormalization,)


def register(
    cls: type[Layer], weights: Iterable[str], *, biases: Iterable[str] = ()
) -> type[Layer]:
    """Registers the maskable weights of a custom layer class for `convert_to_masked`.

    The registration includes subclasses. The layer must read each weight as a tensor through the
    attribute named here (`ops.matmul(x, self.w)`), not through `self.w.value` or another reference.

    Args:
        cls: The layer class.
        weights: Names of the attributes that contain kernels.
        biases: Names of the attributes that are masked only with `mask_bias=True`.

    Returns:
        `cls`.

    Raises:
        TypeError: If `cls` is not a layer class, or `weights` or `biases` is a string and not a
            list of names.
        ValueError: If no weight is named.
    """
    if not (isinstance(cls, type) and issubclass(cls, layers.Layer)):
        raise TypeError(f"Expected a subclass of `keras.layers.Layer`. Received: {cls!r}")
    for names in (weights, biases):
        if isinstance(names, str):
            raise TypeError(f"Expected a list of attribute names. Received the string {names!r}")
    spec = Maskable(tuple(weights), tuple(biases))
    if not spec.weights + spec.biases:
        raise ValueError(f"Name at least one maskable weight of {cls.__name__}.")
    _registry[cls] = spec
    return cls


def maskable(cls: type[Layer]) -> Maskable | None:
    """Returns the maskable weights of a layer class, or None."""
    return next((_registry[base] for base in cls.__mro__ if base in _registry), None)


def own_weights(layer: Layer, *, biases: bool = False, channels: bool = False) -> list[str]:
    """Returns the names of the layer's own maskable weights, without those of inner layers.

    For a layer that is not built yet, these are the weights that its class may create. A weight is
    left out if the layer already has another attribute with the name of its mask.

    Args:
        layer: A layer.
        biases: Whether to include biases.
        channels: Whether to include `channel_weights`.

    Raises:
        TypeError: If a registered attribute is not a variable.
    """
    if getattr(layer, "quantization_mode", None) is not None:
        return []
    spec, names = maskable(type(layer)), channel_weights(layer) if channels else ()
    if spec is not None:
        names += spec.weights + (spec.biases if biases else ())
    return [
        name
        for name in names
        if (not layer.built or raw_variable(layer, name) is not None)
        and isinstance(getattr(layer, f"{name}_mask", None), Mask | None)
    ]


def every_own_weight(layer: Layer) -> list[str]:
    """Returns the names of all weights of the layer itself that can have a mask."""
    return own_weights(layer, biases=True, channels=True)


def channel_weights(layer: Layer) -> tuple[str, ...]:
    """Returns the name of the scale of a normalization that can leave channels out.

    It has one entry for each channel. A mask over it leaves channels out of the whole layer, the
    statistics included; its entries are not counted as weights. The layer must be one of Keras'
    own, since a subclass may compute something else; normalize all channels of one axis together;
    and have a scale.
    """
    cls = plain_class(layer)
    if cls not in NORMALIZATIONS or (isinstance(layer.axis, (list, tuple)) and len(layer.axis) > 1):
        return ()
    if cls is layers.RMSNormalization:
        return ("scale",)
    whole = layer.groups == 1 if cls is layers.GroupNormalization else not layer.rms_scaling
    return ("gamma",) if layer.scale and whole else ()


def raw_variable(layer: Layer, name: str) -> keras.Variable | None:
    """Returns the variable of the weight `name` of a built layer, or None.

    A property of this name is not used, since it may add LoRA factors to the variable.

    Raises:
        TypeError: If the attribute is not a variable.
    """
    with raw_view():
        value = getattr(layer, f"_{name}", None)
        if not isinstance(value, keras.Variable):
            value = getattr(layer, name, None)
    if value is not None and not isinstance(value, keras.Variable):
        raise TypeError(
            f"'{name}' of {type(layer).__name__} '{layer.name}' cannot be masked: expected a "
            f"`keras.Variable`. Received: {type(value).__name__}"
        )
    return value


def weights_inside(
    root: Layer, *, biases: bool = False, channels: bool = False
) -> list[tuple[str, Layer, str]]:
    """Returns (path, layer, name) for every maskable weight inside `root`, as `own_weights` does.

    A weight that several layers share is listed once for each of them. Weights that a layer such
    as `SpectralNormalization` overwrites are left out.
    """
    inside = list(walk(root))
    hidden = _overwritten(layer for _, layer in inside)
    return [
        (join(path, name), layer, name)
        for path, layer in inside
        if id(layer) not in hidden
        for name in own_weights(layer, biases=biases, channels=channels)
    ]


def every_weight_inside(root: Layer) -> list[tuple[str, Layer, str]]:
    """Returns (path, layer, name) for every weight inside `root` that can have a mask."""
    return weights_inside(root, biases=True, channels=True)


def overwritten(root: Layer) -> set[int]:
    """Returns the ids of the layers inside `root` whose weights another layer overwrites."""
    return _overwritten(layer for _, layer in walk(root))


def _overwritten(layers: Iterable[Layer]) -> set[int]:
    around = [layer for layer in layers if isinstance(layer, _OPAQUE)]
    return {id(inner) for layer in around for _, inner in walk(layer)}


def unknown_kernels(layer: Layer) -> list[keras.Variable]:
    """Returns trainable weights of rank 2 or more that are not registered for the layer's class.

    The experts of a mixture-of-experts layer are such weights, but so are position tables and class
    tokens.
    """
    spec = maskable(type(layer))
    with raw_view():
        known = [raw_variable(layer, name) for name in spec.weights + spec.biases] if spec else []
    return [
        variable
        for variable in own_variables(layer)
        if len(variable.shape) > 1 and variable.trainable and id(variable) not in map(id, known)
    ]


def why_unmasked(layer: Layer, hidden: bool) -> str:
    """Returns the reason why some weights of a layer have no mask.

    Args:
        layer: A layer of a plain or masked model.
        hidden: Whether another layer overwrites its weights (see `overwritten`).
    """
    cls = plain_class(layer).__name__
    if hidden:
        return "spectral normalization overwrites its weights"
    if getattr(layer, "quantization_mode", None) is not None:
        return "it is quantized"
    if kernels := unknown_kernels(layer):
        names = [next((n for n, v in vars(layer).items() if v is w), w.name) for w in kernels]
        return f"to mask its weights: masked_layers.register({cls}, {names})"
    if any(mask_of(layer, name) for name in channel_weights(layer)):
        return "masked by channel, which counts no weights"
    if maskable(type(layer)) is None:
        return "no trainable weight of two or more dimensions"
    if not own_weights(layer):
        return "it already has an attribute with the name of the mask"
    return "left out of the conversion"


def why_quantized(model: Layer) -> str:
    """Returns why quantized weights have no mask and what to do, or nothing if there are none."""
    modes = {getattr(layer, "quantization_mode", None) for _, layer in walk(model)} - {None}
    if not modes:
        return ""
    return (
        f"its weights are quantized ({', '.join(sorted(map(str, modes)))}), and such codes are not "
        "trained. Mask the model that was quantized, prune and train it in floating point, and "
        'quantize the result: `strip_masks(model).quantize("int8")`, or '
        '`export_sparse_saved_model(model, path, values="int8")`. To train with rounded weights, '
        'use `convert_to_masked(model, quantize="int8")`.'
    )


def mask_of(layer: Layer, name: str) -> Mask | None:
    """Returns the mask of the layer's own weight `name`, or None."""
    mask = getattr(layer, f"{name}_mask", None)
    return mask if isinstance(mask, Mask) else None


def output_axes(layer: Layer, name: str) -> tuple[int, ...]:
    """Returns the axes of a weight that index outputs, as negative numbers; () for a bias."""
    spec = maskable(type(layer))
    return spec.output_axes(layer, name) if spec is not None and name in spec.weights else ()


def input_axes(layer: Layer, name: str) -> tuple[int, ...]:
    """Returns the axes of a weight that are summed over, as negative numbers.

    The axes of a convolution's window are not included. The result is empty for a bias, an
    embedding or a depthwise kernel.
    """
    spec = maskable(type(layer))
    return spec.input_axes(layer, name) if spec is not None and name in spec.weights else ()
