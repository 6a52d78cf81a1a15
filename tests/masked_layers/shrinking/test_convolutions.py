"""Filters of convolutions, and constants that pass through padding and layers without weights."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers.shrinking import shrink
from shrunk import checked, conv_net, numpy, randomize, row, widths, zero

BACKEND = keras.backend.backend()

pytestmark = pytest.mark.usefixtures("nothing_drawn")


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_zero_filters_are_removed_for_every_padding(padding):
    model = conv_net(layers.ReLU(), padding=padding)
    zero(model.layers[0], [1, 2], bias=True)
    smaller, report = checked(model)
    assert widths(smaller) == {"c0": 2, "c1": 3, "out": 2}
    assert row(report, "c0").constant == 2


@pytest.mark.once
def test_non_zero_constant_is_kept_if_a_convolution_pads_zeros():
    model = conv_net(padding="same")
    zero(model.layers[0], [1, 2])
    model.layers[0].bias.assign([1.0, 2.0, 0.0, 1.0])
    smaller, report = checked(model)
    assert smaller.layers[0].filters == 3  # The constant 0 is removed, the constant 2 is kept.
    assert row(report, "c0").kept == {"a non-zero constant enters the zero padding of 'c1'": 1}
    assert "1 kept: a non-zero constant enters the zero padding of 'c1'" in str(report)


@pytest.mark.once
def test_non_zero_constant_moves_through_a_valid_convolution():
    model = conv_net(padding="valid")
    zero(model.layers[0], [1, 2])
    smaller, report = checked(model)
    assert smaller.layers[0].filters == 2
    assert row(report, "c0").kept == {}


@pytest.mark.once
def test_non_zero_constant_moves_into_a_padded_convolution_of_one_tap():
    x = keras.Input((6, 6, 2))
    y = layers.Conv2D(4, 3, name="c0")(x)
    y = layers.Conv2D(3, 1, padding="same", strides=2, name="c1")(y)
    model = randomize(keras.Model(x, y))
    zero(model.layers[1], [0])
    smaller, _ = checked(model)
    assert smaller.get_layer("c0").filters == 3


@pytest.mark.once
def test_padded_convolution_that_does_not_read_a_constant_does_not_keep_it():
    model = conv_net(padding="same")
    zero(model.layers[0], [1])
    zero(model.layers[1], [1], axis=-2)
    smaller, _ = checked(model)
    assert smaller.layers[0].filters == 3


@pytest.mark.once
def test_batch_normalization_makes_the_constant():
    model = conv_net(layers.BatchNormalization(), layers.ReLU(), padding="valid")
    zero(model.layers[0], [1, 2])
    zero(model.layers[1], [0], name="gamma")  # The output of BatchNormalization is beta.
    smaller, report = checked(model)
    assert smaller.layers[0].filters == 1
    assert smaller.layers[1].moving_mean.shape == (1,)
    assert row(report, "c0").constant == 3


@pytest.mark.once
def test_batch_normalization_shifts_a_zero_filter_before_a_padded_convolution():
    norm = layers.BatchNormalization()
    model = conv_net(norm, layers.ReLU(), padding="same", bias=False, filters=(3, 3))
    zero(model.layers[0], [0, 1])
    norm.moving_mean.assign(np.zeros(3))
    norm.beta.assign([-1.0, 1.0, 1.0])
    smaller, _ = checked(model)
    assert smaller.layers[0].filters == 2  # relu(-1) = 0 is removed, relu(1) = 1 is kept.


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_depthwise_convolution_follows_its_input(padding, multiplier):
    x = keras.Input((7, 7, 2))
    y = layers.Conv2D(4, 3, activation="relu", name="c0")(x)
    y = layers.DepthwiseConv2D(
        3, padding=padding, depth_multiplier=multiplier, activation="tanh", name="dw"
    )(y)
    y = layers.Conv2D(3, 1, name="c1")(y)
    model = randomize(keras.Model(x, y))
    zero(model.get_layer("c0"), [0, 1])
    model.get_layer("c0").bias.assign([1.0, 0.0, 1.0, 1.0])
    kernel = numpy(model.get_layer("dw").kernel)
    kernel[:, :, 3] = 0
    model.get_layer("dw").kernel.assign(kernel)
    smaller, report = checked(model)
    # Filter 0 is the constant 1, filter 1 the constant 0. The depthwise kernel ignores filter 3.
    assert smaller.get_layer("c0").filters == {"valid": 1, "same": 2}[padding]
    left = {"valid": {}, "same": {"a non-zero constant enters the zero padding of 'dw'": 1}}
    assert row(report, "c0").kept == left[padding]
    assert smaller.get_layer("dw").depth_multiplier == multiplier


@pytest.mark.once
def test_depthwise_channel_is_removed_only_if_all_of_its_outputs_are():
    x = keras.Input((7, 7, 2))
    y = layers.Conv2D(3, 3, name="c0")(x)
    y = layers.DepthwiseConv2D(3, depth_multiplier=2)(y)
    model = randomize(keras.Model(x, layers.Conv2D(3, 3, name="c1")(y)))
    zero(model.get_layer("c1"), [0, 1, 2], axis=-2)  # Both outputs of channel 0, one of channel 1.
    smaller, _ = checked(model)
    assert smaller.get_layer("c0").filters == 2


@pytest.mark.once
@pytest.mark.parametrize("padding", ["valid", "same"])
def test_separable_convolution(padding):
    x = keras.Input((7, 7, 2))
    y = layers.Conv2D(5, 3, name="c0")(x)
    y = layers.SeparableConv2D(4, 3, padding=padding, depth_multiplier=2, name="s")(y)
    model = randomize(keras.Model(x, layers.Conv2D(3, 3, name="c1")(y)))
    zero(model.get_layer("c0"), [0])
    zero(model.get_layer("s"), [1], name="depthwise_kernel", axis=-2)
    zero(
        model.get_layer("s"), [4, 5], name="pointwise_kernel", axis=-2
    )  # The outputs of channel 2.
    zero(model.get_layer("s"), [3], name="pointwise_kernel")
    smaller, _ = checked(model)
    assert widths(smaller) == {"c0": {"valid": 2, "same": 3}[padding], "s": 3, "c1": 3}


def test_transposed_convolution_absorbs_only_zeros():
    x = keras.Input((5, 5, 2))
    y = layers.Conv2D(4, 3, name="c0")(x)
    y = layers.Conv2DTranspose(5, 3, strides=2, name="t")(y)
    model = randomize(keras.Model(x, layers.Conv2D(3, 1, name="c1")(y)))
    zero(model.get_layer("c0"), [0, 1])
    model.get_layer("c0").bias.assign([0.0, 2.0, 1.0, 1.0])
    zero(model.get_layer("t"), [1, 3], axis=-2)
    smaller, _ = checked(model)
    assert widths(smaller) == {"c0": 3, "t": 3, "c1": 3}


def test_causal_convolution_pads():
    x = keras.Input((9, 2))
    y = layers.Conv1D(4, 3, name="c0")(x)
    model = randomize(keras.Model(x, layers.Conv1D(3, 3, padding="causal", name="c1")(y)))
    zero(model.get_layer("c0"), [0, 1])
    model.get_layer("c0").bias.assign([0.0, 2.0, 1.0, 1.0])
    smaller, _ = checked(model)
    assert smaller.get_layer("c0").filters == 3


@pytest.mark.once
def test_zero_padding_layer_passes_only_zeros():
    model = conv_net(layers.ZeroPadding2D(1, name="pad"))
    zero(model.layers[0], [0, 1])
    model.layers[0].bias.assign([0.0, 2.0, 1.0, 1.0])
    smaller, report = checked(model)
    assert smaller.layers[0].filters == 3
    assert row(report, "c0").kept == {"a non-zero constant enters the zero padding of 'pad'": 1}


@pytest.mark.once
@pytest.mark.parametrize(
    "inner",
    [
        layers.MaxPooling2D(3, strides=1, padding="same"),
        layers.AveragePooling2D(3, strides=1, padding="same"),
        layers.UpSampling2D(2, interpolation="bilinear"),
        layers.Cropping2D(1),
        layers.SpatialDropout2D(0.5),
        layers.LeakyReLU(0.3),
        layers.ELU(),
        layers.Activation("gelu"),
        layers.PReLU(alpha_initializer="normal", shared_axes=[1, 2]),
        layers.PReLU(alpha_initializer="normal", shared_axes=[1, 2, 3]),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_passes_constants_on(inner):
    inner = type(inner).from_config(inner.get_config())  # Tests must not share layers.
    model = conv_net(inner)
    zero(model.layers[0], [0, 2])
    smaller, _ = checked(model)
    assert smaller.layers[0].filters == 2


@pytest.mark.once
def test_prelu_with_a_slope_per_position_passes_only_positive_constants():
    model = conv_net(layers.PReLU())
    zero(model.layers[0], [0, 2])
    model.layers[0].bias.assign([1.0, 1.0, -1.0, 1.0])
    smaller, _ = checked(model)
    assert smaller.layers[0].filters == 3


@pytest.mark.parametrize("data_format", ["channels_last", "channels_first"])
@pytest.mark.parametrize("flatten_format", ["channels_last", "channels_first"])
def test_flatten_maps_a_channel_to_its_positions(data_format, flatten_format):
    shape = (6, 6, 2) if data_format == "channels_last" else (2, 6, 6)
    x = keras.Input(shape)
    y = layers.Conv2D(4, 3, data_format=data_format, name="c0")(x)
    y = layers.Flatten(data_format=flatten_format)(y)
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(y)))
    zero(model.get_layer("c0"), [1])  # constant
    # Channel 2 is not read; of channel 3, one position is read.
    place = np.arange(4 * 4 * 4).reshape((4, 4, 4))
    channel = place % 4 if data_format == "channels_last" else place // 16
    if flatten_format == "channels_first":
        channel = np.moveaxis(channel, 0, -1)
    kernel = numpy(model.get_layer("out").kernel)
    kernel[channel.ravel() == 2] = 0
    kernel[np.flatnonzero(channel.ravel() == 3)[1:]] = 0
    model.get_layer("out").kernel.assign(kernel)
    if BACKEND == "tensorflow" and data_format == "channels_first":
        # TensorFlow has no such convolution on a CPU, so outputs cannot be compared.
        smaller, _ = shrink(model, return_report=True)
    else:
        smaller, _ = checked(model)
    assert smaller.get_layer("c0").filters == 2
    assert smaller.get_layer("out").kernel.shape == (2 * 16, 3)


@pytest.mark.skipif(BACKEND == "tensorflow", reason="no channels_first convolution on a CPU")
def test_channels_first():
    model = conv_net(
        layers.BatchNormalization(axis=1),
        layers.ReLU(),
        layers.MaxPooling2D(2, data_format="channels_first"),
        shape=(2, 9, 9),
        data_format="channels_first",
    )
    zero(model.layers[0], [1, 2])
    zero(model.layers[-3], [0])
    smaller, _ = checked(model)
    assert widths(smaller) == {"c0": 2, "c1": 2, "out": 2}


@pytest.mark.once
def test_a_convolution_of_as_many_groups_as_inputs_is_depthwise():
    x = keras.Input((6, 6, 3))
    y = layers.Conv2D(4, 3, activation="relu", name="a")(x)
    y = layers.Conv2D(8, 3, groups=4, padding="same", name="each")(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(layers.Flatten()(y))))
    zero(model.get_layer("a"), [1], bias=True)
    kernel = numpy(model.get_layer("out").kernel).reshape(4, 4, 8, 2)
    kernel[:, :, 2:4] = 0  # Both outputs of the second group.
    model.get_layer("out").kernel.assign(kernel.reshape(-1, 2))
    smaller, report = checked(model)
    assert (smaller.get_layer("each").groups, smaller.get_layer("each").filters) == (3, 6)
    assert report.macs_after == 16 * (27 * 3 + 9 * 6 + 6 * 2)


@pytest.mark.parametrize("padding", ["valid", "same"])
def test_grouped_convolution(padding):
    """All groups lose the same places among their inputs and among their filters."""
    x = keras.Input((9, 9, 2))
    y = layers.Conv2D(6, 3, activation="relu", name="a")(x)
    y = layers.Conv2D(8, 3, groups=2, padding=padding, name="grouped")(y)
    model = randomize(keras.Model(x, layers.Conv2D(2, 3, name="b")(y)))
    zero(model.get_layer("a"), [1, 4, 2], bias=True)  # the second of both groups, and another
    zero(model.get_layer("grouped"), [0, 4, 3], bias=True)
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 4, "grouped": 6, "b": 2}
    assert smaller.get_layer("grouped").groups == 2
    assert report.not_followed == {}


@pytest.mark.once
def test_bias_of_a_grouped_convolution_takes_up_the_constants_of_its_own_group():
    x = keras.Input((9, 9, 2))
    y = layers.Conv2D(4, 3, activation="relu", name="a")(x)
    y = layers.Conv2D(4, 3, groups=2, use_bias=False, name="grouped")(y)
    model = randomize(keras.Model(x, layers.Conv2D(2, 3, name="b")(y)))
    zero(model.get_layer("a"), [1, 3])
    model.get_layer("a").bias.assign([0.1, 0.5, 0.2, 0.9])
    smaller, _ = checked(model)
    assert widths(smaller) == {"a": 2, "grouped": 4, "b": 2}
    assert smaller.get_layer("grouped").use_bias
