"""Private features of Keras that the pruner uses: these tests fail when Keras changes them."""

import keras
import numpy as np
import pytest
from keras import layers, ops

from lottery_ticket_pruner import _keras

X, Y = np.ones((6, 4), "float32"), np.ones((6, 2), "float32")


def dense(**kwargs):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "mse", **kwargs)
    return model


def test_layers_of_float64_compute_in_float64():
    third = np.full((2, 3), 1 / 3)
    with _keras.double_precision():
        x = ops.convert_to_tensor(third, dtype="float64")
        dense = layers.Dense(2, activation="tanh", kernel_initializer="ones", dtype="float64")
        outputs = [ops.mean(x, axis=-1), dense(x)]
        for output, expected in zip(outputs, [1 / 3, np.tanh(1.0)], strict=True):
            assert keras.backend.standardize_dtype(output.dtype) == "float64"
            np.testing.assert_allclose(ops.convert_to_numpy(output), expected, rtol=1e-15)
    if keras.backend.backend() != "tensorflow":
        assert keras.backend.result_type("float64", "float32") == "float32"
    if keras.backend.backend() == "jax":
        assert ops.convert_to_tensor(third).dtype == "float32"


def test_the_loss_is_built_without_the_optimizer():
    outputs = [layers.Dense(2, name="a"), layers.Dense(1, name="b")]
    inputs = keras.Input((4,))
    model = keras.Model(inputs, [layer(inputs) for layer in outputs])
    model.compile("adam", ["mse", "mae"])
    batch = (np.ones((3, 4)), [np.ones((3, 2)), np.ones((3, 1))])
    _keras.build_loss(model, batch)
    assert len(model.metrics_variables) > 2  # those of each loss besides those of their sum
    assert not model.optimizer.built
    x, y = batch
    loss = _keras.training_loss(model, (ops.convert_to_tensor(x), y))
    expected = model.evaluate(x, y, verbose=0, return_dict=True)["loss"]
    np.testing.assert_allclose(ops.convert_to_numpy(loss), expected, rtol=1e-5)


def test_output_layers_and_input_specs():
    inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((2,), dtype="int32", name="b")}
    dense, cast = layers.Dense(2), layers.Lambda(lambda x: ops.cast(x, "float32"))
    model = keras.Model(inputs, [dense(inputs["a"]), cast(inputs["b"])])
    assert _keras.output_layers(model) == [dense, cast]
    specs = _keras.input_specs(model)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "a": ((None, 4), "float32"),
        "b": ((None, 2), "int32"),
    }
    last = layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2), last])
    assert _keras.output_layers(model) == [last]
    assert _keras.input_specs(model).shape == (None, 4)

    class Subclassed(keras.Model):
        def call(self, x):
            return last(x)

    model = Subclassed()
    with pytest.raises(ValueError, match="not known"):
        _keras.input_specs(model)
    model(np.ones((1, 2), "float32"))
    assert _keras.input_specs(model).shape == (1, 2)
    assert _keras.output_layers(model) == []


def test_seed_variables_are_those_of_every_layer_inside():
    inner = keras.Sequential([keras.Input((4,)), layers.Dropout(0.5), layers.Dense(2)])
    model = keras.Sequential([keras.Input((4,)), inner, layers.GaussianNoise(1.0)])
    seeds = _keras.seed_variables(model)
    assert len(seeds) == 2
    assert {id(seed) for seed in seeds} <= {id(v) for v in model.non_trainable_variables}
    assert inner in _keras.flatten(model)


def test_a_replaced_method_is_what_keras_calls_until_the_end():
    model = dense()
    plain = model.predict_on_batch(X)
    layer = model.layers[0]
    tracked = len(_keras.flatten(model)), len(model.variables)
    with _keras.replaced(layer, "call", lambda inputs, **kwargs: inputs[:, :2] + 5):
        model.predict_function = None
        np.testing.assert_array_equal(model.predict_on_batch(X), np.full((6, 2), 6.0))
        assert (len(_keras.flatten(model)), len(model.variables)) == tracked
        with pytest.raises(KeyError), _keras.replaced(layer, "call", None):
            raise KeyError
        assert layer.call(X).mean() == 6  # The old method is restored, even after an error.
    model.predict_function = None
    assert "call" not in vars(layer)
    np.testing.assert_array_equal(model.predict_on_batch(X), plain)


