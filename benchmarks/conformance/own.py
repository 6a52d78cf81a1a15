"""Models of a few layers that each show one way in which Keras models are made.

Those that `tf_keras` can make, too, are marked: peers for Keras 2 are then asked about the same.
"""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers

from benchmarks.conformance.makers import SEED, Maker

FAMILY = "Layers and kinds of models"
MAKERS: list[Maker] = []


def row(name: str, legacy: bool = True, **options: Any) -> Callable[[Callable[[], Any]], Any]:
    """Adds a function that makes a model to the table."""

    def add(make: Callable[[], Any]) -> Callable[[], Any]:
        MAKERS.append(Maker(name, FAMILY, make, legacy=legacy, **options))
        return make

    return add


def stack(shape: tuple[int | None, ...], *parts: Any) -> Any:
    return keras.Sequential([layers.Input(shape), *parts])


def images(*parts: Any) -> Any:
    return stack((8, 8, 3), *parts, layers.GlobalAveragePooling2D(), layers.Dense(3))


def floats(*shape: int) -> np.ndarray:
    return np.random.default_rng(SEED).uniform(-1, 1, shape).astype("float32")


@row("Dense")
def dense():
    return stack((8,), layers.Dense(12, "relu"), layers.Dense(3))


@row("Conv1D, Conv1DTranspose")
def one_dimension():
    transposed = layers.Conv1DTranspose(6, 3, 2)
    return stack((8, 3), layers.Conv1D(8, 3), transposed, layers.Flatten(), layers.Dense(3))


@row("Conv2D, BatchNormalization, MaxPooling2D")
def two_dimensions():
    first = [layers.Conv2D(8, 3, use_bias=False), layers.BatchNormalization(), layers.ReLU()]
    return images(*first, layers.MaxPooling2D(), layers.Conv2D(6, 2))


@row("Conv3D, Conv3DTranspose")
def three_dimensions():
    last = [layers.Flatten(), layers.Dense(3)]
    return stack((4, 4, 4, 2), layers.Conv3D(4, 2), layers.Conv3DTranspose(3, 2), *last)


@row("Conv2DTranspose")
def transposed():
    return images(layers.Conv2DTranspose(6, 3, 2), layers.Conv2D(4, 3))


@row("DepthwiseConv2D, SeparableConv2D")
def depthwise():
    return images(layers.DepthwiseConv2D(3), layers.SeparableConv2D(8, 3), layers.Conv2D(4, 1))


@row("DepthwiseConv1D, SeparableConv1D")
def depthwise_in_one_dimension():
    first = [layers.DepthwiseConv1D(3), layers.SeparableConv1D(8, 3)]
    return stack((8, 3), *first, layers.GlobalAveragePooling1D(), layers.Dense(3))


@row("Conv2D in groups, dilated")
def grouped():
    dilated = layers.Conv2D(8, 3, dilation_rate=2)
    return images(layers.Conv2D(6, 3), layers.Conv2D(8, 1, groups=2), dilated)


@row("Embedding, LSTM")
def lstm():
    return stack((6,), layers.Embedding(32, 8), layers.LSTM(6), layers.Dense(3))


@row("SimpleRNN, GRU")
def gru():
    rnn = layers.SimpleRNN(6, return_sequences=True)
    return stack((6, 4), rnn, layers.GRU(5), layers.Dense(3))


@row("Bidirectional(LSTM), TimeDistributed")
def bidirectional():
    both = layers.Bidirectional(layers.LSTM(4, return_sequences=True))
    steps = layers.TimeDistributed(layers.Dense(5))
    return stack((6, 4), both, steps, layers.GlobalAveragePooling1D(), layers.Dense(3))


@row("RNN of stacked cells")
def stacked_cells():
    cells = [layers.LSTMCell(5), layers.GRUCell(4), layers.SimpleRNNCell(4)]
    return stack((6, 4), layers.RNN(cells), layers.Dense(3))


@row("stateful LSTM")
def stateful():
    inputs = keras.Input((6, 4), batch_size=2)
    return keras.Model(inputs, layers.Dense(3)(layers.LSTM(5, stateful=True)(inputs)))


