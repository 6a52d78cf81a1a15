"""Rules that follow channels through layers: one small function per group of layer classes.

A rule takes the flow and a call, returns the channels of the call's output, and records in the flow
which weights of the layer belong to which channels. `@rule` registers it for its layer classes. A
rule that does not support an argument of a layer raises `CannotFollow` with the reason. The inputs
and outputs of that layer are then left whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import reduce
from typing import Any

import keras
import numpy as np
from keras import layers

from masked_layers.paths import plain_class
from masked_layers.shrinking import _keras_graph
from masked_layers.shrinking.channels import (
    VARIES,
    WHOLE,
    Call,
    CannotFollow,
    Channels,
    Edit,
    Flow,
    positions,
)

Rule = Callable[[Flow, Call], Channels]
RULES: dict[type, Rule] = {}
# By "package.class", of packages that this one does not depend on.
FOREIGN_RULES: dict[str, Rule] = {}


def rule(*classes: type) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of layer classes, but not of their subclasses.

    If a rule raises `CannotFollow`, it must do so before it changes the flow.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(classes, function))
        return function

    return register


def foreign_rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a function as the rule of classes of another package, given as "package.class"."""

    def register(function: Rule) -> Rule:
        FOREIGN_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(operation: Any) -> Rule | None:
    """Returns the rule of an operation by its class, or None."""
    return RULES.get(plain_class(operation)) or FOREIGN_RULES.get(foreign_name(operation))


def foreign_name(operation: Any) -> str:
    """Returns the class of an operation as "package.class"."""
    cls = plain_class(operation)
    return f"{cls.__module__.partition('.')[0]}.{cls.__name__}"


def array(variable: keras.Variable) -> np.ndarray:
    """Returns a copy of a variable's value.

    On JAX, assigning a view would make two models share one buffer, which one of them may donate.
    """
    return keras.ops.convert_to_numpy(variable).copy()


def _activations(names: str) -> set[Callable[..., Any]]:
    found = (getattr(keras.activations, name, None) for name in names.split())
    return {function for function in found if function is not None}


_OPERATORS = (
    _keras_graph.ADD,
    _keras_graph.DIVIDE,
    _keras_graph.MAXIMUM,
    _keras_graph.MINIMUM,
    _keras_graph.MULTIPLY,
    _keras_graph.SUBTRACT,
)
ELEMENTWISE = _activations(
    "celu elu exponential gelu hard_shrink hard_sigmoid hard_silu hard_tanh leaky_relu linear"
    " log_sigmoid mish relu relu6 selu sigmoid silu soft_shrink softplus softsign sparse_plus"
    " sparse_sigmoid squareplus tanh tanh_shrink threshold"
)
MIXING = _activations("glu log_softmax softmax sparsemax")
CUSTOM_ACTIVATION = "its activation may mix channels"


def is_elementwise(activation: Callable[..., Any]) -> bool:
    """Returns whether a function computes each entry from the same entry of its input.

    Custom functions are judged by the graph of their operations.
    """
    if activation in ELEMENTWISE or activation in MIXING:
        return activation in ELEMENTWISE
    if isinstance(activation, keras.Layer):  # Calling it would build it, for another shape.
        return type(activation) in (layers.ELU, layers.LeakyReLU, layers.ReLU)
    try:
        inputs = keras.Input((3,))
        graph = keras.Model(inputs, activation(inputs))
    except Exception:
        return False
    return all(
        type(operation) in {*_keras_graph.ELEMENTWISE_OPERATIONS, *_OPERATORS}
        and all(
            x.shape == inputs.shape if isinstance(x, keras.KerasTensor) else _is_number(x)
            for x in keras.tree.flatten((args, kwargs))
        )
        for operation, args, kwargs, _ in _keras_graph.graph_calls(graph)
    )


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, np.number))


def apply(function: Callable[..., Any], constants: np.ndarray, dtype: str) -> np.ndarray:
    """Applies an element-wise function of tensors to constants, in the given dtype."""
    if isinstance(function, keras.Layer):
        function = function.call  # `__call__` would leave a record of it.
    result = np.full(len(constants), VARIES)
    known = ~np.isnan(constants)
    if known.any():
        values = function(keras.ops.convert_to_tensor(constants[known], dtype=dtype))
        result[known] = keras.ops.convert_to_numpy(values).astype("float64")
    result[~np.isfinite(result)] = VARIES  # An overflow is not a constant.
    return result


