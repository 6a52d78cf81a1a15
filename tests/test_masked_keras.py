"""What this library uses of Keras beyond its public API: these fail when Keras moves it."""

import functools
import pickle

import keras
import numpy as np
import pytest
from keras import layers, ops

from masked_layers import _keras


def built_dense():
    layer = layers.Dense(3, name="d")
    layer.build((None, 4))
    return layer


def test_sublayers_are_the_tracked_children():
    wrapper = layers.TimeDistributed(layers.Dense(2))
    assert _keras.sublayers(wrapper) == [wrapper.layer]


def test_unlocked_allows_new_state_and_locks_again():
    layer = built_dense()
    with pytest.raises(ValueError, match="already built"):
        layer.extra = layers.Dense(1)
    with _keras.unlocked(layer):
        layer.extra = layers.Dense(1)
    assert _keras.sublayers(layer) == [layer.extra]
    with pytest.raises(ValueError, match="already built"):
        layer.more = layers.Dense(1)
    _keras.untrack(layer, "extra")
    assert _keras.sublayers(layer) == []
    assert not hasattr(layer, "extra")


def test_untrack_variable_takes_it_out_of_the_state():
    layer = built_dense()
    bias = layer.bias
    _keras.untrack_variable(layer, "bias")
    assert id(bias) not in map(id, layer.variables)
    assert layer.bias is bias
    with pytest.raises(ValueError, match="already built"):
        layer.extra = layers.Dense(1)


def test_the_mode_of_a_call_reaches_what_is_read_in_it():
    seen = []

    class Watching(layers.Layer):
        def call(self, x):
            seen.append(_keras.is_training())
            return x

    model = keras.Sequential([keras.Input((2,)), keras.Sequential([Watching()])])
    seen.clear()
    model(np.ones((1, 2)), training=True)
    model(np.ones((1, 2)))
    model(np.ones((1, 2)), training=False)
    assert seen == [True, False, False]
    assert not _keras.is_training()


def test_calls_are_told_from_what_is_outside_of_them():
    class Watching(layers.Layer):
        def call(self, x):
            seen.append(_keras.is_calling())
            return x

    seen = []
    model = keras.Sequential([keras.Input((2,)), Watching()])
    model(np.ones((1, 2)))
    model.predict(np.ones((1, 2)), verbose=0)
    assert len(seen) >= 2
    assert all(seen)
    assert not _keras.is_calling()


def test_layer_scope_names_variables_after_a_built_layer():
    layer = built_dense()
    with keras.name_scope("elsewhere"), _keras.layer_scope(layer):
        variable = keras.Variable(np.zeros(1), name="v")
    assert variable.path == f"{layer.path}/v"
    with keras.name_scope("elsewhere"):
        assert keras.Variable(np.zeros(1), name="v").path == "elsewhere/v"


def test_functional_and_plain_containers():
    x = keras.Input((4,))
    model = keras.Model(x, layers.Dense(2)(x))
    assert _keras.is_functional(model)
    assert not _keras.is_functional(layers.Dense(2))
    for container in (model, keras.Sequential(), layers.TimeDistributed(layers.Dense(1))):
        assert _keras.is_plain_container(container)

    class Mine(keras.Model):
        pass

    assert not _keras.is_plain_container(Mine(x, layers.Dense(2)(x)))
    assert not _keras.is_plain_container(layers.Bidirectional(layers.LSTM(1)))


def test_shared_objects_stay_shared_through_serialize():
    @keras.saving.register_keras_serializable("tests")
    class Twice(layers.Layer):
        def __init__(self, first, second, **kwargs):
            super().__init__(**kwargs)
            self.first, self.second = first, second

        def get_config(self):
            return {**super().get_config(), "first": self.first, "second": self.second}

        @classmethod
        def from_config(cls, config):
            for key in ("first", "second"):
                config[key] = keras.saving.deserialize_keras_object(config[key])
            return cls(**config)

    shared = layers.Dense(2)
    copy = _keras.deserialize(_keras.serialize(Twice(shared, shared)))
    assert copy.first is copy.second


