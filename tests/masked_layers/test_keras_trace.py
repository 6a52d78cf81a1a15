"""Hooks into Keras' calls and loads: these tests fail when Keras changes them."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import _keras_trace


def test_the_variables_that_a_call_reads_are_told():
    inner = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    unused = layers.Dense(2)
    unused.build((None, 3))
    x = keras.Input((3,))
    model = keras.Model(x, inner(layers.Dense(3, use_bias=False)(x)))
    model.unused = unused
    read = []
    _keras_trace.watch(model, keras.KerasTensor((2, 3)), read.append)
    assert set(map(id, read)) == set(map(id, [*inner.weights, model.layers[1].kernel]))


def test_callers_are_the_frames_around_from_the_inside_out():
    names = []

    def inner():
        for frame in _keras_trace.callers():
            names.append(frame.f_code.co_name)

    def outer():
        inner()

    outer()
    assert names[:2] == ["outer", "test_callers_are_the_frames_around_from_the_inside_out"]


@pytest.mark.once("tensorflow", "jax")
def test_functions_that_a_layer_compiles_itself_forget_their_traces():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function
    else:
        import jax

        compiled = functools.partial(jax.jit, static_argnums=0)

    class Scaled(layers.Layer):
        factor = 2.0

        @compiled
        def scaled(self, x):
            return self.factor * x

    layer, x = Scaled(), np.ones((), "float32")
    assert float(layer.scaled(x)) == 2
    layer.factor = 3.0
    assert float(layer.scaled(x)) == 2
    _keras_trace.forget_traces(layer)
    assert float(layer.scaled(x)) == 3


def test_variables_in_the_graph_are_named_by_the_operation_that_takes_them():
    scale = keras.Variable(2.0)
    x = keras.Input((4,))
    hidden = layers.Dense(2)(x)
    model = keras.Model(x, keras.ops.multiply(hidden, scale))
    found = _keras_trace.variables_in_graph(model)
    assert "multiply" in found[id(scale)]
    assert _keras_trace.variables_in_graph(keras.Model(x, hidden)) == {}


def test_a_load_is_identified_by_one_object_that_ends_with_it(tmp_path):
    seen = []

    class Noting(layers.Dense):
        def load_own_variables(self, store):
            seen.append(_keras_trace.load_under_way())
            super().load_own_variables(store)

    model = keras.Sequential([keras.Input((4,)), Noting(3), keras.Sequential([Noting(2)])])
    file = tmp_path / "model.weights.h5"
    model.save_weights(file)
    model.load_weights(file)
    assert len(seen) == 2
    assert seen[0] is seen[1] is not None
    first = weakref.ref(seen[0])
    seen.clear()
    gc.collect()
    assert first() is None
    assert _keras_trace.load_under_way() is None
