"""Random models: outputs stay the same, and no further unit or filter can be removed."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import layers

from masked_layers.shrinking import shrink
from shrunk import checked, numpy

BACKEND = keras.backend.backend()

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]


# Models are created inside the tests, because Keras draws the seeds of initializers from `random`,
# which Hypothesis strategies must not use.


def draw_net(draw):
    """Returns a convolutional model with zeroed filters, random statistics and non-zero biases."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    padding = st.sampled_from(["same", "same", "valid"])
    activation = st.sampled_from(["linear", "relu", "tanh", "sigmoid"])
    x = y = keras.Input((9, 9, 2))
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(
            st.sampled_from(
                [
                    "conv",
                    "conv",
                    "residual",
                    "branches",
                    "depthwise",
                    "separable",
                    "gate",
                    "pool",
                    "again",
                    "nested",
                ]
            )
        )
        channels = y.shape[-1]
        if kind == "residual":
            z = layers.Conv2D(draw(st.integers(1, 4)), 3, padding="same", activation="relu")(y)
            z = layers.Conv2D(channels, 3, padding="same", use_bias=draw(st.booleans()))(z)
            y = layers.Add()([y, layers.BatchNormalization()(z)])
        elif kind == "branches":
            a = layers.Conv2D(draw(st.integers(1, 4)), 1, activation=draw(activation))(y)
            b = layers.Conv2D(draw(st.integers(1, 4)), 3, padding="same")(y)
            y = layers.Concatenate()(draw(st.permutations([a, b, y])))
        elif kind == "gate":
            gate = layers.GlobalAveragePooling2D(keepdims=True)(y)
            y = layers.Multiply()([y, layers.Conv2D(channels, 1, activation="sigmoid")(gate)])
        elif kind == "depthwise":
            multiplier = draw(st.integers(1, 2))
            y = layers.DepthwiseConv2D(2, padding=draw(padding), depth_multiplier=multiplier)(y)
        elif kind == "separable":
            y = layers.SeparableConv2D(draw(st.integers(1, 5)), 2, padding=draw(padding))(y)
        elif kind == "again":
            again = layers.Conv2D(channels, 3, padding="same", activation=draw(activation))
            y = layers.Add()([y, again(again(y))]) if draw(st.booleans()) else again(again(y))
        elif kind == "nested":
            parts = [keras.Input(y.shape[1:]), layers.Conv2D(3, 1), layers.Conv2D(channels, 1)]
            nested = keras.Sequential(parts)
            other = layers.Conv2D(channels, 1, activation=draw(activation))(y)
            y = layers.Concatenate()([nested(y), nested(other)])
        elif kind == "pool":
            pool = draw(st.sampled_from([layers.MaxPooling2D, layers.AveragePooling2D]))
            y = pool(2, strides=1, padding=draw(padding))(y)
        else:
            size, strides = draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (3, 2), (1, 2)]))
            if min(y.shape[1:3]) < size:
                size = 1
            y = layers.Conv2D(
                draw(st.integers(1, 6)),
                size,
                strides=strides,
                padding=draw(padding),
                use_bias=draw(st.booleans()),
                activation=draw(activation),
            )(y)
        norm = draw(st.sampled_from(["", "", "batch", "batch", "groups"]))
        if norm == "batch":
            y = layers.BatchNormalization()(y)
        elif norm == "groups" and y.shape[-1] > 1:  # One group would need all of its channels.
            sizes = [n for n in range(2, y.shape[-1] + 1) if y.shape[-1] % n == 0]
            y = layers.GroupNormalization(draw(st.sampled_from(sizes)))(y)
        if draw(st.booleans()):
            y = layers.ReLU()(y)
        if min(y.shape[1:3]) < 3:
            break
    y = draw(st.sampled_from([layers.Flatten, layers.GlobalMaxPooling2D]))()(y)
    y = layers.Dense(draw(st.integers(1, 6)), draw(activation))(y)
    model = keras.Model(x, layers.Dense(2)(y))
    for variable in model.weights:
        shape = tuple(variable.shape)
        value = rng.normal(size=shape) / np.sqrt(max(1, np.prod(shape[:-1]) if shape[1:] else 4))
        for axis in (-1, -2)[: len(shape)]:  # Whole outputs, whole inputs, single entries.
            dead = rng.random(shape[axis]) < rng.choice([0, 0.3, 0.6])
            np.moveaxis(value, axis, 0)[dead] = 0
        value[rng.random(shape) < rng.choice([0, 0.3])] = 0
        if "variance" in variable.path:
            value = np.abs(value) + 0.1
        variable.assign(value)
    model.layers[-1].kernel.assign(rng.normal(size=model.layers[-1].kernel.shape))
    model.layers[-1].bias.assign([0.1, -0.1])
    return model


@settings(max_examples=12)
@given(st.data())
def test_random_nets_keep_their_outputs_and_shrink_no_further(data):
    smaller, report = checked(draw_net(data.draw))
    assert report.not_followed == {}
    _, again = shrink(smaller, return_report=True)
    assert again.weights_after == again.weights_before


@pytest.mark.skipif(BACKEND != "tensorflow", reason="computes float64 in float32 here and there")
@settings(max_examples=12)
@given(st.data())
def test_outputs_differ_only_by_rounding(data):
    keras.config.set_dtype_policy("float64")
    checked(draw_net(data.draw), tolerance=1e-12)


def draw_dense_net(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    units = draw(st.lists(st.integers(1, 6), min_size=1, max_size=4))
    activation = draw(st.sampled_from(["relu", "tanh", "sigmoid"]))
    model = keras.Sequential(
        [keras.Input((3,)), *(layers.Dense(n, activation) for n in units), layers.Dense(2)]
    )
    for variable in model.weights:
        value = rng.normal(size=variable.shape)
        if len(variable.shape) == 2:
            value[rng.random(value.shape) < rng.choice([0.2, 0.5, 0.8])] = 0
        variable.assign(value)
    return model


@settings(max_examples=12)
@given(st.data())
def test_every_dense_unit_left_is_on_a_path_from_input_to_output(data):
    model = draw_dense_net(data.draw)
    # Brute force: a unit is needed if it lies on a path of non-zero weights from an input to an
    # output. All other units are constant or unread.
    kernels = [numpy(layer.kernel) != 0 for layer in model.layers]
    reached = [np.ones(3, bool)]
    for kernel in kernels:
        reached.append((reached[-1] @ kernel).astype(bool))
    needed = [np.ones(2, bool)]
    for kernel in reversed(kernels):
        needed.append((kernel @ needed[-1]).astype(bool))
    needed = needed[::-1]
    expected = [max(1, int((r & n).sum())) for r, n in zip(reached, needed, strict=True)][1:-1]
    smaller, _ = checked(model)
    assert [layer.units for layer in smaller.layers[:-1]] == expected
