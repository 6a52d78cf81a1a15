"""Copies of a conversion: the exact functions and classes in use, and LoRA inside layers."""

import contextlib
import functools

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import HandingOn, data, half_masks, numpy
from masked_layers import _keras_configs
from masked_layers.copying import copy_model


def dense_net(*args, **kwargs):
    return keras.Sequential([keras.Input((4,)), layers.Dense(3, *args, **kwargs)])


def leaky(slope):
    def act(x):
        return ops.maximum(x, slope * x)

    return act


@pytest.mark.once
def test_two_closures_of_one_factory():
    x = -(data(5, 4) ** 2)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, leaky(0.1)), layers.Dense(3, leaky(0.5))]
    )
    masked = ml.convert_to_masked(model)
    np.testing.assert_array_equal(numpy(masked(x)), numpy(model(x)))
    for old, new in zip(model.layers, masked.layers, strict=True):
        assert new.activation is old.activation


@pytest.mark.once
def test_two_classes_of_one_name():
    def scaled(factor):
        class Scaled(layers.Layer):
            def build(self, shape):
                self.dense = layers.Dense(4)
                self.dense.build(shape)

            def call(self, x):
                return self.dense(x) * factor

        return Scaled

    model = keras.Sequential([keras.Input((4,)), scaled(1)(), scaled(2)()])
    masked = ml.convert_to_masked(model)
    stripped = ml.strip_masks(masked)
    assert [type(new) for new in stripped.layers] == [type(old) for old in model.layers]
    for copy in (masked, stripped):
        np.testing.assert_array_equal(numpy(copy(data(5, 4))), numpy(model(data(5, 4))))


@pytest.mark.once
def test_functions_named_like_those_of_keras_and_like_layers():
    def relu(x):
        return ops.sin(x)

    def mean_squared_error(y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred), axis=-1)

    def first(y_true, y_pred):  # A layer and a metric have the same name.
        return ops.mean(y_pred, axis=-1)

    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, relu, name="first"),
            layers.Dense(3, "relu", name="relu"),
        ]
    )
    metrics = [keras.metrics.MeanMetricWrapper(first, name="first"), "mean_squared_error"]
    model.compile("sgd", mean_squared_error, metrics=metrics)
    masked = ml.convert_to_masked(model)
    assert masked.layers[0].activation is relu
    assert masked.layers[1].activation is keras.activations.relu
    batch = data(8, 4), data(8, 3, seed=1)
    assert masked.evaluate(*batch, verbose=0) == model.evaluate(*batch, verbose=0)


class Warmup(keras.optimizers.schedules.LearningRateSchedule):
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, step):
        return self.rate * ops.minimum(1.0, (ops.cast(step, "float32") + 1) / 4)


class WarmupWithConfig(Warmup):
    def get_config(self):
        return {"rate": self.rate}


class MySGD(keras.optimizers.SGD):
    pass


def closeness(y_true, y_pred):
    return ops.mean(ops.abs(y_true - y_pred), axis=-1)


@pytest.mark.parametrize("schedule", [Warmup, WarmupWithConfig])
def test_what_a_model_is_compiled_with_needs_no_registration(schedule):
    keras.utils.set_random_seed(0)
    model = dense_net()
    optimizer = keras.optimizers.LossScaleOptimizer(MySGD(schedule(0.5), momentum=0.9))
    model.compile(
        optimizer,
        loss=lambda y, p: ops.mean(ops.square(y - p)),
        metrics=[keras.metrics.MeanMetricWrapper(closeness, name="closeness")],
    )
    batch = data(8, 4), data(8, 3, seed=1)
    fit = {"epochs": 2, "batch_size": 4, "shuffle": False, "verbose": 0}
    model.fit(*batch, **fit)
    masked = ml.convert_to_masked(model)
    assert type(masked.optimizer.inner_optimizer) is MySGD
    assert masked.optimizer.inner_optimizer is not model.optimizer.inner_optimizer
    histories = [m.fit(*batch, **fit).history for m in (model, masked)]
    assert histories[0] == histories[1]
    np.testing.assert_array_equal(model.get_weights()[0], masked.get_weights()[0])