def test_a_layer_made_the_identity_returns_its_inputs():
    model = keras.Sequential([keras.Input((4,)), layers.Softmax()])
    _keras.make_identity(model.layers[0])
    x = np.arange(8, dtype="float32").reshape(2, 4)
    np.testing.assert_array_equal(model.predict_on_batch(x), x)


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, keras.optimizers.LossScaleOptimizer])
def test_slots_are_reported_with_their_variables(wrap):
    variables = [keras.Variable(np.ones((2, 3))), keras.Variable(np.ones((2, 3)))]
    optimizer = wrap(keras.optimizers.Adam())
    made = []
    _keras.watch_slots(optimizer, lambda variable, slot: made.append((variable, slot)))
    optimizer.build(variables)
    for variable in variables:
        assert len([slot for one, slot in made if one is variable]) == 2  # of Adam
    assert {id(slot) for _, slot in made} <= {id(slot) for slot in optimizer.variables}


def test_slots_are_told_however_the_optimizer_names_the_variable():
    # Adafactor passes the variable by name.
    variables, made = [keras.Variable(np.ones((2, 3)))], []
    optimizer = keras.optimizers.Adafactor()
    _keras.watch_slots(optimizer, lambda variable, slot: made.append((variable, slot)))
    optimizer.build(variables)
    assert made
    assert all(variable is variables[0] for variable, _ in made)


def test_a_symbolic_build_creates_what_fit_would():
    model = dense(metrics=["mae"])
    assert not model.optimizer.built
    _keras.symbolic_build(model, (X, Y))
    assert model.optimizer.built
    built = len(model.optimizer.variables), len(model.metrics_variables)
    model.fit(X, Y, verbose=0)
    assert (len(model.optimizer.variables), len(model.metrics_variables)) == built


def test_withdrawn_variables_have_no_value_until_the_end():
    variables = [keras.Variable(np.ones(2)), keras.Variable(np.zeros(3))]
    with _keras.withdrawn(variables[:1], variables[1:]) as (ones, zeros):
        assert [variable._value for variable in variables] == [None, None]
        np.testing.assert_array_equal(ops.convert_to_numpy(ones[0]), np.ones(2))
        np.testing.assert_array_equal(ops.convert_to_numpy(zeros[0]), np.zeros(3))
    np.testing.assert_array_equal(ops.convert_to_numpy(variables[0]), np.ones(2))


@pytest.mark.parametrize("failing", [0, 1])
def test_values_are_kept_where_training_fails(failing):
    """At this point, Keras on JAX has removed the values from the variables."""
    model = dense()

    class Fail(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == failing:
                raise KeyError("on purpose")

    before = model.get_weights()
    with pytest.raises(KeyError, match="on purpose"), _keras.kept_on_error(model):
        model.fit(X, Y, batch_size=2, verbose=0, callbacks=[Fail()])
    after = model.get_weights()  # An error if the values are missing.
    assert all(np.array_equal(*pair) for pair in zip(before, after, strict=True)) == (failing == 0)
    assert "_purge_model_variables" not in vars(model)
    model.fit(X, Y, verbose=0)


def test_a_loss_that_regularizes_and_takes_weights_is_that_of_a_training_step():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, kernel_regularizer="l2")])
    model.compile("sgd", "mse")
    weights = np.arange(6, dtype="float32")
    batch = tuple(ops.convert_to_tensor(array) for array in (X, Y, weights))
    _keras.build_loss(model, (X, Y, weights))
    loss = ops.convert_to_numpy(_keras.training_loss(model, batch))
    np.testing.assert_allclose(loss, model.train_on_batch(X, Y, weights), rtol=1e-6)
