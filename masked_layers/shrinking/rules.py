"""Rules for the channels of layers: one small function per family of layers.

A rule takes the flow and a call, returns the channels of the output, and notes in the flow how the
layer's weights follow. `@rule` lists it under the classes it holds for. Where a layer does what no
rule covers, `CannotFollow` says why, and its inputs and outputs stay whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import keras
import numpy as np
from keras import layers

from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import (
    VARIES,
    WHOLE,
    Call,
    CannotFollow,
    Channels,
    Edit,
    Flow,
    Reader,
    constant_shift,
)

Rule = Callable[[Flow, Call], Channels]
RULES: dict[type, Rule] = {}


def rule(*classes: type) -> Callable[[Rule], Rule]:
    """Lists a function as the rule of these classes; not of subclasses, which may differ.

    A rule raises `CannotFollow` before it changes the flow, or not at all.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(classes, function))
        return function

    return register


def array(variable: keras.Variable) -> np.ndarray:
    """Returns a copy of a variable's value.

    On JAX, assigning a mere view would make two models share, and then donate, one buffer.
    """
    return keras.ops.convert_to_numpy(variable).copy()


def _activations(names: str) -> set[Callable]:
    found = (getattr(keras.activations, name, None) for name in names.split())
    return {function for function in found if function is not None}


_ELEMENTWISE = _activations(
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear"
    " log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus"
    " sparse_sigmoid squareplus tanh tanh_shrink threshold"
)
_MIXING = _activations("glu log_softmax softmax sparsemax")
_CUSTOM_ACTIVATION = "its activation is not Keras' own and may mix channels"


def _apply(function: Callable, constants: np.ndarray, dtype: str) -> np.ndarray:
    """Applies an element-wise function of tensors to the constants, in the dtype of the model."""
    result = np.full(len(constants), VARIES)
    known = ~np.isnan(constants)
    if known.any():
        values = function(keras.ops.convert_to_tensor(constants[known], dtype=dtype))
        result[known] = keras.ops.convert_to_numpy(values).astype("float64")
    result[~np.isfinite(result)] = VARIES  # nothing can be computed with an overflow
    return result


# -- layers that mix channels


def _mix(
    flow: Flow,
    call: Call,
    source: Channels,
    reads: np.ndarray,
    gain: np.ndarray,
    slices: Callable[[Channels], dict[str, dict[int, Channels]]],
    width: str,
    padded: bool = False,
) -> Channels:
    """Follows a layer that computes activation(kernel applied to input + bias).

    Args:
        flow: The analysis.
        call: The call of the layer.
        source: The layer's input channels.
        reads: Bool (inputs, outputs): some kernel entry between the two is not zero.
        gain: (inputs, outputs): response to a constant one, away from the border.
        slices: From the output channels to the axes of all weights but the bias.
        width: The config's name for the number of outputs.
        padded: Whether zeros are added at the border, so that only a constant zero is exact.
    """
    layer = call.operation
    constant = ~np.isnan(source.constants)
    fixed = constant & (source.constants == 0) if padded else constant
    flow.lose(source.slots[constant & ~fixed & reads.any(axis=1)], _border(layer))
    demand = reads & ~fixed[:, None]
    values = constant_shift(source.constants, gain, fixed)
    if layer.bias is not None:
        values += array(layer.bias)
    values[demand.any(axis=0)] = VARIES

    slots = flow.new_slots(reads.shape[1])
    followed = layer.activation is None or layer.activation in _ELEMENTWISE
    if followed:
        activation = layer.activation or keras.activations.linear
        values = _apply(activation, values, call.output.dtype)
    target = Channels(source.axis, slots, values)
    reader = Reader(source, target, demand, gain, fixed)
    flow.edit(call, Edit(slices(target) | {"bias": {0: target}}, width, reader))
    if followed:
        return target
    flow.pin(target, f"the activation of '{layer.name}' reads all channels")
    if layer.activation not in _MIXING:
        flow.not_followed[layer.name] = _CUSTOM_ACTIVATION
    return WHOLE


def _border(layer: Any) -> str:
    return f"a non-zero constant enters the zero padding of '{layer.name}'"


def _pads(layer: Any) -> bool:
    return layer.padding != "valid" and math.prod(layer.kernel_size) > 1


@rule(layers.Dense)
def _dense(flow: Flow, call: Call) -> Channels:
    source, kernel = flow.channels(call, -1), array(call.operation.kernel)
    return _mix(
        flow,
        call,
        source,
        kernel != 0,
        kernel,
        lambda out: {"kernel": {0: source, 1: out}},
        "units",
    )


@rule(layers.Conv1D, layers.Conv2D, layers.Conv3D)
def _convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    if layer.groups != 1:
        raise CannotFollow("a grouped convolution")
    source, kernel = flow.channels(call, call.axis), array(layer.kernel)
    taps = tuple(range(kernel.ndim - 2))
    return _mix(
        flow,
        call,
        source,
        (kernel != 0).any(taps),
        kernel.sum(taps, dtype="float64"),
        lambda out: {"kernel": {-2: source, -1: out}},
        "filters",
        padded=_pads(layer),
    )