@row("ConvLSTM1D, ConvLSTM2D")
def convolutional_lstm():
    first, second = keras.Input((3, 6, 2)), keras.Input((3, 6, 6, 2))
    both = [layers.ConvLSTM1D(4, 3)(first), layers.ConvLSTM2D(4, 3)(second)]
    joined = layers.Concatenate()([layers.Flatten()(x) for x in both])
    return keras.Model([first, second], layers.Dense(3)(joined))


@row("EinsumDense")
def einsum_dense():
    split = layers.EinsumDense("abc,cde->abde", (5, 2, 4), bias_axes="de")
    joined = layers.EinsumDense("abde,def->abf", (5, 6))
    return stack((5, 8), split, joined, layers.Flatten(), layers.Dense(3))


def transformer(attend: Callable[[Any], Any]) -> Any:
    words = keras.Input((6,), dtype="int32")
    x = layers.Embedding(32, 8)(words)
    x = layers.LayerNormalization()(layers.Add()([x, attend(x)]))
    wide = layers.Dense(8)(layers.Dense(16, "gelu")(x))
    x = layers.LayerNormalization()(layers.Add()([x, wide]))
    return keras.Model(words, layers.Dense(3)(layers.GlobalAveragePooling1D()(x)))


@row("MultiHeadAttention")
def attention():
    return transformer(lambda x: layers.MultiHeadAttention(2, 4)(x, x))


@row("GroupQueryAttention", legacy=False)
def grouped_attention():
    return transformer(lambda x: layers.GroupQueryAttention(4, 4, 2)(x, x))


@row("Attention, AdditiveAttention")
def plain_attention():
    def attend(x):
        attended = layers.Attention()([x, x])
        return layers.Dense(8)(layers.Concatenate()([attended, layers.AdditiveAttention()([x, x])]))

    return transformer(attend)


@row("GroupNormalization, PReLU, SpectralNormalization", legacy=False)
def normalized():
    first = layers.SpectralNormalization(layers.Conv2D(6, 3))
    return images(first, layers.GroupNormalization(2), layers.PReLU(), layers.Conv2D(4, 3))


@row("Functional, with a residual")
def residual():
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(8, 3, padding="same", activation="relu")(inputs)
    y = layers.Conv2D(8, 3, padding="same")(layers.ReLU()(layers.BatchNormalization()(x)))
    x = layers.GlobalAveragePooling2D()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(3)(x))


@row("several inputs and outputs")
def several():
    first, second = keras.Input((8,), name="a"), keras.Input((6,), name="b")
    joined = layers.Concatenate()([layers.Dense(6, "relu")(first), layers.Dense(5)(second)])
    return keras.Model([first, second], [layers.Dense(3)(joined), layers.Dense(2)(joined)])


@row("inputs and outputs in dicts")
def in_dicts():
    inputs = {"left": keras.Input((8,), name="left"), "right": keras.Input((8,), name="right")}
    x = layers.Multiply()([layers.Dense(6)(inputs["left"]), layers.Dense(6)(inputs["right"])])
    return keras.Model(inputs, {"score": layers.Dense(1)(x), "kind": layers.Dense(3)(x)})


@row("a layer called twice")
def shared():
    first, second = keras.Input((8,)), keras.Input((8,))
    encoder = layers.Dense(6, "tanh")
    return keras.Model([first, second], layers.Dot(-1)([encoder(first), encoder(second)]))


@row("models in a model")
def nested():
    inner = keras.Sequential([layers.Input((8,)), layers.Dense(6, "relu"), layers.Dense(5)])
    x = keras.Input((5,))
    outer = keras.Model(x, layers.Dense(4)(layers.Dense(7, "relu")(x)))
    inputs = keras.Input((8,))
    return keras.Model(inputs, layers.Dense(3)(outer(inner(inputs))))


@row("Lambda and operations on tensors")
def operations():
    inputs = keras.Input((6, 4))
    x = layers.Dense(8)(inputs)
    x = x * 2.0 + 1.0
    x = layers.Lambda(lambda x: x - 1.0, name="shift")(x[:, 0])
    return keras.Model(inputs, layers.Dense(3)(x))


class OfUnits(layers.Layer):
    """A custom layer with a number of units."""

    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.utils.register_keras_serializable("conformance")
