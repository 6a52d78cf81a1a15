"""Layers that call another layer at each step."""

import keras
import pytest
from keras import layers

from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers import channel_families, convert_to_masked, shrink
from shrunk import assert_same_outputs, checked, numpy, randomize, row, zero

pytestmark = pytest.mark.usefixtures("nothing_drawn")


def frames():
    """Pictures in a row: each through a convolution, then a recurrent net over all of them."""
    x = keras.Input((4, 6, 6, 2))
    y = layers.TimeDistributed(layers.Conv2D(8, 3), name="conv")(x)
    y = layers.TimeDistributed(layers.BatchNormalization(), name="norm")(y)
    y = layers.TimeDistributed(layers.ReLU())(y)
    y = layers.TimeDistributed(layers.GlobalAveragePooling2D())(y)
    y = layers.TimeDistributed(layers.Dense(6, "tanh", use_bias=False), name="dense")(y)
    y = layers.LSTM(4, name="lstm")(y)
    return randomize(keras.Model(x, layers.Dense(2, name="out")(y)))


@pytest.mark.slow("jax")
def test_half_of_the_channels_of_each_step_is_removed():
    masked = convert_to_masked(frames())
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert report.not_followed == {}
    assert {line.layer: line.after for line in report} == {
        "conv": 4,
        "dense": 3,
        "lstm": 2,
        "out": 2,
    }
    assert smaller.get_layer("conv").layer.filters == 4
    assert smaller.get_layer("norm").layer.gamma.shape == (4,)
    assert report.macs_after == 4 * 16 * 9 * 2 * 4 + 4 * 4 * 3 + 4 * 4 * 2 * (3 + 2) + 2 * 2


@pytest.mark.once
def test_a_constant_moves_into_a_bias_inside():
    model = frames()
    zero(model.get_layer("conv").layer, [1, 2])
    smaller, report = checked(model)
    assert row(report, "conv").constant == 2
    assert smaller.get_layer("dense").layer.use_bias
    assert numpy(smaller.get_layer("dense").layer.bias).any()


@pytest.mark.once
def test_a_layer_that_is_called_elsewhere_too_is_left_whole():
    x = keras.Input((4, 3))
    shared = layers.Dense(5, name="shared")
    y = layers.TimeDistributed(shared, name="steps")(x)
    y = layers.add([y, shared(x)])
    model = randomize(keras.Model(x, layers.Dense(2)(layers.Flatten()(y))))
    zero(shared, [1], bias=True)
    smaller, report = checked(model)
    why = "it shares a weight with another layer, which a smaller copy would not"
    assert report.not_followed == {"steps": why, "shared": why}
    assert smaller.get_layer("steps").layer.units == 5


@pytest.mark.once
@pytest.mark.parametrize("as_layer", [True, False])
def test_an_unknown_layer_inside_is_named(as_layer):
    x = keras.Input((4, 3))
    y = layers.Dense(5, name="before")(x)
    inner = layers.UnitNormalization() if as_layer else layers.Lambda(lambda x: x)
    y = layers.TimeDistributed(inner, name="steps")(y)
    found = channel_families(keras.Model(x, layers.Dense(2)(y)))
    assert found.not_followed == {"steps": f"unknown class {type(inner).__name__} inside it"}
