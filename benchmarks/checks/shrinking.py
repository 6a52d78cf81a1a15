"""Shrinks many models after pruning channels, and compares them with the masked models.

    python -m benchmarks.checks.shrinking [--nets 46] [--applications MobileNetV2 ...]

Two kinds of models: small ones of `keras.applications`, and nets of random blocks (convolutions of
all kinds, gates, recurrent layers, attention, transformer blocks, nested models, layers and models
that are called twice). Weights are
random, with biases, shifts, scales and statistics as they may be after training. Each model loses a
random share of its channels, within layers or globally, of widths or heads. For each it prints the
share of weights that is left and the largest difference of outputs between the smaller and the
masked model, relative to the largest output. Exits with 1 if one differs by more than 1e-5, or if a
pruned channel is not removed.
"""

import argparse
import sys

import keras
import numpy as np
from keras import layers

import masked_layers as ml
from benchmarks.checks.conversion import randomized
from benchmarks.shrinking import compiled
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.structures import Channels

APPLICATIONS = (
    "ConvNeXtTiny",
    "DenseNet121",
    "EfficientNetB0",
    "EfficientNetV2B0",
    "InceptionResNetV2",
    "InceptionV3",
    "MobileNet",
    "MobileNetV2",
    "MobileNetV3Small",
    "NASNetMobile",
    "ResNet50",
    "ResNet50V2",
    "VGG16",
    "Xception",
)
TOLERANCE = 1e-5


class Block(layers.Layer):
    """A transformer block, whose inner layers are found through its `call`."""

    def __init__(self, heads, width, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width = heads, width
        self.normalize = [layers.LayerNormalization() for _ in range(2)]

    def build(self, shape):
        self.attend = layers.MultiHeadAttention(self.heads, shape[-1] // self.heads, dropout=0.1)
        self.attend.build(shape, shape)
        self.widen = layers.Dense(self.width, "gelu")
        self.widen.build(shape)
        self.narrow = layers.Dense(shape[-1])
        self.narrow.build((*shape[:-1], self.width))
        for layer in self.normalize:
            layer.build(shape)

    def call(self, x):
        y = self.normalize[0](x)
        x = x + self.attend(y, y)
        return x + self.narrow(self.widen(self.normalize[1](x)))

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "width": self.width}


def picture_net(rng):
    """Returns a net of two to five random blocks on pictures."""
    x = keras.Input((12, 12, 3))
    y = layers.Conv2D(8, 3, padding="same", use_bias=False)(x)
    for _ in range(rng.integers(2, 6)):
        channels = y.shape[-1]
        kind = rng.choice(
            [
                "plain",
                "residual",
                "branches",
                "gate",
                "groups",
                "depthwise",
                "nested",
                "again",
                "twice",
            ]
        )
        activation = str(rng.choice(["relu", "swish", "tanh"]))
        if kind == "residual":
            z = layers.Conv2D(6, 3, padding="same", activation=activation)(y)
            y = y + layers.Conv2D(channels, 3, padding="same")(z)
        elif kind == "branches":
            parts = [layers.Conv2D(4, size, padding="same")(y) for size in (1, 3)]
            y = layers.Concatenate()([y, *parts])
        elif kind == "gate":
            gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
            gate = layers.Conv2D(4, 1, activation=activation)(gate)
            y = y * layers.Conv2D(channels, 1, activation="sigmoid")(gate)
        elif kind == "groups" and channels % 2 == 0:
            y = layers.Conv2D(8, 3, groups=2, padding="same")(y)
        elif kind == "depthwise":
            y = layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2)(y)
        elif kind == "nested":
            inside = [keras.Input(y.shape[1:]), layers.SeparableConv2D(6, 3, padding="same")]
            y = keras.Sequential([*inside, layers.PReLU(shared_axes=(1, 2))])(y)
        elif kind == "again":
            again = layers.Conv2D(channels, 3, padding="same", activation=activation)
            y = y + again(again(y))
        elif kind == "twice":
            inside = [keras.Input(y.shape[1:]), layers.Conv2D(6, 1), layers.Conv2D(5, 3)]
            nested = keras.Sequential(inside)
            y = layers.Concatenate()([nested(y), nested(layers.Conv2D(channels, 1)(y))])
            y = layers.ZeroPadding2D(1)(y)
        else:
            y = layers.Conv2D(8, 3, padding="same")(y)
        y = layers.Activation(activation)(layers.BatchNormalization()(y))
    pool = rng.choice([layers.GlobalAveragePooling2D, layers.Flatten])
    return keras.Model(x, layers.Dense(3)(pool()(y)))


