"""Private features of Keras that this library uses: these tests fail when Keras changes them."""

import ast
import concurrent.futures
import functools
import pickle
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

from common import HandingOn
from masked_layers import _keras, _keras_configs


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


def test_attributes_read_in_a_call_know_its_training_mode():
    seen = []

    class Watching(layers.Layer):
        def call(self, x, training=True):
            seen.append(_keras.is_training())
            return x

    model = keras.Sequential([keras.Input((2,)), keras.Sequential([Watching()])])
    seen.clear()
    for mode in (True, False, None):
        model(np.ones((1, 2)), training=mode)
    with _keras.inference_scope():
        model(np.ones((1, 2)))
    assert seen == [True, False, True, False]
    assert not _keras.is_training()


def test_calls_are_distinguished_from_code_outside():
    class Watching(layers.Layer):
        def call(self, x):
            seen.append(_keras.is_calling())
            return x

    seen = []
    model = keras.Sequential([keras.Input((2,)), Watching()])
    model(np.ones((1, 2)))
    model.predict_on_batch(np.ones((1, 2)))
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
    copy = _keras_configs.deserialize(_keras_configs.serialize(Twice(shared, shared)))
    assert copy.first is copy.second


def test_state_is_kept_separate_where_keras_saves_it_outside_the_config(tmp_path):
    seen = []

    class Watching(layers.Layer):
        def get_config(self):
            seen.append(_keras_configs.state_goes_apart())
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
    _keras_configs.serialize(model)
    assert len(seen) >= 3
    assert all(seen)


def test_generators_give_the_same_seeds_in_a_scope_and_others_outside():
    def draw(generator):
        return ops.convert_to_numpy(keras.random.uniform((3,), seed=generator)).tolist()

    first, second = keras.random.SeedGenerator(1), keras.random.SeedGenerator(2)
    draws = []
    for generators in ((first, second), (second, first)):
        with _keras.same_draws():
            draws.append([draw(generator) for generator in generators])
            with concurrent.futures.ThreadPoolExecutor() as threads:
                draws.append(threads.submit(draw, keras.random.SeedGenerator(3)).result())
    assert draws[0] == draws[2]
    assert draws[0][0] != draws[0][1]
    assert draws[1] == draws[3] == draw(keras.random.SeedGenerator(3))
    assert draw(keras.random.SeedGenerator(1)) == draw(first) != draw(second)


def test_own_variables_exclude_those_of_inner_layers():
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


def test_names():
    assert _keras.to_snake_case("MultiHeadAttention") == "multi_head_attention"
    assert _keras.to_snake_case("Conv2D") == "conv2d"
    assert _keras.ConvLSTMCell.__name__ == "ConvLSTMCell"
    assert isinstance(layers.ConvLSTM2D(1, 1).cell, _keras.ConvLSTMCell)
    assert _keras_configs.get_registered_name(layers.Dense) == "Dense"


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
    with _keras_configs.identity_scope():
        configs = [keras.activations.serialize(f) for f in (first, second, partial, ops.relu)]
        for config, function in zip(configs[:3], (first, second, partial), strict=True):
            assert keras.activations.get(config) is function
    assert configs[3] == keras.activations.serialize(ops.relu)
    with pytest.raises(TypeError, match="Could not locate function"):
        keras.activations.get(configs[0])
    assert keras.saving.get_registered_name(first) == "activation"


def test_a_custom_object_scope_takes_precedence_and_keeps_the_outer_one():
    def outer():
        return None

    with keras.saving.custom_object_scope({"outer": outer}):
        with _keras_configs.custom_object_scope({"inner": test_sublayers_are_the_tracked_children}):
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


def test_flatten_lists_a_layer_and_all_inside_it():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    model = keras.Sequential([keras.Input((4,)), inner])
    assert {id(model), id(inner), id(inner.layers[0])} <= set(map(id, _keras.flatten(model)))


def test_optimized_variables_are_those_an_optimizer_was_built_for():
    kernel, bias = keras.Variable(np.ones((2, 3))), keras.Variable(np.ones(3))
    optimizer = keras.optimizers.Adam()
    assert _keras.optimized_variables(optimizer) == []
    optimizer.build([bias, kernel])
    assert list(map(id, _keras.optimized_variables(optimizer))) == [id(bias), id(kernel)]