@pytest.mark.once
def test_lambdas_anywhere_keep_what_they_refer_to():
    activation = lambda x: ops.tanh(x) * 2  # noqa: E731
    model = dense_net(activation, kernel_regularizer=lambda w: 0.1 * ops.sum(w * w))
    model.compile("sgd", loss=lambda y, p: ops.mean(ops.square(y - p)))
    masked = ml.convert_to_masked(model)
    assert masked.layers[0].activation is activation
    assert activation.__name__ == "<lambda>"
    batch = data(8, 4), data(8, 3, seed=1)
    assert masked.evaluate(*batch, verbose=0) == model.evaluate(*batch, verbose=0)


class Cap(keras.constraints.Constraint):
    def __init__(self, limit=2.0):
        self.limit = limit

    def __call__(self, w):
        return ops.clip(w, -self.limit, self.limit)


class Penalty(keras.regularizers.Regularizer):
    def __init__(self, factor=0.0):
        self.factor = factor

    def __call__(self, x):
        return self.factor * ops.sum(x * x)


class Filled(keras.initializers.Initializer):
    def __init__(self, value=0.0):
        self.value = value

    def __call__(self, shape, dtype=None, **kwargs):
        return ops.full(shape, self.value, dtype=dtype)


class Huber(keras.losses.Loss):
    def __init__(self, threshold):
        super().__init__(name="huber_of_ones_own")
        self.threshold = threshold

    def call(self, y_true, y_pred):
        return ops.mean(ops.minimum(ops.abs(y_true - y_pred), self.threshold), axis=-1)


@pytest.mark.once
def test_objects_with_incomplete_configs_are_shared():
    """Keras would use the defaults of its constructor for each of them, or fail."""
    model = dense_net(
        kernel_constraint=Cap(0.125),
        kernel_regularizer=Penalty(3.0),
        kernel_initializer=Filled(0.5),
    )
    model.compile(keras.optimizers.SGD(0.1), Huber(0.75))
    stripped = ml.strip_masks(ml.convert_to_masked(model))
    dense = stripped.layers[0]
    assert dense.kernel.constraint.limit == 0.125
    assert dense.kernel.regularizer.factor == 3.0
    assert dense.kernel_initializer.value == 0.5
    batch = data(8, 4), data(8, 3, seed=1)
    assert stripped.evaluate(*batch, verbose=0) == model.evaluate(*batch, verbose=0)


def scale(x, by):
    return x * by


class Shift:
    def __init__(self, by):
        self.by = by

    def __call__(self, x):
        return x + self.by

    def method(self, x):
        return x - self.by


@pytest.mark.once
@pytest.mark.parametrize(
    "activation",
    [functools.partial(scale, by=3.0), Shift(2.0), Shift(2.0).method],
    ids=["partial", "callable", "method"],
)
def test_callables_without_a_name(activation):
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(3, activation), layers.Dense(2, Shift(5.0))]
    )
    masked = ml.convert_to_masked(model)
    np.testing.assert_array_equal(numpy(masked(data(5, 4))), numpy(model(data(5, 4))))


def test_a_compiled_activation():
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        compiled = tf.function(lambda x: tf.nn.relu(x) * 2)
    elif keras.backend.backend() == "jax":
        import jax

        compiled = jax.jit(lambda x: jax.nn.relu(x) * 2)
    else:
        import torch

        compiled = torch.nn.functional.softplus
    model = dense_net(compiled)
    masked = ml.convert_to_masked(model)
    assert masked.layers[0].activation is compiled
    np.testing.assert_array_equal(numpy(masked(data(5, 4))), numpy(model(data(5, 4))))


@pytest.mark.once
def test_a_method_of_a_layer_is_refused():
    """Without care, the copy would keep using the layer of the original model."""
    model = dense_net(activation=layers.PReLU().call)
    with pytest.raises(ValueError, match="cannot be copied"):
        ml.convert_to_masked(model)