def sequence_net(rng):
    """Returns a net of two to four random blocks on words."""
    x = keras.Input((8,), dtype="int32")
    y = layers.Embedding(20, 8)(x)
    for _ in range(rng.integers(2, 5)):
        kind = rng.choice(
            ["lstm", "both", "conv", "einsum", "attention", "grouped", "block", "steps"]
        )
        width = y.shape[-1]
        if kind == "lstm":
            y = layers.LSTM(8, return_sequences=True)(y)
        elif kind == "both":
            y = layers.Bidirectional(layers.GRU(4, return_sequences=True))(y)
        elif kind == "conv":
            y = layers.Conv1D(8, 3, padding="causal", activation="relu")(y)
        elif kind == "einsum":
            y = layers.EinsumDense("abc,cd->abd", (8, 8), "tanh", bias_axes="d")(y)
        elif kind == "attention":
            y = y + layers.MultiHeadAttention(2, 4, dropout=0.1)(y, y)
        elif kind == "grouped":
            y = y + layers.GroupQueryAttention(4, 4, 2)(y, y, use_causal_mask=True)
        elif kind == "block":
            y = Block(2, 16)(y)
        else:
            y = y + layers.TimeDistributed(layers.Dense(width, "relu"))(y)
        if rng.integers(2):
            y = layers.RMSNormalization()(y)
    y = layers.GlobalAveragePooling1D()(y) if rng.integers(2) else y[:, 0]
    return keras.Model(x, layers.Dense(3)(y))


def trained(model, rng):
    """Gives the variables of a model random values, with outputs that differ between examples."""
    for variable in model.weights:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) > 1:
            value *= 1.4 / np.sqrt(np.prod(variable.shape[:-1]))
        elif "variance" in variable.path:
            value = 0.5 + np.abs(value)
        elif variable.name in ("gamma", "scale"):
            value = np.exp(0.3 * value)
        else:
            value *= 0.2
        variable.assign(value)
    return model


def runner(model, data):
    """Returns a function that runs a model on such data.

    On JAX as one program: otherwise every operation is compiled for every shape.
    """
    return compiled(model, data) if keras.backend.backend() == "jax" else model


def skip_random_initial_values():
    """Replaces random initial values, all of which are overwritten, by a constant.

    JAX compiles a program of its own for every shape of random numbers.
    """
    names = ("VarianceScaling", "RandomNormal", "RandomUniform", "TruncatedNormal", "Orthogonal")
    for name in names:
        getattr(keras.initializers, name).__call__ = lambda self, shape, dtype=None: (
            keras.ops.convert_to_tensor(np.full(shape, 0.5), dtype)
        )


def compared(model, rng):
    """Prunes and shrinks a model, and returns (share left, difference, pruned channels left)."""
    masked = ml.convert_to_masked(model, mask_normalization=True)
    LotteryTicketPruner(masked).update_masks(
        "random",
        sparsity=float(rng.choice([0.3, 0.5, 0.7])),
        scope=str(rng.choice(["layer", "global"])),
        structure=Channels(attention=str(rng.choice(["widths", "heads", "both"]))),
        seed=int(rng.integers(1000)),
    )
    smaller, report = ml.shrink(masked, return_report=True)
    _, again = ml.shrink(smaller, return_report=True)
    (tensor,) = model.inputs
    shape = (4, *tensor.shape[1:])
    data = rng.normal(size=shape) if tensor.dtype == "float32" else rng.integers(0, 20, shape)
    data = data.astype(tensor.dtype)
    expected, got = (keras.ops.convert_to_numpy(runner(x, data)(data)) for x in (masked, smaller))
    scale = np.abs(expected).max()
    assert expected.std() > 1e-3 * scale, "constant outputs would prove nothing"
    share = report.weights_after / report.weights_before
    return share, np.abs(got - expected).max() / scale, again.weights_before - again.weights_after


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nets", type=int, default=46)
    parser.add_argument("--applications", nargs="*", default=list(APPLICATIONS))
    arguments = parser.parse_args()
    print(f"keras {keras.__version__}, {keras.backend.backend()}")
    if keras.backend.backend() == "jax":
        skip_random_initial_values()
    differences = []
    for number in range(arguments.nets + len(arguments.applications)):
        rng = np.random.default_rng(number)
        if number < arguments.nets:
            keras.utils.set_random_seed(number)
            make = picture_net if number % 2 else sequence_net
            name, model = f"{make.__name__} {number}", trained(make(rng), rng)
        else:
            name = arguments.applications[number - arguments.nets]
            try:
                model = randomized(name)
            except ValueError as error:  # Keras has some of them not on every backend.
                print(f"{name:>20}: left out, {str(error).splitlines()[0]}")
                continue
        share, difference, left = compared(model, rng)
        differences.append(np.inf if left else difference)
        more = f", {left} weights that a second pass removes" if left else ""
        print(f"{name:>20}: {share:.3f} of the weights left, {difference:.1e}{more}", flush=True)
    print(f"{len(differences)} models, largest difference {max(differences):.1e}")
    return int(max(differences) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