@pytest.mark.parametrize("condition", [False, True])
def test_cond_calls_one_function_outside_of_a_traced_one(condition):
    called = []

    def branch(number):
        return lambda: called.append(number) or ops.convert_to_tensor(number)

    value = _keras.cond(ops.convert_to_tensor(condition), branch(1), branch(2))
    assert int(value) == (1 if condition else 2)
    if keras.backend.backend() == "jax":  # where `ops.cond` would compile both
        assert called == [int(value)]


@pytest.mark.parametrize("scaled", [False, True])
def test_exclude_like_copies_what_weight_decay_leaves_out(scaled):
    def sgd():
        optimizer = keras.optimizers.SGD(0.1, weight_decay=0.5)
        return keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer

    def inner(optimizer):
        return optimizer.inner_optimizer if scaled else optimizer

    variables = [keras.Variable(np.ones(2), name=name) for name in ("kernel", "scale", "bias")]
    others = [keras.Variable(np.ones(2), name=name) for name in ("kernel", "scale", "bias")]
    old, new, never = sgd(), sgd(), sgd()
    inner(old).exclude_from_weight_decay(var_list=[variables[1]], var_names=["bias"])
    _keras.exclude_like(old, new, zip(variables, others, strict=True))
    _keras.exclude_like(never, new, zip(variables, others, strict=True))  # nothing to copy
    inner(new).build(others)
    inner(new).apply([ops.zeros(2)] * 3, others)
    found = [ops.convert_to_numpy(variable).tolist() for variable in others]
    np.testing.assert_allclose(found, [[0.95, 0.95], [1, 1], [1, 1]])


