"""Copies that cannot be created or compared normally: randomness, several arguments, cycles."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml

RNG = np.random.default_rng(7)


class Noise(layers.Layer):
    """Draws random numbers in inference as well."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source
        if source == "tracked":
            self.generator = keras.random.SeedGenerator()
        if source == "hidden":
            object.__setattr__(self, "generator", keras.random.SeedGenerator())

    def call(self, x):
        if self.source == "numpy":
            return x + np.random.default_rng().normal()
        return x + keras.random.normal(ops.shape(x), seed=self.generator)

    def get_config(self):
        return {**super().get_config(), "source": self.source}


def noisy(source):
    return keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, name="a"), Noise(source), layers.Dense(2, name="b")]
    )


@pytest.mark.parametrize("source", ["tracked", "hidden"])
def test_a_model_that_draws_from_a_generator_of_keras_is_compared(source):
    """Even if a copy has another generator, whose state is not a variable of the model."""
    model = noisy(source)
    masked = ml.convert_to_masked(model)
    assert [ref.path for ref in ml.masked_refs(masked)] == ["a/kernel", "b/kernel"]
    plain = ml.strip_masks(masked)
    for old, new in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_models_with_other_random_numbers_are_reported_as_not_compared():
    with pytest.warns(UserWarning, match="different outputs at each call") as caught:
        masked = ml.convert_to_masked(noisy("numpy"))
    assert any("whether its copy has the same outputs" in str(w.message) for w in caught)
    assert {w.filename for w in caught if "at each call" in str(w.message)} == {__file__}
    with pytest.warns(UserWarning, match="different outputs at each call"):
        ml.strip_masks(masked)


class Forgetful(Noise):
    """Has a config without everything that the call depends on."""

    def __init__(self, source, scale=1.0, **kwargs):
        super().__init__(source, **kwargs)
        self.scale = scale

    def call(self, x):
        return self.scale * super().call(x)


def test_a_copy_with_other_outputs_is_refused_though_it_draws():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3), Forgetful("hidden", scale=2.0)])
    with pytest.raises(ValueError, match="other outputs"):
        ml.convert_to_masked(model)


class Remembers(keras.Model):
    """Creates tensors in its first call, which later calls read."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(3)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        if not hasattr(self, "table"):
            self.table = ops.linspace(1.0, 2.0, 3)
            self.tables = {"twice": [2 * self.table]}
        return self.dense(x) * self.table + self.tables["twice"][0]


@pytest.mark.parametrize("inplace", [False, True])
def test_the_checks_leave_no_tensors_in_a_layer(inplace):
    """A tensor of a symbolic call has no values, and raises a late error on JAX and TensorFlow."""
    model = Remembers()
    model.build((None, 4))
    x = RNG.normal(size=(5, 4)).astype("float32")
    masked = ml.convert_to_masked(model, inplace=inplace)
    assert not hasattr(masked, "table")
    table = np.linspace(1.0, 2.0, 3)
    expected = x @ ops.convert_to_numpy(masked.dense.kernel) * table + 2 * table
    np.testing.assert_allclose(ops.convert_to_numpy(masked(x)), expected, rtol=1e-5, atol=1e-5)


class TwoArguments(keras.Model):
    """Keras only records the shape of the first argument of its call."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one = layers.Dense(4)
        self.other = keras.Sequential([layers.Dense(3, activation="relu"), layers.Dense(4)])

    def call(self, x, context=None, training=False):
        return self.one(x) + (0 if context is None else self.other(context))


class TwoByName(TwoArguments):
    def call(self, x, *, context):
        return super().call(x, context)


@pytest.mark.parametrize("cls", [TwoArguments, TwoByName])
def test_a_subclassed_model_of_two_arguments_is_copied(cls):
    model = cls()
    x, context = RNG.normal(size=(2, 5, 4)).astype("float32")[:, :, :4]
    before = ops.convert_to_numpy(model(x, context=context))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Keras would warn about what is fixed here.
        masked = ml.convert_to_masked(model)
    assert len(ml.masked_refs(masked)) == 3
    np.testing.assert_array_equal(ops.convert_to_numpy(masked(x, context=context)), before)
    plain = ml.strip_masks(masked)
    np.testing.assert_array_equal(ops.convert_to_numpy(plain(x, context=context)), before)


class HoldsItself(layers.Dense):
    def get_config(self):
        options = {"a": [1]}
        options["a"].append(options)
        return {**super().get_config(), "options": options}


@pytest.mark.once
def test_a_config_that_holds_itself_is_named():
    inner = keras.Sequential([layers.Dense(3), HoldsItself(2, name="endless")], name="inner")
    model = keras.Sequential([keras.Input((4,)), inner])
    with pytest.raises(ValueError, match=r"'inner/endless' \(HoldsItself\) contains a dict"):
        ml.convert_to_masked(model)
