"""Nested models."""

import keras
import pytest
from keras import layers

from masked_layers.shrinking import shrink
from shrunk import checked, randomize, row, widths, zero

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("nothing_drawn")]


@pytest.mark.parametrize("calls", [1, 2])
def test_nested_model_shrinks_inside(calls):
    inner = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, "relu", name="wide"), layers.Dense(4, name="end")],
        name="inner",
    )
    x = keras.Input((5,))
    y = layers.Dense(4, name="first")(x)
    for _ in range(calls):
        y = inner(y)
    model = randomize(keras.Model(x, layers.Dense(2, name="last")(y)))
    zero(inner.layers[0], [0, 1])
    # Different constants of two calls could not be moved into one bias.
    zero(inner.layers[1], [0], bias=calls == 2)
    zero(model.get_layer("first"), [0], bias=calls == 2)
    smaller, report = checked(model)
    assert row(report, "inner/wide").constant == 2
    assert widths(smaller) == {"first": 3, "last": 2}
    assert widths(smaller.get_layer("inner")) == {"wide": 4, "end": 3}
    assert report.not_followed == {}


def test_nested_model_in_training_mode_is_left_whole():
    inner = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, name="wide"),
            layers.BatchNormalization(),
            layers.Dense(4, name="end"),
        ],
        name="inner",
    )
    x = keras.Input((4,))
    model = randomize(keras.Model(x, layers.Dense(2)(inner(inner(x), training=True))))
    zero(inner.layers[0], [0, 1])
    smaller, report = shrink(model, return_report=True)
    assert widths(smaller.get_layer("inner")) == {"wide": 6, "end": 4}
    assert report.not_followed == {"inner": "called with arguments other than tensors"}


def test_a_nested_model_that_is_given_a_dict_for_a_list_is_left_whole():
    """Keras matches the names of the dict, whose order is another one than that of the inputs."""
    a, b = keras.Input((8,), name="zz"), keras.Input((8,), name="aa")
    inner = layers.concatenate([layers.Dense(5)(a), layers.Dense(5)(b)])
    nested = keras.Model([a, b], inner, name="nested")
    x = keras.Input((8,))
    given = {"zz": layers.Dense(8, name="one")(x), "aa": layers.Dense(8, name="two")(x)}
    model = randomize(keras.Model(x, layers.Dense(3)(nested(given))))
    zero(model.get_layer("one"), [1, 2], bias=True)
    smaller, report = checked(model)
    assert set(report.not_followed) == {"nested"}
    assert smaller.get_layer("one").units == 8
