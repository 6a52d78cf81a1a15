"""Units of dense layers that are constant or unread."""

import keras
import numpy as np
import pytest
from keras import layers

from shrunk import checked, dense_net, numpy, randomize, row, widths, zero

pytestmark = pytest.mark.usefixtures("nothing_drawn")


def test_constant_unit_moves_into_the_next_bias():
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2, "relu"), layers.Dense(1)])
    model.set_weights(
        [
            np.array([[1.0, 0.0], [1.0, 0.0]]),  # The second unit is relu(3) = 3.
            np.array([0.5, 3.0]),
            np.array([[2.0], [10.0]]),
            np.array([1.0]),
        ]
    )
    smaller, report = checked(model)
    kernel, bias, out_kernel, out_bias = smaller.get_weights()
    np.testing.assert_array_equal(kernel, [[1.0], [1.0]])
    np.testing.assert_array_equal(bias, [0.5])
    np.testing.assert_array_equal(out_kernel, [[2.0]])
    np.testing.assert_array_equal(out_bias, [31.0])  # 1 + 3 * 10
    assert (row(report, model.layers[0].name).constant, report.weights_after) == (1, 5)


def test_constant_that_the_activation_turns_to_zero_does_not_change_the_bias():
    model = dense_net(4, 3)
    zero(model.layers[0], [1])
    model.layers[0].bias.assign([1.0, -2.0, 1.0, 1.0])
    smaller, _ = checked(model)
    assert widths(smaller) == {"d0": 3, "out": 3}
    np.testing.assert_array_equal(smaller.get_weights()[3], model.get_weights()[3])


def test_unread_units_are_removed_with_the_units_that_only_they_read():
    model = dense_net(6, 5, 4, 3)
    zero(model.layers[2], [0, 2], axis=0)  # d2 reads only units 1, 3 and 4 of d1
    zero(model.layers[1], [1, 3, 4, 5], axis=0)  # d1 reads only units 0 and 2 of d0
    smaller, report = checked(model)
    assert widths(smaller) == {"d0": 2, "d1": 3, "d2": 4, "out": 3}
    assert (row(report, "d0").unread, row(report, "d1").unread) == (4, 2)


def test_unit_read_only_by_a_constant_unit_is_removed_too():
    model = dense_net(4, 4, 2)
    zero(model.layers[1], [0, 1, 2])  # constants; only unit 3 of d1 reads d0
    kernel = numpy(model.layers[1].kernel)
    kernel[:2, 3] = 0  # and only units 2 and 3 of it
    model.layers[1].kernel.assign(kernel)
    smaller, _ = checked(model)
    assert widths(smaller) == {"d0": 2, "d1": 1, "out": 2}


def test_constants_pass_through_several_layers():
    model = dense_net(3, 3, 3, 2, activation="tanh")
    kernel = numpy(model.layers[1].kernel)
    zero(model.layers[0], [0, 1])
    kernel[2, :2] = 0  # units 0 and 1 of d1 read only the constants of d0
    model.layers[1].kernel.assign(kernel)
    smaller, _ = checked(model)
    assert widths(smaller) == {"d0": 1, "d1": 1, "d2": 3, "out": 2}


def test_initializer_that_holds_an_array_is_replaced():
    bias = keras.initializers.Constant(np.arange(4.0))
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(4, "relu", bias_initializer=bias), layers.Dense(2)]
    )
    zero(randomize(model).layers[0], [1])
    smaller, _ = checked(model)
    assert smaller.layers[0].units == 3


def test_layer_without_bias_gets_one_only_if_it_needs_it():
    model = dense_net(4, 4, 2, use_bias=False)
    zero(model.layers[0], [0])
    smaller, _ = checked(model)
    assert not smaller.layers[1].use_bias  # relu(0) adds zero.
    model = dense_net(4, 4, 2, use_bias=False, activation="sigmoid")
    zero(model.layers[0], [0])
    smaller, _ = checked(model)
    assert (smaller.layers[0].use_bias, smaller.layers[1].use_bias) == (False, True)


def test_a_layer_keeps_at_least_one_unit():
    model = dense_net(4, 4, 2)
    zero(model.layers[0], range(4))
    zero(model.layers[1], range(4))
    smaller, report = checked(model)
    assert widths(smaller) == {"d0": 1, "d1": 1, "out": 2}
    assert row(report, "d1").kept == {"a layer has at least one": 1}


def test_inputs_and_outputs_keep_their_shapes():
    model = dense_net(3, 4)
    zero(model.layers[1], [0, 1])  # Constant outputs of the model.
    zero(model.layers[0], [0, 1, 2, 3], axis=0)  # Inputs of the model that no unit reads.
    smaller, report = checked(model)
    assert (smaller.input_shape, smaller.output_shape) == ((None, 5), (None, 4))
    assert row(report, "out").kept == {"an output of the model": 2}


def test_inner_tensor_that_is_an_output_stays_whole():
    x = keras.Input((5,))
    hidden = layers.Dense(4, "relu")(x)
    model = randomize(keras.Model(x, {"hidden": hidden, "top": layers.Dense(2)(hidden)}))
    zero(model.layers[1], [0, 1])
    smaller, _ = checked(model)
    assert smaller.layers[1].units == 4


def test_a_model_without_anything_to_remove_is_copied():
    model = dense_net(4, 3)
    smaller, report = checked(model)
    assert report.weights_before == report.weights_after
    for a, b in zip(model.get_weights(), smaller.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
