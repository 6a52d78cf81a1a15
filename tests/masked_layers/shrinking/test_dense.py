"""Units of dense layers that are constant or unread."""

import keras
import numpy as np
import pytest
from keras import layers

from shrunk import checked, dense_net, numpy, randomize, row, widths, zero

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


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


@pytest.mark.parametrize(
    ("equation", "shape", "bias_axes"),
    [
        ("abc,cd->abd", (5, 6), "d"),
        ("...x,xy->...y", (5, 6), "y"),
        ("...x,yx->...y", (5, 6), None),
        ("abc,bcd->ad", (5, 6), "d"),  # sums over positions, too
        ("abc,bcd->abd", (5, 6), "d"),  # a kernel for each position
    ],
)
def test_einsum_dense(equation, shape, bias_axes):
    x = keras.Input(shape)
    y = layers.Dense(4, "relu", name="a")(x)
    made = 7 if equation.endswith(("->ad", "...y")) else (5, 7)
    y = layers.EinsumDense(equation, made, "tanh", bias_axes=bias_axes, name="einsum")(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    zero(model.get_layer("a"), [1], bias=True)
    einsum = model.get_layer("einsum")
    zero(einsum, [2, 3], axis=equation.split(",")[1].index(equation[-1]), bias=bool(bias_axes))
    smaller, report = checked(model)
    assert report.not_followed == {}
    assert smaller.get_layer("a").units == 3
    assert smaller.get_layer("einsum").output.shape[-1] == 5
    positions = {"abc,bcd->ad": 1, "abc,bcd->abd": 1}.get(equation, 5)
    size = int(np.prod(smaller.get_layer("einsum").kernel.shape))
    outputs = 1 if equation.endswith("->ad") else 5
    assert report.macs_after == 5 * 6 * 3 + size * positions + outputs * 5 * 2


@pytest.mark.parametrize(
    ("equation", "made", "bias_axes", "why"),
    [
        ("abc,cde->abde", (5, 2, 3), None, "it does not make exactly one axis of outputs"),
        ("abc,bd->adc", (3, 4), None, "it sums over axes other than the channels"),
        ("abc,cd->abd", (5, 3), "bd", "its bias has other axes than that of its outputs"),
    ],
)
def test_einsum_dense_of_other_axes_is_left_whole(equation, made, bias_axes, why):
    x = keras.Input((5, 6))
    y = layers.Dense(4, name="a")(x)
    y = layers.EinsumDense(equation, made, bias_axes=bias_axes, name="einsum")(y)
    model = randomize(keras.Model(x, layers.Dense(2)(layers.Flatten()(y))))
    zero(model.get_layer("a"), [1], bias=True)
    smaller, report = checked(model)
    assert smaller.get_layer("a").units == 4
    assert report.not_followed["einsum"].startswith(why)


@pytest.mark.parametrize(
    ("function", "elementwise"),
    [
        (lambda x: keras.ops.gelu(x, approximate=True) * 2.0 + x, True),
        (lambda x: keras.ops.roll(x, 1, axis=-1), False),
        (lambda x: x * keras.ops.arange(3.0), False),
        (lambda x: x[..., :1] + x, False),
    ],
)
def test_activations_of_a_user_are_followed_where_each_entry_is_computed_alone(
    function, elementwise
):
    x = keras.Input((5,))
    model = keras.Model(x, layers.Dense(2)(layers.Dense(3, function, name="a")(x)))
    zero(randomize(model).get_layer("a"), [1])
    smaller, report = checked(model)
    assert (smaller.get_layer("a").units == 2) is elementwise
    assert (report.not_followed == {}) is elementwise


def test_activations_that_are_layers_are_not_called():
    """Calling one would build it for a shape of its own, or leave a record of the call in it."""
    x = keras.Input((6, 5))
    stateless, own = layers.LeakyReLU(), layers.PReLU()
    y = layers.Dense(4, activation=stateless, name="a")(x)
    y = layers.Dense(6, activation=own, name="b")(layers.Dense(3, name="between")(y))
    model = keras.Model(x, layers.Dense(2, name="out")(y))
    model(np.ones((2, 6, 5)))
    randomize(model)
    zero(model.get_layer("a"), [1])
    smaller, report = checked(model)
    assert own.alpha.shape == (6, 6)
    assert stateless._inbound_nodes == []
    assert smaller.get_layer("a").units == 3
    assert report.not_followed == {"b": "its activation may mix channels"}