def border(flow: Flow, layer: Any) -> str:
    """Returns the reason why a value is not constant at the border of a convolution."""
    return f"a non-zero constant enters the zero padding of '{flow.names[id(layer)]}'"


def pads(layer: Any) -> bool:
    """Returns True if a convolution adds zeros around its input."""
    return layer.padding != "valid" and math.prod(layer.kernel_size) > 1


# --- Layers that pass channels on, with weights of their own --------------------------------------


@rule(layers.DepthwiseConv1D, layers.DepthwiseConv2D)
def _depthwise_convolution(flow: Flow, call: Call) -> Channels:
    source, kernel = flow.channels(call, call.axis), array(call.operation.kernel)
    return depthwise(flow, call, source, kernel)


def depthwise(
    flow: Flow, call: Call, source: Channels, kernel: np.ndarray, *, grouped: bool = False
) -> Channels:
    """Follows a convolution in which each output channel reads a single input channel.

    Args:
        flow: The analysis.
        call: The call of the layer.
        source: Channels of the layer's input.
        kernel: The kernel, with the output channels along its last axis if `grouped`, otherwise
            along its last two axes: (inputs, multiplier).
        grouped: Whether the layer is a plain convolution with as many groups as inputs.
    """
    layer = call.operation
    if layer.activation is not None and not is_elementwise(layer.activation):
        raise CannotFollow(CUSTOM_ACTIVATION)
    kernel = kernel.reshape(-1, kernel.shape[-2] * kernel.shape[-1])  # (taps, outputs)
    multiplier = kernel.shape[-1] // len(source.slots)
    reads, value = (kernel != 0).any(axis=0), source.constants.repeat(multiplier)
    slots = source.slots.repeat(multiplier)
    lost = reads & (value != 0) & ~np.isnan(value) & pads(layer)
    flow.lose(slots[lost], border(flow, layer))
    value[lost] = VARIES
    value = np.where(reads, value * kernel.sum(axis=0, dtype="float64"), 0.0)
    if layer.bias is not None:
        value += array(layer.bias)
    activation = layer.activation or keras.activations.linear
    target = Channels(source.axis, slots, apply(activation, value, call.output.dtype))
    widths: dict[tuple[str | int, ...], Channels] = {}
    if grouped:
        widths = {("groups",): source, ("filters",): target}
    weights = {"kernel": {-1: target} if grouped else {-2: source}, "bias": {0: target}}
    places = positions(call.output, source.axis)
    flow.edit(call, Edit(weights, widths=widths, positions=places))
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
    axis = source.axis - 1  # `alpha` has no batch axis.
    if alpha.shape[axis] == len(source.slots):
        flow.edit(call, Edit({"alpha": {axis: source}}))
    elsewhere = tuple(i for i in range(alpha.ndim) if i != axis)
    low, high = alpha.min(elsewhere), alpha.max(elsewhere)
    slope = np.where(low == high, low, VARIES)
    return source.with_constants(
        np.where(source.constants < 0, source.constants * slope, source.constants)
    )


# --- Layers that pass channels on and have no weights ---------------------------------------------


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
    source, shape = flow.tensors[id(call.inputs[0])], getattr(call.operation, "noise_shape", None)
    if source.axis is not None and shape is not None and shape[source.axis] not in (None, 1):
        raise CannotFollow("its `noise_shape` names the number of channels")
    return source