@rule(layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)
def _transposed_convolution(flow: Flow, call: Call) -> Channels:
    source, kernel = flow.channels(call, call.axis), array(call.operation.kernel)
    taps = tuple(range(kernel.ndim - 2))
    return _mix(
        flow,
        call,
        source,
        (kernel != 0).any(taps).T,
        kernel.sum(taps, dtype="float64").T,
        lambda out: {"kernel": {-1: source, -2: out}},
        "filters",
        padded=True,  # how many taps an output position sums up depends on where it is
    )


@rule(layers.SeparableConv1D, layers.SeparableConv2D)
def _separable_convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    source = flow.channels(call, call.axis)
    depthwise, pointwise = array(layer.depthwise_kernel), array(layer.pointwise_kernel)
    taps = tuple(range(depthwise.ndim - 2))
    inputs, multiplier = depthwise.shape[-2:]
    pointwise = pointwise.reshape(inputs, multiplier, -1)
    between = Channels(source.axis, source.slots.repeat(multiplier), np.zeros(0))
    return _mix(
        flow,
        call,
        source,
        ((depthwise != 0).any(taps)[..., None] & (pointwise != 0)).any(axis=1),
        np.einsum("im,imo->io", depthwise.sum(taps, dtype="float64"), pointwise.astype("float64")),
        lambda out: {
            "depthwise_kernel": {-2: source},
            "pointwise_kernel": {-2: between, -1: out},
        },
        "filters",
        padded=_pads(layer),
    )


# -- layers that pass channels on, with weights of their own


@rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def _depthwise_convolution(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    if layer.activation is not None and layer.activation not in _ELEMENTWISE:
        raise CannotFollow(_CUSTOM_ACTIVATION)
    source, kernel = flow.channels(call, call.axis), array(layer.kernel)
    multiplier = kernel.shape[-1]
    kernel = kernel.reshape(-1, kernel.shape[-2] * multiplier)  # (taps, outputs)
    reads, value = (kernel != 0).any(axis=0), source.constants.repeat(multiplier)
    slots = source.slots.repeat(multiplier)
    lost = reads & (value != 0) & ~np.isnan(value) & _pads(layer)
    flow.lose(slots[lost], _border(layer))
    value[lost] = VARIES
    value = np.where(reads, value * kernel.sum(axis=0, dtype="float64"), 0.0)
    if layer.bias is not None:
        value += array(layer.bias)
    activation = layer.activation or keras.activations.linear
    target = Channels(source.axis, slots, _apply(activation, value, call.output.dtype))
    flow.edit(call, Edit({"kernel": {-2: source}, "bias": {0: target}}))
    return target


@rule(layers.BatchNormalization)
def _batch_normalization(flow: Flow, call: Call) -> Channels:
    layer = call.operation
    if getattr(layer, "renorm", False):
        raise CannotFollow("batch renormalization")
    source = flow.channels(call, layer.axis)
    scale = 1 / np.sqrt(array(layer.moving_variance).astype("float64") + layer.epsilon)
    if layer.gamma is not None:
        scale *= array(layer.gamma)
    constants = np.where(scale == 0, 0.0, (source.constants - array(layer.moving_mean)) * scale)
    if layer.beta is not None:
        constants += array(layer.beta)
    names = ("gamma", "beta", "moving_mean", "moving_variance")
    flow.edit(call, Edit({name: {0: source} for name in names}))
    return source.with_constants(constants)


@rule(layers.PReLU)
def _prelu(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    if source.axis is None:
        return source
    alpha = array(call.operation.alpha)
    axis = source.axis - 1  # alpha has no batch axis
    if alpha.shape[axis] == len(source.slots):
        flow.edit(call, Edit({"alpha": {axis: source}}))
    elsewhere = tuple(i for i in range(alpha.ndim) if i != axis)
    low, high = alpha.min(elsewhere), alpha.max(elsewhere)
    slope = np.where(low == high, low, VARIES)
    return source.with_constants(
        np.where(source.constants < 0, source.constants * slope, source.constants)
    )


# -- layers that pass channels on and have no weights


@rule(
    layers.ActivityRegularization,
    layers.AlphaDropout,
    layers.Dropout,
    layers.GaussianDropout,
    layers.GaussianNoise,
    layers.Identity,
    layers.SpatialDropout1D,
    layers.SpatialDropout2D,
    layers.SpatialDropout3D,
)
def _nothing_in_inference(flow: Flow, call: Call) -> Channels:
    return flow.tensors[id(call.inputs[0])]


@rule(layers.ELU, layers.LeakyReLU, layers.ReLU, *_keras_graph.ELEMENTWISE_OPERATIONS)
def _elementwise(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    # `call`, as `__call__` would add activity regularization losses to the user's model.
    return source.with_constants(_apply(call.operation.call, source.constants, call.output.dtype))


@rule(layers.Activation)
def _activation(flow: Flow, call: Call) -> Channels:
    if call.operation.activation in _ELEMENTWISE:
        return _elementwise(flow, call)
    if call.operation.activation in _MIXING:
        return _reads_all(flow, call)
    raise CannotFollow(_CUSTOM_ACTIVATION)


@rule(layers.Softmax)
def _reads_all(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    flow.pin(source, f"'{call.operation.name}' reads all channels")
    return WHOLE


@rule(
    layers.AveragePooling1D,
    layers.AveragePooling2D,
    layers.AveragePooling3D,
    layers.Cropping1D,
    layers.Cropping2D,
    layers.Cropping3D,
    layers.MaxPooling1D,
    layers.MaxPooling2D,
    layers.MaxPooling3D,
    layers.UpSampling1D,
    layers.UpSampling2D,
    layers.UpSampling3D,
)
def _spatial(flow: Flow, call: Call) -> Channels:
    # A window of one value has that value as its mean and maximum: padding does not count there.
    return flow.channels(call, call.axis)


@rule(
    layers.GlobalAveragePooling1D,
    layers.GlobalAveragePooling2D,
    layers.GlobalAveragePooling3D,
    layers.GlobalMaxPooling1D,
    layers.GlobalMaxPooling2D,
    layers.GlobalMaxPooling3D,
)
def _global_pooling(flow: Flow, call: Call) -> Channels:
    source = flow.channels(call, call.axis)
    axis = source.axis if call.operation.keepdims else 1
    return source.with_constants(source.constants, axis)


@rule(layers.ZeroPadding1D, layers.ZeroPadding2D, layers.ZeroPadding3D)
def _zero_padding(flow: Flow, call: Call) -> Channels:
    source = flow.channels(call, call.axis)
    lost = ~np.isnan(source.constants) & (source.constants != 0)
    flow.lose(source.slots[lost], _border(call.operation))
    return source.with_constants(np.where(lost, VARIES, source.constants))


@rule(layers.Flatten)
def _flatten(flow: Flow, call: Call) -> Channels:
    source, shape = flow.tensors[id(call.inputs[0])], call.inputs[0].shape[1:]
    if source.axis is None:
        return source
    if None in shape:
        raise CannotFollow("the number of positions is unknown")

    def spread(values: np.ndarray) -> np.ndarray:
        """Repeats what is known of a channel over all its positions, in the layer's order."""
        along = np.expand_dims(values, [i for i in range(len(shape)) if i != source.axis - 1])
        grid = np.broadcast_to(along, shape)
        return np.moveaxis(grid, 0, -1).ravel() if call.axis == 1 else grid.ravel()

    return Channels(1, spread(source.slots), spread(source.constants))


# -- merges


@rule(layers.Concatenate, _keras_graph.CONCATENATE)
def _concatenate(flow: Flow, call: Call) -> Channels:
    rank = len(call.output.shape)
    axis = call.operation.axis % rank
    if {flow.tensors[id(x)].axis for x in call.inputs} - {None, axis}:
        raise CannotFollow("it does not concatenate channels")
    parts = [flow.channels(call, axis, index) for index in range(len(call.inputs))]
    slots, constants = ([getattr(part, name) for part in parts] for name in ("slots", "constants"))
    return Channels(axis, np.concatenate(slots), np.concatenate(constants))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _merge(function: Callable[[list[np.ndarray]], np.ndarray]) -> Rule:
    """Returns the rule of an element-wise merge, from what it does to a list of constants."""

    def merge(flow: Flow, call: Call) -> Channels:
        axes = [flow.tensors[id(x)].axis for x in call.inputs]
        axis = next((axis for axis in axes if axis is not None), None)
        if axis is None:
            return WHOLE
        if (
            len({len(x.shape) for x in call.inputs}) > 1
            or len({x.shape[axis] for x in call.inputs}) > 1
        ):
            raise CannotFollow("it broadcasts channels")
        first, *others = (flow.channels(call, axis, index) for index in range(len(call.inputs)))
        for other in others:
            flow.join(first.slots, other.slots)
        return first.with_constants(function([first.constants, *(x.constants for x in others)]))

    return merge


rule(layers.Add, _keras_graph.ADD)(_merge(lambda values: reduce(np.add, values)))
rule(layers.Subtract, _keras_graph.SUBTRACT)(_merge(lambda values: reduce(np.subtract, values)))
rule(layers.Multiply, _keras_graph.MULTIPLY)(_merge(lambda values: reduce(_product, values)))
rule(layers.Maximum, _keras_graph.MAXIMUM)(_merge(lambda values: reduce(np.maximum, values)))
rule(layers.Minimum, _keras_graph.MINIMUM)(_merge(lambda values: reduce(np.minimum, values)))
rule(layers.Average)(_merge(lambda values: np.mean(values, axis=0)))
