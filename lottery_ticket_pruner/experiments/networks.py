"""The papers' networks by name, built plain: Glorot normal kernels, zero biases, logits out."""

from collections.abc import Callable, Sequence

import keras

_CONV_WIDTHS = {"conv-2": (64,), "conv-4": (64, 128), "conv-6": (64, 128, 256)}
_DENSE_WIDTHS = {"lenet-300-100": (300, 100)}

NAMES = (*_DENSE_WIDTHS, *_CONV_WIDTHS)


def build(name: str, input_shape: Sequence[int], classes: int = 10) -> keras.Sequential:
    """Build a network for images of one shape; its outputs are logits.

    Fully connected: `lenet-300-100`. Convolutional: `conv-2`,
    `conv-4`, `conv-6`, with one, two, three pairs of 3 x 3 convolutions of 64, 128 and 256
    filters, each pair followed by 2 x 2 max pooling, then 256-256-classes fully connected
    (Frankle & Carbin, arXiv 1803.03635, figure 2).

    Layers are called `conv_1`..., `fc_1`... and `output`, which rates per layer refer to.
    Weights come from Keras' global seed: call `keras.utils.set_random_seed` first.

    Raises:
        ValueError: the name is unknown, or the images do not suit the network.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown network {name!r}. Expected one of: {', '.join(NAMES)}.")
    if name in _CONV_WIDTHS and (len(input_shape) != 3 or min(input_shape[:2]) < 8):
        raise ValueError(
            f"{name} needs images of at least 8 x 8 with channels; received {tuple(input_shape)}."
        )
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


def has_convolutions(name: str) -> bool:
    """Whether XLA loops over this network are slow on a CPU (see `training`)."""
    return name in _CONV_WIDTHS


def _numbered(stem: str, layer: type[keras.Layer], **kwargs) -> Callable[[int], keras.Layer]:
    """A maker of hidden layers that names them stem_1, stem_2, ..."""
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