def test_values_assigned_by_a_callback_outlive_a_sync():
    """`fit` on JAX has its own state, which is written back at the end."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.0), "mse")

    class Assign(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            _keras.sync(self.model)
            (kernel,) = self.model.weights
            seen.append(ops.convert_to_numpy(kernel).copy())
            kernel.assign(np.full((4, 2), batch + 2.0))

    seen = []
    x, y = np.ones((6, 4), "float32"), np.ones((6, 2), "float32")
    model.fit(x, y, batch_size=2, verbose=0, callbacks=[Assign()])
    np.testing.assert_array_equal(seen[1], np.full((4, 2), 2.0))
    np.testing.assert_array_equal(seen[2], np.full((4, 2), 3.0))
    np.testing.assert_array_equal(model.get_weights()[0], np.full((4, 2), 4.0))


@pytest.mark.once("jax")
def test_withdrawn_and_lent_values_are_distinguished():
    new, variable = keras.Variable(np.ones(2)), keras.Variable(np.ones(2))
    with keras.StatelessScope():
        assert not _keras.is_withdrawn(variable)
        assert not _keras.is_lent(variable)
    value, variable._value = variable._value, None
    with keras.StatelessScope():
        assert _keras.is_withdrawn(variable)
        assert not _keras.is_withdrawn(new)
    with keras.StatelessScope(state_mapping=[(variable, value)]):
        assert _keras.is_lent(variable)
        assert not _keras.is_withdrawn(variable)
        assert not _keras.is_lent(new)
    variable._value = value
    assert not _keras.is_withdrawn(variable)


@pytest.mark.once("torch")
def test_parameters_of_torch_are_seen_after_they_are_added():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    layer = model.layers[0]
    before = len(model.state_dict())
    with _keras.unlocked(layer):
        layer.extra = layer.add_weight(shape=(3,), name="extra")
    _keras.refresh_parameters(model)
    assert len(model.state_dict()) == before + 1


@pytest.mark.once("torch")
def test_layouts_of_torch_are_those_of_the_weight():
    like = keras.Variable(np.arange(6.0).reshape(2, 3))
    like.value.data = like.value.data.T.contiguous().T
    variable = keras.Variable(np.arange(6.0).reshape(2, 3) + 1)
    _keras.match_layout(variable, like)
    assert variable.value.stride() == like.value.stride() == (1, 2)
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), np.arange(6).reshape(2, 3) + 1)


@pytest.mark.once("jax")
def test_layouts_of_jax_are_those_of_the_weight():
    mesh = keras.distribution.DeviceMesh((1,), ["batch"], keras.distribution.list_devices()[:1])
    like, variable = keras.Variable(np.ones((2, 3))), keras.Variable(np.ones((2, 3)))
    like._layout = keras.distribution.TensorLayout((None, None), mesh)
    _keras.match_layout(variable, like)
    assert variable._layout is like._layout
    np.testing.assert_array_equal(ops.convert_to_numpy(variable), np.ones((2, 3)))


def test_a_layer_tells_that_it_was_built_however_it_was():
    told = []

    class Inner(keras.Model):  # Without a `build`: built by running it.
        def __init__(self):
            super().__init__()
            self.dense = layers.Dense(2)

        def call(self, x):
            return self.dense(x)

    for layer, config in ((layers.Dense(2), None), (Inner(), {"input_shape": (1, 3)})):
        _keras.call_when_built(
            layer,
            lambda layer=layer: told.append(("built", len(layer.weights))),
            lambda layer=layer: told.append(("restored", len(layer.weights))),
        )
        if config is None:
            layer(np.ones((1, 3)))
        else:
            layer.build_from_config(config)
    assert told == [("built", 2), ("restored", 2)]


@pytest.mark.skipif("quantize" not in vars(layers.Dense(1)), reason="bound until Keras 3.15")
def test_keras_binds_quantize_to_a_layer_and_it_can_be_bound_again():
    layer, calls = built_dense(), []
    bound = vars(layer)["quantize"]

    class Other(layers.Dense):
        quantize = None  # Nobody looks here.

    layer.__class__ = Other
    assert layer.quantize is bound
    _keras.bind_quantize(layer, lambda mode: calls.append(mode))
    layer.quantize("int8")
    assert calls == ["int8"]
    _keras.unbind_quantize(layer)
    _keras.unbind_quantize(layer)
    assert layer.quantize is bound


def test_an_attribute_is_another_one_until_the_end_and_is_not_tracked():
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3)])
    model.compile("sgd", "mse")
    optimizer = model.optimizer
    with _keras.replaced(model, "optimizer", None):
        assert model.optimizer is None
    assert model.optimizer is optimizer
    with _keras.replaced(model.layers[0], "call", lambda x: x + 1):
        np.testing.assert_array_equal(model(np.zeros((1, 4))), np.ones((1, 4)))
    assert "call" not in vars(model.layers[0])


def test_inputs_are_named_in_the_structure_that_the_model_takes():
    a, b = keras.Input((4,), name="a"), keras.Input((2, 3), dtype="int32", name="b")
    model = keras.Model({"b": b, "a": a}, layers.Dense(1)(a))
    specs = _keras.input_specs(model)
    assert {name: (spec.shape, spec.dtype) for name, spec in specs.items()} == {
        "a": ((None, 4), "float32"),
        "b": ((None, 2, 3), "int32"),
    }


def test_inputs_for_exports_have_the_structure_of_the_arguments():
    a, b = keras.Input((4,), name="a"), keras.Input((2, 3), dtype="int32", name="b")
    model = keras.Model({"b": b, "a": a}, layers.Dense(1)(a))
    model._called = False  # As in a copy, for which being built is enough.
    specs = _keras.export_specs(model)
    assert not model._called
    (arguments,) = specs
    assert {name: (tuple(spec.shape), spec.dtype) for name, spec in arguments.items()} == {
        "a": ((None, 4), "float32"),
        "b": ((None, 2, 3), "int32"),
    }


@pytest.mark.once
def test_inputs_of_a_call_that_names_no_arguments_are_hidden():
    model = HandingOn()
    assert _keras.takes_any_arguments(model)
    assert not _keras.hides_inputs(model)  # It is not built yet.
    model(np.zeros((1, 4)))
    assert _keras.hides_inputs(model)
    inputs = keras.Input((4,))
    assert not _keras.hides_inputs(keras.Model(inputs, layers.Dense(1)(inputs)))


@pytest.mark.once
def test_all_that_is_private_to_keras_has_a_test():
    """Each function of a module `_keras*.py` is named in a test, as `_keras.NAME`."""
    root = Path(__file__).parents[2]
    tests = "".join(file.read_text("utf-8") for file in (root / "tests").rglob("test_*.py"))
    modules = [
        *(root / "masked_layers").rglob("_keras*.py"),
        *(root / "lottery_ticket_pruner").rglob("_keras*.py"),
    ]
    names = [
        node.name
        for module in modules
        for node in ast.parse(module.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
    ]
    assert len(modules) >= 4
    assert [name for name in names if not re.search(rf"\b_keras\w*\.{name}\b", tests)] == []