@rule(layers.ELU, layers.LeakyReLU, layers.ReLU, *_keras_graph.ELEMENTWISE_OPERATIONS)
def _elementwise(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    # Not `__call__`, which would add activity regularization losses to the user's model.
    return source.with_constants(apply(call.operation.call, source.constants, call.output.dtype))


@rule(layers.Activation)
def _activation(flow: Flow, call: Call) -> Channels:
    if is_elementwise(call.operation.activation):
        return _elementwise(flow, call)
    if call.operation.activation in MIXING:
        return _reads_all(flow, call)
    raise CannotFollow(CUSTOM_ACTIVATION)


@rule(layers.Softmax)
def _reads_all(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    flow.pin(source, f"'{flow.names[id(call.operation)]}' reads all channels")
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
    # A window of equal values has that value as its mean and maximum, since padding is not counted.
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
    flow.lose(source.slots[lost], border(flow, call.operation))
    return source.with_constants(np.where(lost, VARIES, source.constants))


@rule(layers.Flatten)
def _flatten(flow: Flow, call: Call) -> Channels:
    source, shape = flow.tensors[id(call.inputs[0])], call.inputs[0].shape[1:]
    if source.axis is None:
        return source
    if None in shape:
        raise CannotFollow("the number of positions is unknown")
    return _flattened(source, shape, channels_first=call.axis == 1)


def _flattened(
    source: Channels, shape: tuple[int, ...], *, channels_first: bool = False
) -> Channels:
    """Returns the channels of a flattened tensor, each repeated for each of its positions.

    Args:
        source: Channels of the tensor.
        shape: Shape of the tensor, without the batch axis.
        channels_first: If True, the axis after the batch axis is moved to the end before
            flattening.
    """

    def spread(values: np.ndarray) -> np.ndarray:
        along = np.expand_dims(values, [i for i in range(len(shape)) if i + 1 != source.axis])
        grid = np.broadcast_to(along, shape)
        return np.moveaxis(grid, 0, -1).ravel() if channels_first else grid.ravel()

    return Channels(1, spread(source.slots), spread(source.constants))


@rule(layers.Reshape)
def _reshape(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    before, after = call.inputs[0].shape[1:], call.output.shape[1:]
    if source.axis is None:
        return source
    if None in before or None in after:
        raise CannotFollow("the number of positions is unknown")
    if len(after) == 1:
        target = _flattened(source, before)
        flow.edit(call, Edit({}, widths={("target_shape", 0): target}))
        return target
    ahead = math.prod(before[: source.axis - 1])
    for axis, size in enumerate(after):
        if size == len(source.slots) and math.prod(after[:axis]) == ahead:
            flow.edit(call, Edit({}, widths={("target_shape", axis): source}))
            return source.with_constants(source.constants, axis + 1)
    raise CannotFollow("it splits channels")


@rule(_keras_graph.GET_ITEM)
def _get_item(flow: Flow, call: Call) -> Channels:
    source, key = flow.tensors[id(call.inputs[0])], call.args[1]
    if source.axis is None:
        return source
    items = list(key) if isinstance(key, (tuple, list)) else [key]
    if not all(isinstance(x, (int, slice)) or x in (None, Ellipsis) for x in items):
        raise CannotFollow("it selects entries by an array")
    rank, own = len(call.inputs[0].shape), sum(x not in (None, Ellipsis) for x in items)
    where = items.index(Ellipsis) if Ellipsis in items else len(items)
    items[where : where + 1] = [slice(None)] * (rank - own)
    before = axis = 0  # of the input, of the output
    for item in items:
        if before == source.axis and item is not None:
            if item in (0, -1) and (source.constants == source.constants[0]).all():
                return WHOLE  # Any channel would do: all are the same constant, and not NaN.
            if item != slice(None):
                raise CannotFollow("it selects some of the channels")
            break
        before += item is not None
        axis += not isinstance(item, int)
    return source.with_constants(source.constants, axis)


@rule(_keras_graph.ONES_LIKE)
def _ones_like(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    return source.with_constants(np.ones(len(source.slots)))


@rule(layers.Permute)
def _permute(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    if source.axis is None:
        return source
    return source.with_constants(source.constants, call.operation.dims.index(source.axis) + 1)


@rule(layers.RepeatVector)
def _repeat_vector(flow: Flow, call: Call) -> Channels:
    source = flow.tensors[id(call.inputs[0])]
    return source if source.axis is None else source.with_constants(source.constants, 2)


@rule(layers.Rescaling)
def _rescaling(flow: Flow, call: Call) -> Channels:
    if np.size(call.operation.scale) > 1 or np.size(call.operation.offset) > 1:
        return _only_whole(flow, call)
    return _elementwise(flow, call)


@rule(layers.Normalization)
def _only_whole(flow: Flow, call: Call) -> Channels:
    """Follows only inputs that are left whole, such as the inputs of the model."""
    if any(flow.tensors[id(x)].axis is not None for x in call.inputs):
        raise CannotFollow("it has separate values for each channel")
    return WHOLE


# --- Merges ---------------------------------------------------------------------------------------


@rule(layers.Concatenate, _keras_graph.CONCATENATE)
def _concatenate(flow: Flow, call: Call) -> Channels:
    rank = len(call.output.shape)
    axis = call.operation.axis % rank
    axes = {flow.tensors[id(x)].axis for x in call.inputs} - {None}
    if len(axes) > 1:
        raise CannotFollow("its inputs have channels along different axes")
    along = next((each for each in axes if each is not None), axis)
    parts = [flow.channels(call, along, index) for index in range(len(call.inputs))]
    if along == axis:
        slots, constants = ([part.slots for part in parts], [part.constants for part in parts])
        return Channels(axis, np.concatenate(slots), np.concatenate(constants))
    first, *others = parts  # All have the same channels, at other positions.
    for other in others:
        flow.join(first.slots, other.slots)
    same = np.all([other.constants == first.constants for other in others], axis=0)
    return first.with_constants(np.where(same, first.constants, VARIES))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where((a == 0) | (b == 0), 0.0, a * b)


def _merge(function: Callable[[list[np.ndarray]], np.ndarray]) -> Rule:
    """Returns the rule of an element-wise merge, given the function that merges constants."""

    def merge(flow: Flow, call: Call) -> Channels:
        axes = [flow.tensors[id(x)].axis for x in call.inputs]
        axis = next((axis for axis in axes if axis is not None), None)
        if axis is None:
            return WHOLE
        if len(call.inputs) == 1:
            return _with_number(flow, call)
        sizes = [x.shape[axis] for x in call.inputs if len(x.shape) > axis]
        if None in sizes:
            raise CannotFollow("the number of its input channels is unknown")
        if len({len(x.shape) for x in call.inputs}) > 1 or len({*sizes, 1}) > 2:
            raise CannotFollow("it broadcasts channels")
        width = max(sizes)
        parts = [flow.channels(call, axis, index) for index in range(len(call.inputs))]
        first, *others = (part for part in parts if len(part.slots) == width)
        for single in (part for part in parts if len(part.slots) < width):
            flow.pin(single, f"'{flow.names[id(call.operation)]}' broadcasts it to all channels")
        for other in others:
            flow.join(first.slots, other.slots)
        values = [np.broadcast_to(part.constants, width) for part in parts]
        return first.with_constants(function(values))

    return merge


def _with_number(flow: Flow, call: Call) -> Channels:
    """Follows an operator between a tensor and numbers, such as `x / 6`."""
    tensor = call.inputs[0]
    # The shape comes first: NumPy does not know the size of a tensor of torch.
    shapes = [getattr(x, "shape", None) or np.shape(x) for x in call.args if x is not tensor]
    if any(math.prod(shape) > 1 for shape in shapes):
        raise CannotFollow("one of its operands is an array")

    def compute(constants: Any) -> Any:
        return call.operation.call(*(constants if x is tensor else x for x in call.args))

    source = flow.tensors[id(tensor)]
    return source.with_constants(apply(compute, source.constants, call.output.dtype))


rule(layers.Add, _keras_graph.ADD)(_merge(lambda values: reduce(np.add, values)))
rule(layers.Subtract, _keras_graph.SUBTRACT)(_merge(lambda values: reduce(np.subtract, values)))
rule(layers.Multiply, _keras_graph.MULTIPLY)(_merge(lambda values: reduce(_product, values)))
rule(layers.Maximum, _keras_graph.MAXIMUM)(_merge(lambda values: reduce(np.maximum, values)))
rule(layers.Minimum, _keras_graph.MINIMUM)(_merge(lambda values: reduce(np.minimum, values)))
rule(layers.Average)(_merge(lambda values: np.mean(values, axis=0)))
rule(_keras_graph.DIVIDE)(_merge(lambda values: np.full_like(values[0], VARIES)))

# Operations whose rule checks all arguments of the call, not only its tensors.
WITH_ARGUMENTS: set[type | str] = {
    layers.GroupQueryAttention,
    layers.MultiHeadAttention,
    layers.ReversibleEmbedding,
    "keras_hub.ReversibleEmbedding",
    _keras_graph.GET_ITEM,
    *_OPERATORS,
}

# Layers whose rule follows each of several calls.
CALLED_AGAIN: set[type | str] = {
    layers.Embedding,
    layers.ReversibleEmbedding,
    "keras_hub.ReversibleEmbedding",
}

# Layers whose inputs may carry a Keras mask: masked positions have the same channels as others.
MASKED_POSITIONS = {
    layers.Activation,
    layers.BatchNormalization,
    layers.Bidirectional,
    layers.Dense,
    layers.Dropout,
    layers.EinsumDense,
    layers.GRU,
    layers.GlobalAveragePooling1D,
    layers.GroupQueryAttention,
    layers.LSTM,
    layers.MultiHeadAttention,
    layers.ReLU,
    layers.ReversibleEmbedding,
    layers.SimpleRNN,
    layers.SpatialDropout1D,
}