def test_state_goes_apart_where_keras_saves_it_beside_the_config(tmp_path):
    seen = []

    class Watching(layers.Layer):
        def get_config(self):
            seen.append(_keras.state_goes_apart())
            return super().get_config()

    model = keras.Sequential([keras.Input((2,)), Watching()])
    for config_alone in (model.get_config, model.to_json, lambda: keras.models.clone_model(model)):
        config_alone()
    model.save(tmp_path / "m.h5")
    assert seen
    assert not any(seen)
    seen.clear()
    model.save(tmp_path / "m.keras")
    pickle.dumps(model)
    _keras.serialize(model)
    assert len(seen) >= 3
    assert all(seen)


def test_own_variables_leave_out_those_of_layers_inside():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    assert _keras.own_variables(model) == []
    assert len(_keras.own_variables(model.layers[0])) == 4


def test_compile_arguments_are_the_objects_that_were_passed():
    def loss(y_true, y_pred):
        return y_pred

    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    assert _keras.compile_arguments(model) == []
    model.compile("sgd", loss)
    assert loss in _keras.compile_arguments(model)


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
    assert len(model.metrics_variables) > 2  # those of each loss beside those of their sum
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


def test_names():
    assert _keras.to_snake_case("MultiHeadAttention") == "multi_head_attention"
    assert _keras.to_snake_case("Conv2D") == "conv2d"
    assert _keras.ConvLSTMCell.__name__ == "ConvLSTMCell"
    assert isinstance(layers.ConvLSTM2D(1, 1).cell, _keras.ConvLSTMCell)
    assert _keras.get_registered_name(layers.Dense) == "Dense"


def test_a_copy_can_be_exported_where_the_original_can():
    called, copy = keras.Sequential([layers.Dense(2)]), keras.Sequential([layers.Dense(2)])
    called(np.zeros((1, 3), "float32"))
    assert called._called
    assert not copy._called
    _keras.copy_called(called, copy)
    assert copy._called


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras cannot export there")
def test_export_signature_is_the_one_of_keras_export():
    tf = pytest.importorskip("tensorflow")
    x = {"a": keras.Input((4,), name="a"), "b": keras.Input((2,), dtype="int32", name="b")}
    model = keras.Model(x, layers.Dense(2)(x["a"]) + ops.cast(x["b"], "float32"))
    (spec,) = _keras.export_signature(model)
    assert spec == {
        "a": tf.TensorSpec((None, 4), "float32", "a"),
        "b": tf.TensorSpec((None, 2), "int32", "b"),
    }
    given = [keras.InputSpec(shape=(3, 4), dtype="float32", name="c")]
    assert _keras.export_signature(model, given) == [tf.TensorSpec((3, 4), "float32", "c")]

    class BuiltNotCalled(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

    model = BuiltNotCalled()
    model.build((None, 4))
    (spec,) = _keras.export_signature(model)
    assert spec.shape.as_list() == [None, 4]
    assert not model._called


def test_in_an_identity_scope_configs_stand_for_the_objects_themselves():
    def named(value):
        def activation(x):
            return x * value

        return activation

    first, second, partial = named(1), named(2), functools.partial(ops.multiply, 2)
    with _keras.identity_scope():
        configs = [keras.activations.serialize(f) for f in (first, second, partial, ops.relu)]
        for config, function in zip(configs[:3], (first, second, partial), strict=True):
            assert keras.activations.get(config) is function
        assert configs[3] == "relu"
    with pytest.raises(TypeError, match="Could not locate function"):
        keras.activations.get(configs[0])
    assert keras.saving.get_registered_name(first) == "activation"


def test_a_custom_object_scope_goes_before_what_is_registered_and_keeps_the_outer_one():
    def outer():
        return None

    with keras.saving.custom_object_scope({"outer": outer}):
        with _keras.custom_object_scope({"inner": test_sublayers_are_the_tracked_children}):
            assert keras.saving.get_registered_object("outer") is outer
            found = keras.saving.get_registered_object("inner")
            assert found is test_sublayers_are_the_tracked_children
        assert keras.saving.get_registered_object("inner") is None


def test_sublayers_are_put_in_another_order():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.members = [layers.Dense(1, name=name) for name in "abc"]

    block = Block()
    block.members[0].build((2,)), block.members[2].build((2,))
    a, b, c = block.members
    _keras.order_sublayers(block, [c, a])  # `b` keeps its place.
    assert _keras.sublayers(block) == [c, b, a]
    assert [id(w) for w in block.weights] == [id(w) for w in (*c.weights, *a.weights)]