class Scaled(OfUnits):
    """A custom layer with a kernel under a common name."""

    def build(self, shape):
        self.kernel = self.add_weight(
            shape=(shape[-1], self.units), initializer="glorot_uniform", name="kernel"
        )
        self.built = True

    def call(self, x):
        return x @ self.kernel


@row("custom layer with a kernel")
def custom():
    return stack((8,), Scaled(6), layers.Dense(3))


@keras.utils.register_keras_serializable("conformance")
class Block(OfUnits):
    """A custom layer that makes other layers and calls them."""

    def __init__(self, units, **kwargs):
        super().__init__(units, **kwargs)
        self.wide = layers.Dense(2 * units, "relu")
        self.narrow = layers.Dense(units)

    def build(self, shape):
        self.wide.build(shape)
        self.narrow.build((*shape[:-1], 2 * self.units))
        self.built = True

    def call(self, x):
        return x + self.narrow(self.wide(x))


@row("custom layer of layers")
def composed():
    return stack((8,), Block(8), Block(8), layers.Dense(3))


@keras.utils.register_keras_serializable("conformance")
class Network(keras.Model):
    """A subclassed model with layers in attributes, a list and a dict."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(8, "relu")
        self.middle = [layers.Dense(6, "relu"), layers.Dense(6)]
        self.heads = {"score": layers.Dense(3)}

    def call(self, x):
        x = self.first(x)
        for layer in self.middle:
            x = layer(x)
        return self.heads["score"](x)


@row("subclassed model", inputs=lambda: floats(2, 8))
def subclassed():
    model = Network()
    model(floats(2, 8))
    return model


@row("tied embedding", legacy=False)
def tied():
    words = keras.Input((6,), dtype="int32")
    table = layers.ReversibleEmbedding(32, 8)
    x = layers.Dense(8, "relu")(table(words))
    return keras.Model(words, table(x, reverse=True))


@keras.utils.register_keras_serializable("conformance")
class Tied(layers.Layer):
    """An autoencoder whose decoder reads the kernel of its encoder."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.encoder = layers.Dense(5)

    def build(self, shape):
        self.encoder.build(shape)
        self.built = True

    def call(self, x):
        return self.encoder(x) @ keras.ops.transpose(self.encoder.kernel)


@row("tied kernel of a custom layer", legacy=False)
def tied_kernel():
    return stack((8,), Tied(), layers.Dense(3))


@row("LoRA", legacy=False)
def low_rank():
    model = stack((6,), layers.Embedding(32, 8), layers.Dense(8, "relu"), layers.Dense(3))
    for layer in model.layers[:2]:
        layer.enable_lora(2)
    for layer in model.layers[:2]:
        factor = layer.lora_kernel_b if hasattr(layer, "lora_kernel_b") else layer.lora_embeddings_b
        factor.assign(np.ones(factor.shape) * 0.1)
    return model


def three_dense() -> Any:
    return stack((8,), layers.Dense(12, "relu"), layers.Dense(8), layers.Dense(3))


def quantized(mode: str) -> Any:
    model = three_dense()
    model.quantize(mode)
    return model


@row("int8 by Keras, all layers", legacy=False)
def int8():
    return quantized("int8")


@row("int8 by Keras, one layer", legacy=False)
def int8_in_part():
    model = three_dense()
    model.layers[0].quantize("int8")
    return model


@row("float8 by Keras", legacy=False)
def float8():
    return quantized("float8")


@row("mixed precision")
def mixed():
    kind = keras.mixed_precision.Policy if not hasattr(keras, "ops") else keras.DTypePolicy
    policy = kind("mixed_bfloat16")
    first = layers.Dense(12, "relu", dtype=policy)
    return stack((8,), first, layers.Dense(8, dtype=policy), layers.Dense(3))


@row("float64")
def double():
    return stack((8,), layers.Dense(12, "relu", dtype="float64"), layers.Dense(3, dtype="float64"))


@row("regularizer, constraint, frozen layer")
def penalized():
    first = layers.Dense(12, kernel_regularizer="l2", kernel_constraint="max_norm")
    second = layers.Dense(8)
    second.trainable = False
    return stack((8,), first, layers.Dropout(0.5), second, layers.Dense(3))


def makers() -> list[Maker]:
    return list(MAKERS)
