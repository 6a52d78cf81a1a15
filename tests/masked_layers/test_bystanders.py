"""Things that a conversion must not change: other functions, caches, odd attributes."""

import gc

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml

X = np.random.default_rng(0).normal(size=(3, 4)).astype("float32")


class Around(layers.Layer):
    """Contains a dense layer. Base class of layers that contain more."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(2)

    def build(self, shape):
        self.dense.build(shape)
        self.built = True

    def call(self, x):
        return self.dense(x)


def around(layer):
    return keras.Sequential([keras.Input((4,)), layer])


def value(model):
    return keras.ops.convert_to_numpy(model(X))


@pytest.mark.once("tensorflow")
def test_functions_whose_variables_are_deleted_are_not_an_obstacle():
    import tensorflow as tf

    class Module(tf.Module):
        def __init__(self):
            super().__init__()
            self.variable = tf.Variable(2.0)

        @tf.function
        def __call__(self, x):
            return x * self.variable

    module = Module()
    trace = module.__call__.get_concrete_function(tf.constant(1.0))
    del module
    gc.collect()
    with pytest.raises(AssertionError):
        _ = trace.graph.variables
    model = around(layers.Dense(2))
    before = value(model)
    assert ml.convert_to_masked(model, inplace=True) is model
    assert len(ml.masked_refs(model)) == 1
    np.testing.assert_array_equal(value(model), before)
    ml.strip_masks(model, inplace=True)
    np.testing.assert_array_equal(value(model), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_functions_that_a_model_is_made_with_stay(inplace):
    class Scaled(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(2)
            self.scale_function = self.make_scale_function()

        def make_scale_function(self):
            return lambda x: 2 * x

        def build(self, shape):
            self.dense.build(shape)
            self.built = True

        def call(self, x):
            return self.scale_function(self.dense(x))

    model = Scaled()
    model.build((None, 4))
    before = value(model)
    masked = ml.convert_to_masked(model, inplace=inplace)
    np.testing.assert_array_equal(value(masked), before)
    np.testing.assert_array_equal(value(ml.strip_masks(masked, inplace=inplace)), before)


@pytest.mark.parametrize("inplace", [False, True])
def test_caches_of_layers_are_theirs(inplace):
    class Cached(Around):
        def clear_cache(self):
            raise RuntimeError("A cache was cleared.")

    class Outer(Around):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = Cached()

    model = around(Outer())
    before = value(model)
    masked = ml.convert_to_masked(model, inplace=inplace)
    assert len(ml.masked_refs(masked)) == 1
    np.testing.assert_array_equal(value(masked), before)


def test_objects_with_slots_among_the_attributes():
    class Slots:
        __slots__ = ("rate",)

        def get_config(self):
            return {}

    class WithSlots(Around):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.slots = Slots()

    model = around(WithSlots())
    masked = ml.convert_to_masked(model)
    np.testing.assert_array_equal(value(masked), value(model))


@pytest.mark.parametrize("inplace", [False, True])
def test_learned_masks_of_models_whose_schedule_keras_cannot_serialize(inplace):
    class Halved(keras.optimizers.schedules.LearningRateSchedule):
        def __init__(self, rate):
            self.rate = rate

        def __call__(self, step):
            return self.rate / 2

    model = around(layers.Dense(1))
    model.compile(keras.optimizers.SGD(Halved(0.5)), "mse")
    masked = ml.convert_to_masked(model, mask="bernoulli", inplace=inplace)
    assert float(masked.optimizer.learning_rate) == 0.25
    masked.fit(X, X[:, :1], verbose=0)
    hard = ml.harden(masked, inplace=inplace)
    assert float(hard.optimizer.learning_rate) == 0.25
    hard.fit(X, X[:, :1], verbose=0)
    assert not any(ref.mask.learned for ref in ml.masked_refs(hard))


def test_conversion_in_place_is_undone_where_the_optimizer_cannot_be_made_again():
    class Closed(keras.optimizers.SGD):
        def get_config(self):
            raise NotImplementedError("This optimizer has no config.")

    model = around(layers.Dense(1))
    model.compile(Closed(), "mse")
    before = value(model)
    with pytest.raises(NotImplementedError):
        ml.convert_to_masked(model, mask="bernoulli", inplace=True)
    assert all(ref.mask is None for ref in ml.weight_refs(model))
    assert [variable.trainable for variable in model.variables[:2]] == [True, True]
    np.testing.assert_array_equal(value(model), before)
