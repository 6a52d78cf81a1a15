"""Finds the weights that a training of a masked model can change, if they are all that matters.

A unit that no kept weight reads gets no gradient, and neither do the weights that lead to it; an
input that no kept weight reads does not matter. A training without them is the same training.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import types
from collections.abc import Sequence

import keras
import numpy as np

from lottery_ticket_pruner import _keras
from masked_layers.maskable import mask_of
from masked_layers.paths import plain_class

# Without `exponential`: an infinite output makes the loss NaN although nothing reads it.
_ELEMENTWISE = tuple(
    getattr(keras.activations, name)
    for name in (
        *("celu", "elu", "gelu", "hard_sigmoid", "hard_silu", "hard_tanh"),
        *("leaky_relu", "linear", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus"),
        *("softsign", "tanh"),
    )
)
_ELEMENTWISE_LAYERS = (keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU)
# Their updates are elementwise, and leave a weight as it is while gradient and slots are zero.
_OPTIMIZERS = (
    keras.optimizers.SGD,
    keras.optimizers.RMSprop,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Lion,
)


class NotReducibleError(Exception):
    """The reason why a training needs all weights of a model."""


@dataclasses.dataclass(frozen=True, eq=False)
class KeptKernel:
    """The kept weights of a Dense layer, between inputs and units that matter.

    Attributes:
        layer: The layer.
        inputs: Indices of the inputs that kept weights read.
        units: Indices of the units that later kept weights read.
        mask: Bool array of shape `(inputs, units)`, True where a weight is kept.
        first: Whether it is the first such layer, whose inputs need no gradient.
    """

    layer: keras.layers.Dense
    inputs: np.ndarray
    units: np.ndarray
    mask: np.ndarray
    first: bool

    @functools.cached_property
    def rows(self) -> np.ndarray:
        """Positions in `inputs` of the kept weights, which are sorted by unit."""
        return np.nonzero(self.mask.T)[1]

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """Positions in `units` of the kept weights."""
        return np.nonzero(self.mask.T)[0]

    @functools.cached_property
    def size(self) -> int:
        """Number of kept weights."""
        return int(np.count_nonzero(self.mask))

    @property
    def index(self) -> tuple[np.ndarray, np.ndarray]:
        """Positions of the kept weights in the whole kernel."""
        return self.inputs[self.rows], self.units[self.columns]

    @functools.cached_property
    def slots(self) -> int:
        """Number of products that a gathered training step computes for one example."""
        slots = self.size + len(self.units) * int(np.count_nonzero(self.mask, axis=0).max())
        if not self.first:
            slots += len(self.inputs) * int(np.count_nonzero(self.mask, axis=1).max())
        return slots

    @property
    def entries(self) -> int:
        """Number of entries of the matrix of these inputs and units."""
        return len(self.inputs) * len(self.units)

    @property
    def products(self) -> int:
        """Number of products with a matrix in a training step."""
        return 2 if self.first else 3


def kernel_masks(layers: Sequence[keras.layers.Layer]) -> list[np.ndarray]:
    """Returns the masks of the kernels of Dense layers, True where a weight is kept."""
    masks = []
    for layer in dense_layers(layers):
        mask = mask_of(layer, "kernel")
        if mask is None:
            masks.append(np.ones(layer.kernel.shape, "bool"))
        else:
            masks.append(mask.to_numpy())
    return masks


def kept_kernels(
    layers: Sequence[keras.layers.Layer], masks: Sequence[np.ndarray]
) -> list[KeptKernel]:
    """Returns the kept weights of consecutive Dense layers, from the last layer backwards.

    Raises:
        NotReducibleError: If a layer has no kept weight that matters.
    """
    kernels: list[KeptKernel] = []
    units = np.arange(masks[-1].shape[1])
    for layer, mask in zip(reversed(dense_layers(layers)), reversed(masks), strict=True):
        inputs = np.flatnonzero(mask[:, units].any(axis=1))
        if not len(inputs):
            raise NotReducibleError(f"'{layer.name}' has no kept weight that the output depends on")
        first = len(kernels) == len(masks) - 1
        kernels.append(KeptKernel(layer, inputs, units, mask[np.ix_(inputs, units)], first))
        units = inputs
    return kernels[::-1]


def dense_layers(layers: Sequence[keras.layers.Layer]) -> list[keras.layers.Dense]:
    """Returns the Dense layers among these."""
    return [layer for layer in layers if plain_class(layer) is keras.layers.Dense]


def chain(model: keras.Model) -> list[keras.layers.Layer]:
    """Returns the layers of a model that can be trained with its kept weights alone.

    Raises:
        NotReducibleError: If it is not a chain of Dense layers and elementwise activations, or if
            its training changes pruned weights or depends on them.
    """
    layers = _in_order(model)
    dense = [number for number, layer in enumerate(layers) if dense_layers([layer])]
    if not any(mask_of(layers[number], "kernel") is not None for number in dense):
        raise NotReducibleError("it has no Dense layer with a mask")
    for number, layer in enumerate(layers):
        if number in dense:
            _check_dense(layer, last=number == dense[-1])
        elif not _passes_units(layer, before=number < dense[0], after=number > dense[-1]):
            raise NotReducibleError(
                f"'{layer.name}' ({plain_class(layer).__name__}) is not known to leave out a unit "
                "without an effect on others"
            )
    for part in (model, *layers):
        if names := own_methods(part):
            raise NotReducibleError(f"'{part.name}' has its own {names[0]}")
    if custom := custom_parts([*_keras.compile_arguments(model), model.optimizer]):
        # A loss or metric may read the weights of the model.
        raise NotReducibleError(f"it is compiled with {custom[0]}, which is not part of Keras")
    if sum(len(layers[number].trainable_variables) for number in dense) != len(model.weights):
        raise NotReducibleError("it has other variables than those of its Dense layers")
    _check_optimizer(model)
    return layers


def _in_order(model: keras.Model) -> list[keras.layers.Layer]:
    sequential = isinstance(model, keras.Sequential)
    if not type(model).__module__.startswith("keras.") or not (
        sequential or _keras.is_functional(model)
    ):
        raise NotReducibleError(f"{type(model).__name__} is not a Sequential or Functional model")
    layers = [layer for layer in model.layers if not isinstance(layer, keras.layers.InputLayer)]
    try:
        ends = [*model.inputs, *model.outputs]
        linked = sequential or (
            all(b.input is a.output for a, b in itertools.pairwise(layers))
            and len(ends) == 2
            and layers[0].input is ends[0] is model.input
            and layers[-1].output is ends[1] is model.output
        )
    except (AttributeError, IndexError, ValueError):  # Several calls of a layer, or none.
        linked = False
    if not linked:
        raise NotReducibleError("its layers are not a chain")
    return layers


def own_methods(owner: object) -> list[str]:
    """Returns the names of methods that were replaced in this object alone."""
    return [
        name
        for name, value in vars(owner).items()
        # Keras and masked layers wrap the first two, and `loss` is an argument of `compile`.
        if name not in ("build", "quantize", "loss")
        and callable(value)
        and hasattr(type(owner), name)
        and not _of_keras(value)
    ]


def custom_parts(value: object) -> list[str]:
    """Returns what is not part of Keras in the arguments of `compile`, and in objects there."""
    if value is None or isinstance(value, str | int | float):
        return []
    if isinstance(value, dict | list | tuple):
        parts = value.values() if isinstance(value, dict) else value
        return [name for part in parts for name in custom_parts(part)]
    if not _of_keras(value):
        return [getattr(value, "__name__", type(value).__name__)]
    if isinstance(value, types.FunctionType | type):
        return []
    held = [each for each in vars(value).values() if callable(each)]
    return [name for each in held for name in custom_parts(each)]


def _of_keras(value: object) -> bool:
    if isinstance(value, types.MethodType):
        value = value.__func__
    named = value if isinstance(value, types.FunctionType | type) else type(value)
    package = (named.__module__ or "").partition(".")[0]
    return package in ("keras", "masked_layers", "lottery_ticket_pruner")


def _passes_units(layer: keras.layers.Layer, *, before: bool, after: bool) -> bool:
    cls = plain_class(layer)
    if (
        own_methods(layer)
        or layer.activity_regularizer is not None
        or layer.dtype_policy.name != "float32"
    ):
        return False
    if cls in (keras.layers.Flatten, keras.layers.Reshape, keras.layers.Rescaling):
        return before
    if cls is keras.layers.Activation:
        return layer.activation in _ELEMENTWISE or (after and _of_keras(layer.activation))
    return cls in _ELEMENTWISE_LAYERS or (after and cls is keras.layers.Softmax)


def _check_dense(layer: keras.layers.Dense, *, last: bool) -> None:
    mask = mask_of(layer, "kernel")
    reasons = {
        "is not built": not layer.built,
        "does not compute in float32": layer.dtype_policy.name != "float32",
        "is quantized or has LoRA weights": bool(
            getattr(layer, "quantization_mode", None) or getattr(layer, "lora_enabled", False)
        ),
        "has frozen variables": len(layer.trainable_variables) != 1 + layer.use_bias,
        "has a learned mask": mask is not None and mask.learned,
        "has a mask over its bias": mask_of(layer, "bias") is not None,
        "has a rescaled mask": mask is not None and mask.rescale,
        "has rounded weights": mask is not None and mask.quantization is not None,
        "has pruned weights that are not zero": mask is not None and mask.frozen is not None,
        "has a regularizer or constraint": any(
            each is not None
            for each in (
                *(layer.kernel_regularizer, layer.bias_regularizer, layer.activity_regularizer),
                *(layer.kernel_constraint, layer.bias_constraint),
            )
        ),
        "has an activation that is not known to be elementwise": not last
        and layer.activation not in _ELEMENTWISE,
        "has an activation that is not a function of Keras": not _of_keras(layer.activation),
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotReducibleError(f"'{layer.name}' {reason}")


def _check_optimizer(model: keras.Model) -> None:
    optimizer = model.optimizer
    # On torch, the classes of optimizers are subclasses of the public ones, without public names.
    public = vars(keras.optimizers).values()
    known = next((base for base in type(optimizer).__mro__ if base in public), None)
    if not _of_keras(optimizer) or known not in _OPTIMIZERS:
        raise NotReducibleError(
            f"{type(optimizer).__name__} is not known to leave pruned weights as they are"
        )
    reasons = {
        "updates of pruned weights are 0 / 0 with epsilon=0": getattr(optimizer, "epsilon", 1) == 0,
        "weight decay changes pruned weights": optimizer.weight_decay,
        "moving averages (use_ema) are kept of pruned weights": optimizer.use_ema,
        "gradients are accumulated": optimizer.gradient_accumulation_steps,
    }
    for reason, holds in reasons.items():
        if holds:
            raise NotReducibleError(reason)
    trained = map(id, model.trainable_variables)
    if optimizer.built and list(trained) != list(map(id, _keras.optimized_variables(optimizer))):
        raise NotReducibleError("the optimizer was built for other variables")
