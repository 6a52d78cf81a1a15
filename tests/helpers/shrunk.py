"""Nets with channels that shrinking removes, and what holds for every model that shrinks."""

import keras
import numpy as np
from keras import layers

from masked_layers.shrinking import shrink


def swap_halves(x):
    return keras.ops.roll(x, x.shape[-1] // 2, axis=-1)


def randomize(model, seed=0):
    """Gives every weight a value that no test can mistake for an initial one."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        scale = 1 / np.sqrt(max(1, np.prod(variable.shape[:-1])))
        value = rng.normal(size=variable.shape) * (scale if len(variable.shape) > 1 else 0.5)
        if "variance" in variable.path:
            value = 0.5 + np.abs(value)
        variable.assign(value)
    return model


def zero(layer, units, *, bias=False, name="kernel", axis=-1):
    """Zeroes whole output units of a layer's kernel, and their biases if asked."""
    kernel = numpy(getattr(layer, name))
    np.moveaxis(kernel, axis, 0)[list(units)] = 0
    getattr(layer, name).assign(kernel)
    if bias:
        value = numpy(layer.bias)
        value[list(units)] = 0
        layer.bias.assign(value)


def numpy(tensor):
    return keras.ops.convert_to_numpy(tensor).copy()


def inputs_of(model, batch=3, seed=1):
    rng = np.random.default_rng(seed)
    data = [
        rng.normal(size=[batch if d is None else d for d in x.shape]).astype("float32")
        for x in model.inputs
    ]
    return data if len(data) > 1 else data[0]


def assert_same_outputs(model, smaller, tolerance=1e-5):
    data = inputs_of(model)
    expected = keras.tree.map_structure(numpy, model(data))
    got = keras.tree.map_structure(numpy, smaller(data))
    keras.tree.assert_same_structure(expected, got)
    for a, b in zip(keras.tree.flatten(expected), keras.tree.flatten(got), strict=True):
        assert a.shape == b.shape
        assert np.abs(a).max() > 0  # equality of zeros would prove nothing
        np.testing.assert_allclose(b, a, rtol=0, atol=tolerance * np.abs(a).max())


def widths(model):
    return {
        layer.name: getattr(layer, "units", getattr(layer, "filters", None))
        for layer in model.layers
        if hasattr(layer, "units") or hasattr(layer, "filters")
    }


def checked(model, tolerance=1e-5):
    """Shrinks, and checks what holds for every model."""
    before = [numpy(v) for v in model.variables]
    smaller, report = shrink(model, return_report=True)
    assert_same_outputs(model, smaller, tolerance)
    for old, variable in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, numpy(variable))
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]
    assert report.weights_before == model.count_params()
    assert report.weights_after == smaller.count_params()
    for row in report:
        assert row.before == row.after + row.constant + row.unread
    for found in report:
        if found.layer in widths(smaller):
            assert widths(smaller)[found.layer] == found.after
    return smaller, report


def row(report, name):
    (found,) = (row for row in report if row.layer == name)
    return found


def dense_net(*units, activation="relu", **kwargs):
    hidden = [layers.Dense(n, activation, name=f"d{i}", **kwargs) for i, n in enumerate(units[:-1])]
    return randomize(
        keras.Sequential([keras.Input((5,)), *hidden, layers.Dense(units[-1], name="out")])
    )


def conv_net(*inner, filters=(4, 3), padding="valid", bias=True, shape=(8, 8, 2), **kwargs):
    return randomize(
        keras.Sequential(
            [
                keras.Input(shape),
                layers.Conv2D(filters[0], 3, padding=padding, use_bias=bias, name="c0", **kwargs),
                *inner,
                layers.Conv2D(filters[1], 3, padding=padding, name="c1", **kwargs),
                layers.GlobalAveragePooling2D(data_format=kwargs.get("data_format")),
                layers.Dense(2, name="out"),
            ]
        )
    )


def add_layer(a, b):
    return layers.Add()([a, b])


def residual_net(add, activation="relu"):
    x = keras.Input((6, 6, 2))
    stem = layers.Conv2D(4, 3, activation=activation, name="stem")(x)
    branch = layers.Conv2D(5, 3, padding="same", activation=activation, name="b0")(stem)
    branch = layers.Conv2D(4, 3, padding="same", name="b1")(branch)
    y = layers.Activation(activation)(add(stem, branch))
    return randomize(keras.Model(x, layers.Conv2D(3, 3, name="top")(y)))