class Around(keras.Model):
    """Calls a layer that it is given."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def call(self, inputs):
        return self.inner(inputs)


class AroundItsOwn(Around):
    """Calls a layer that it makes."""

    def __init__(self):
        super().__init__(layers.Dense(2))


@pytest.mark.once
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Around(layers.Dense(2)), "was created by passing non-serializable argument"),
        (AroundItsOwn, "got an unexpected keyword argument 'trainable'"),
        (HandingOn, "name the arguments, as in `call(self, inputs, training=None)`, or pass"),
    ],
)
def test_a_model_without_a_config_is_refused_in_one_line(make, reason):
    model = make()
    model(data(5, 4))
    with pytest.raises(ValueError, match="cannot be copied") as caught:
        ml.convert_to_masked(model)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


class ByName(layers.Layer):
    """Writes the name of its function and looks it up in the scope of custom objects."""

    def __init__(self, function, **kwargs):
        super().__init__(**kwargs)
        self.function = function

    def call(self, x):
        return self.function(x)

    def get_config(self):
        return {**super().get_config(), "function": self.function.__name__}

    @classmethod
    def from_config(cls, config):
        function = keras.saving.get_registered_object(config.pop("function"))
        if function is None:
            raise ValueError("unknown function")
        return cls(function, **config)


@pytest.mark.once
def test_a_config_that_writes_names_itself():
    def double(x):
        return 2 * x

    model = keras.Sequential([keras.Input((4,)), ByName(double), layers.Dense(2)])
    assert ml.convert_to_masked(model).layers[0].function is double


@pytest.mark.once
def test_a_copy_makes_no_other_objects_of_registered_classes():
    made = []

    @keras.saving.register_keras_serializable("tests")
    class Picky(layers.Layer):
        @classmethod
        def from_config(cls, config):
            made.append(config["name"])
            return cls(**config)

        def call(self, x):
            return x

    ml.convert_to_masked(keras.Sequential([keras.Input((4,)), Picky(name="a"), layers.Dense(2)]))
    assert made == ["a"]


class ByAgreedName(ByName):
    def get_config(self):
        return {**layers.Layer.get_config(self), "function": "agreed"}


@pytest.mark.once
def test_an_outer_scope_of_custom_objects_still_counts():
    def double(x):
        return 2 * x

    model = keras.Sequential([keras.Input((4,)), ByAgreedName(double), layers.Dense(2)])
    with pytest.raises(ValueError, match="unknown function"):
        ml.convert_to_masked(model)
    with keras.saving.custom_object_scope({"agreed": double}):
        assert ml.convert_to_masked(model).layers[0].function is double


@pytest.mark.once
def test_nothing_stays_registered():
    registered = dict(keras.saving.get_custom_objects())
    names = _keras_configs.object_registration.GLOBAL_CUSTOM_NAMES
    before = dict(names)
    ml.convert_to_masked(dense_net(leaky(0.1)))
    with pytest.raises(ValueError, match="cannot be copied"):
        ml.convert_to_masked(dense_net(layers.PReLU().call))
    assert keras.saving.get_custom_objects() == registered
    assert _keras_configs.object_registration.GLOBAL_CUSTOM_NAMES is names
    assert names == before


# --- State that the config of the outer layer does not describe -----------------------------------


class Block(layers.Layer):
    def build(self, shape):
        self.up = layers.EinsumDense("ab,bc->ac", (6,))
        self.up.build(shape)
        self.down = layers.Dense(4)
        self.down.build((*shape[:-1], 6))

    def call(self, x):
        return x + self.down(self.up(x))


def attention():
    x = keras.Input((5, 4))
    return keras.Model(x, layers.MultiHeadAttention(2, 3)(x, x)), data(3, 5, 4)


def block():
    return keras.Sequential([keras.Input((4,)), Block(), layers.Dense(2)]), data(3, 4)


def adapt(model):
    """Enables LoRA on inner layers, with nonzero factors."""
    holder = next(layer for layer in model.layers if not isinstance(layer, layers.InputLayer))
    inner = [layer for layer in holder._flatten_layers() if hasattr(layer, "enable_lora")]
    for rank, layer in enumerate(inner[:2], start=1):
        layer.enable_lora(rank, lora_alpha=2 * rank)
        for seed, factor in enumerate((layer.lora_kernel_a, layer.lora_kernel_b)):
            factor.assign(data(*factor.shape, seed=seed))


@pytest.mark.parametrize("make", [attention, block])
@pytest.mark.parametrize("first", [True, False], ids=["adapted_first", "masked_first"])
def test_lora_inside_a_layer(make, first):
    model, x = make()
    if first:
        adapt(model)
        masked = ml.convert_to_masked(model)
        np.testing.assert_array_equal(numpy(masked(x)), numpy(model(x)))
    else:
        masked = ml.convert_to_masked(model)
        adapt(masked)
    half_masks(masked)
    again = ml.convert_to_masked(masked)
    np.testing.assert_array_equal(numpy(again(x)), numpy(masked(x)))
    trainable = [variable.trainable for variable in masked.variables]
    assert [variable.trainable for variable in again.variables] == trainable
    stripped = ml.strip_masks(masked)
    np.testing.assert_array_equal(numpy(stripped(x)), numpy(masked(x)))
    for masks, ref in zip(ml.get_masks(masked).values(), ml.weight_refs(stripped), strict=True):
        assert not numpy(ref.variable)[~masks].any()


def test_a_normalization_with_other_statistics_than_its_variables_stays_as_it_is():
    """Keras derives what it normalizes by in `adapt` and on loading, not in `set_weights`."""
    normalization = layers.Normalization()
    model = keras.Sequential([keras.Input((4,)), normalization, layers.Dense(3)])
    normalization.adapt(data(20, 4) + 1)
    x, mean, variance = data(3, 4), np.arange(4.0), np.arange(1.0, 5.0)
    normalization.set_weights([mean, variance, np.array(9)])
    before = numpy(model(x))
    stale = keras.backend.backend() != "torch"  # There, they are views of the variables.
    scaled = (x - mean) / np.sqrt(variance) @ numpy(model.layers[-1].kernel)
    assert np.allclose(before, scaled, rtol=1e-5, atol=1e-5) != stale
    said = pytest.warns(UserWarning, match="'normalization.*earlier mean and variance")
    with said if stale else contextlib.nullcontext():
        masked = ml.convert_to_masked(model)
    np.testing.assert_array_equal(numpy(masked(x)), before)
    masked.layers[0].finalize_state()
    np.testing.assert_allclose(numpy(masked(x)), scaled, rtol=1e-5, atol=1e-5)


def test_a_normalization_that_is_copied_in_another_dtype_uses_its_variables(recwarn):
    normalization = layers.Normalization(dtype="mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), normalization])
    normalization.adapt(data(20, 4))
    copy = copy_model(model, dtype="float32").layers[0]
    np.testing.assert_array_equal(numpy(copy.mean)[0], numpy(normalization.adapt_mean))
    assert not [each for each in recwarn if "Normalization" in str(each.message)]


@pytest.mark.once
def test_the_first_variable_that_differs_is_named():
    class Forgetful(keras.Model):
        def __init__(self, width=3, **kwargs):
            super().__init__(**kwargs)
            self.first = layers.Dense(5, name="first")
            self.second = layers.Dense(width, name="second")

        def build(self, shape):
            self.first.build(shape)
            self.second.build((None, 5))

        def call(self, x):
            return self.second(self.first(x))

        def get_config(self):
            return {}

    model = Forgetful(9)
    model.build((None, 4))
    with pytest.raises(ValueError, match=r"second/kernel' has shape \(5, 9\).*\(5, 3\)"):
        ml.convert_to_masked(model)


@pytest.mark.parametrize(
    "loss", [keras.losses.sparse_categorical_crossentropy, "sparse_categorical_crossentropy"]
)
def test_models_compiled_with_functions_of_keras_can_be_converted(loss):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3, keras.activations.softmax)])
    model.compile("adam", loss, metrics=[keras.metrics.sparse_categorical_accuracy, "accuracy"])
    x, y = np.ones((4, 6), "float32"), np.array([0, 1, 2, 1])
    masked = ml.convert_to_masked(model)
    found = masked.evaluate(x, y, verbose=0, return_dict=True)
    assert found == model.evaluate(x, y, verbose=0, return_dict=True)
    assert set(found) == {"loss", "sparse_categorical_accuracy", "accuracy"}


@pytest.mark.parametrize("loss", ["mean_squared_error", keras.losses.MeanSquaredError()])
def test_models_saved_as_h5_and_loaded_from_there_keep_their_optimizer(loss, tmp_path):
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3), layers.Dense(2)])
    model.compile(keras.optimizers.Adam(0.125), loss)
    model.fit(np.ones((4, 6)), np.ones((4, 2)), verbose=0)
    model.save(tmp_path / "a.h5")
    for source in (model, keras.models.load_model(tmp_path / "a.h5")):
        masked = ml.convert_to_masked(source)
        stripped = ml.strip_masks(masked)
        for copy in (masked, stripped):
            assert isinstance(copy.optimizer, keras.optimizers.Adam)  # on torch a subclass
            assert float(copy.optimizer.learning_rate) == 0.125
            assert int(copy.optimizer.iterations) == int(source.optimizer.iterations)
        # One of each kind is enough, because each is compiled again.
        trained = masked if source is model else stripped
        trained.fit(np.ones((4, 6)), np.ones((4, 2)), verbose=0)
