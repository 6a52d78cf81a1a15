"""Networks of the papers: plain models with Glorot normal kernels, zero biases and logits."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from _lottery_ticket import names
from _lottery_ticket.unknown import UnknownNameError
from lottery_ticket_pruner.training import CropAndFlip

_CONV_WIDTHS = {"conv-2": (64,), "conv-4": (64, 128), "conv-6": (64, 128, 256)}
_DENSE_WIDTHS = {"lenet-300-100": (300, 100)}

_RESNET = "resnet-20"
_RESNET_WIDTHS = (16, 32, 64)
_RESNET_DECAY = 1e-4
_RESNET_AUGMENTATION = CropAndFlip()

NAMES = (*_DENSE_WIDTHS, *_CONV_WIDTHS, _RESNET)
OPTIMIZERS = ("adam", "sgd")
# Learning rate of Frankle & Carbin's recipe for fully connected networks.
LEARNING_RATE = 1.2e-3
# Endings of model files.
FILES = names.MODEL_FILES


def build(
    name: str,
    input_shape: Sequence[int],
    classes: int = 10,
    *,
    mean: Sequence[float] = (0.0,),
    variance: Sequence[float] = (1.0,),
) -> keras.Model:
    """Builds a network for images of a given shape. Its outputs are logits.

    `lenet-300-100` is fully connected. The convolutional networks `conv-2`, `conv-4` and `conv-6`
    have one, two and three pairs of 3 x 3 convolutions with 64, 128 and 256 filters, each pair
    followed by 2 x 2 max pooling, and then fully connected layers of 256, 256 and `classes` units
    (Frankle & Carbin, arXiv 1803.03635, figure 2). The residual network `resnet-20` has three
    stages of three blocks with widths 16, 32 and 64, He normal kernels and a weight decay of 1e-4
    (He et al., arXiv 1512.03385, section 4.2, with projections where the width changes).

    Layers are called `conv_1`, ..., `fc_1`, ... and `output`; rates per layer use these names.
    Weights depend on the global seed of Keras: call `keras.utils.set_random_seed` first.

    Args:
        name: One of `NAMES`.
        input_shape: Shape of one image, channels last.
        classes: Number of outputs.
        mean: Mean of each channel of the images, which `resnet-20` uses to normalize them.
        variance: Variance of each channel of the images, for the same purpose.

    Raises:
        ValueError: If the name is unknown, or the images are not suitable for the network.
    """
    if name not in NAMES:
        raise UnknownNameError("network", name, NAMES)
    if has_convolutions(name) and (len(input_shape) != 3 or min(input_shape[:2]) < 8):
        raise ValueError(
            f"{name} needs images of at least 8 x 8 with channels; received {tuple(input_shape)}."
        )
    if name == _RESNET:
        return _resnet(input_shape, classes, mean, variance)
    layers: list[keras.Layer] = [keras.Input(tuple(input_shape))]
    convolution = _numbered("conv", keras.layers.Conv2D, kernel_size=3, padding="same")
    dense = _numbered("fc", keras.layers.Dense)
    for number, width in enumerate(_CONV_WIDTHS.get(name, ()), 1):
        pool = keras.layers.MaxPooling2D(name=f"pool_{number}")
        layers += [convolution(width), convolution(width), pool]
    layers.append(keras.layers.Flatten(name="flatten"))
    layers += [dense(width) for width in _DENSE_WIDTHS.get(name, (256, 256))]
    layers.append(
        keras.layers.Dense(classes, kernel_initializer="glorot_normal", name="output"),
    )
    return keras.Sequential(layers, name=name.replace("-", "_"))


def is_own(name: str) -> bool:
    """Returns True for a name that gives the location of a function or of a model file."""
    return name not in NAMES and (":" in name or Path(name).suffix in FILES)


def has_convolutions(name: str) -> bool:
    """Returns True if the network is one of `NAMES` that have convolutions."""
    return name not in _DENSE_WIDTHS and not is_own(name)


def augmentation(name: str) -> CropAndFlip | None:
    """Returns the augmentation of the network's recipe, or None."""
    return _RESNET_AUGMENTATION if name == _RESNET else None


def optimizer(name: str, learning_rate: float, steps: int) -> keras.Optimizer:
    """Returns Adam at a constant rate, or SGD with momentum 0.9 and a decreasing rate.

    Args:
        name: One of `OPTIMIZERS`.
        learning_rate: Learning rate of the first half of the steps.
        steps: Number of steps of the whole training. The rate of SGD is divided by ten after half
            and after three quarters of them.
    """
    if name == "adam":
        return keras.optimizers.Adam(learning_rate)
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay(
        [steps // 2, 3 * steps // 4], [learning_rate * factor for factor in (1.0, 0.1, 0.01)]
    )
    return keras.optimizers.SGD(schedule, momentum=0.9)


def _resnet(
    input_shape: Sequence[int], classes: int, mean: Sequence[float], variance: Sequence[float]
) -> keras.Model:
    numbers = iter(range(1, 100))

    def convolution(x: keras.KerasTensor, width: int, size: int, strides: int) -> keras.KerasTensor:
        number = next(numbers)
        x = keras.layers.Conv2D(
            width,
            size,
            strides,
            padding="same",
            use_bias=False,
            kernel_initializer="he_normal",
            # Its gradient is the decay times the weight.
            kernel_regularizer=keras.regularizers.L2(_RESNET_DECAY / 2),
            name=f"conv_{number}",
        )(x)
        return keras.layers.BatchNormalization(name=f"norm_{number}")(x)

    x = inputs = keras.Input(tuple(input_shape))
    x = keras.layers.Normalization(mean=list(mean), variance=list(variance), name="normalize")(x)
    x = keras.layers.ReLU()(convolution(x, _RESNET_WIDTHS[0], 3, 1))
    for stage, width in enumerate(_RESNET_WIDTHS):
        for block in range(3):
            strides = 2 if stage and not block else 1
            shortcut = convolution(x, width, 1, strides) if strides > 1 else x
            y = keras.layers.ReLU()(convolution(x, width, 3, strides))
            y = convolution(y, width, 3, 1)
            x = keras.layers.ReLU()(keras.layers.Add()([shortcut, y]))
    x = keras.layers.GlobalAveragePooling2D()(x)
    outputs = keras.layers.Dense(
        classes,
        kernel_initializer="he_normal",
        kernel_regularizer=keras.regularizers.L2(_RESNET_DECAY / 2),
        name="output",
    )(x)
    return keras.Model(inputs, outputs, name="resnet_20")


def _numbered(stem: str, layer: type[keras.Layer], **kwargs: Any) -> Callable[[int], keras.Layer]:
    """Returns a function that creates hidden layers named stem_1, stem_2, ..."""
    made = 0

    def make(width: int) -> keras.Layer:
        nonlocal made
        made += 1
        return layer(
            width,
            activation="relu",
            kernel_initializer="glorot_normal",
            name=f"{stem}_{made}",
            **kwargs,
        )

    return make
