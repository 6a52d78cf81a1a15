"""Converting models to masked ones and back."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner._keras import double_precision
from masked_layers.copying import copy_model

BACKEND = keras.backend.backend()


def numpy(x):
    return np.array(ops.convert_to_numpy(x))


def half_masks(model, seed=1):
    rng = np.random.default_rng(seed)
    ml.set_masks(model, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(model).items()})


def data(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def names(model):
    # Sequential makes its input layer itself.
    kinds = (ml.Mask, layers.InputLayer)
    return [layer.name for layer in model._flatten_layers() if not isinstance(layer, kinds)]


def assert_equal_outputs(a, b, inputs):
    for x, y in zip(keras.tree.flatten(a(inputs)), keras.tree.flatten(b(inputs)), strict=True):
        assert np.std(numpy(x)) > 0  # Equality of constant outputs would prove nothing.
        np.testing.assert_array_equal(numpy(x), numpy(y))


def assert_round_trips(plain, inputs, tmp_path, custom_objects=None):
    """Converts, masks, saves, loads, strips: equal outputs at each step, the original untouched."""
    before = plain.get_weights()
    masked = ml.convert_to_masked(plain)
    assert isinstance(masked, type(plain))
    assert masked.name == plain.name
    assert [w.name for w in masked.weights] == [w.name for w in plain.weights]
    assert names(masked) == names(plain)
    assert_equal_outputs(plain, masked, inputs)
    half_masks(masked)
    masked.save(tmp_path / "masked.keras")
    loaded = keras.models.load_model(tmp_path / "masked.keras", custom_objects=custom_objects)
    assert_equal_outputs(masked, loaded, inputs)
    for path, mask in ml.get_masks(masked).items():
        np.testing.assert_array_equal(mask, ml.get_masks(loaded)[path])
    for a, b in zip(masked.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    stripped = ml.strip_masks(loaded)
    assert type(stripped) is type(plain)
    assert_equal_outputs(masked, stripped, inputs)
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.get_masks(stripped)
    for a, b in zip(before, plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in plain._flatten_layers())
    return masked


PROGRAM = """
import keras
import numpy as np
from keras import layers

class Block(layers.Layer):
    def __init__(self, units, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.dense = layers.Dense(units)

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return self.dense(x) + 1

    def get_config(self):
        return {**super().get_config(), "units": self.units}
"""


@pytest.mark.once
def test_a_masked_block_of_ones_own_loads_in_a_fresh_process(tmp_path):
    own = {}
    exec(PROGRAM, own)
    model = ml.convert_to_masked(
        keras.Sequential([keras.Input((4,)), own["Block"](3), layers.Dense(2)])
    )
    half_masks(model)
    model.save(tmp_path / "masked.keras")
    program = PROGRAM + (
        "import masked_layers\n"
        "model = keras.models.load_model('masked.keras', custom_objects={'Block': Block})\n"
        "np.save('y.npy', keras.ops.convert_to_numpy(model(np.ones((1, 4), 'float32'))))\n"
    )
    root = str(Path(ml.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "KERAS_BACKEND": BACKEND}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    y = numpy(model(np.ones((1, 4), "float32")))
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), y)


# --- Kinds of models ------------------------------------------------------------------------------


def test_sequential(tmp_path):
    model = keras.Sequential([keras.Input((4,)), layers.Dense(8, "relu"), layers.Dense(3)])
    assert_round_trips(model, data(5, 4), tmp_path)


def test_unbuilt_sequential_is_masked_when_it_is_built(tmp_path):
    model = keras.Sequential(
        [layers.Conv1D(3, 2), layers.LSTM(4, return_sequences=True), layers.Dense(2)]
    )
    masked = ml.convert_to_masked(model)
    assert not masked.built
    assert not model.built
    masked.build((None, 6, 4))
    assert len(ml.get_masks(masked)) == 4
    half_masks(masked)
    masked.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert_equal_outputs(masked, loaded, data(2, 6, 4))


def test_unbuilt_attention_is_masked_when_it_is_built():
    class Block(keras.Model):
        def __init__(self):
            super().__init__()
            self.attention = layers.MultiHeadAttention(2, 3)

        def call(self, x):
            return self.attention(x, x)

    model = ml.convert_to_masked(Block(), inplace=True)
    model(data(2, 5, 4))
    assert len(ml.get_masks(model)) == 4


def test_an_unbuilt_layer_that_may_make_others_in_build_is_refused():
    class Lazy(layers.Layer):
        def build(self, shape):
            self.inner = layers.Dense(3)
            self.inner.build(shape)

        def call(self, x):
            return self.inner(x)

    def model():
        return keras.Sequential([Lazy(name="lazy"), layers.Dense(2)])

    with pytest.raises(ValueError, match=r"not built yet, and 'lazy' \(Lazy\).*exclude"):
        ml.convert_to_masked(model())
    built = model()
    built.build((None, 4))
    assert list(ml.get_masks(ml.convert_to_masked(built))) == ["lazy/inner/kernel", "dense/kernel"]
    masked = ml.convert_to_masked(model(), exclude="lazy")
    masked.build((None, 4))
    assert list(ml.get_masks(masked)) == ["dense/kernel"]


def test_functional_with_several_inputs_and_outputs_and_a_shared_layer(tmp_path):
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    shared = layers.Dense(6, "tanh", name="shared")
    both = layers.Concatenate()([shared(a), shared(b)])
    model = keras.Model(
        {"a": a, "b": b}, {"x": layers.Dense(2)(both), "y": layers.Dense(3)(shared(a))}
    )
    masked = assert_round_trips(model, {"a": data(3, 4), "b": data(3, 4, seed=1)}, tmp_path)
    assert len(ml.get_masks(masked)) == 3
    layer = masked.get_layer("shared")
    assert len(layer._inbound_nodes) == 3


def test_nested_models_to_any_depth(tmp_path):
    def encoder():
        inner = keras.Sequential([keras.Input((4,)), layers.Dense(5, name="deep")], name="inner")
        x = keras.Input((4,))
        return keras.Model(x, layers.Dense(6, "relu")(inner(x)), name="encoder")

    x = keras.Input((4,))
    block = encoder()
    model = keras.Model(x, layers.Dense(2)(layers.Add()([block(x), block(x)])))
    masked = assert_round_trips(model, data(3, 4), tmp_path)
    assert list(ml.get_masks(masked)) == [
        "encoder/inner/deep/kernel",
        "encoder/dense/kernel",
        "dense/kernel",
    ]


def test_bidirectional_time_distributed_and_attention_inside(tmp_path):
    x = keras.Input((6, 4))
    y = layers.TimeDistributed(layers.Dense(4))(x)
    y = layers.MultiHeadAttention(2, 3)(y, y)
    y = layers.Bidirectional(layers.GRU(3, return_sequences=True))(y)
    y = layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)]))(y)
    model = keras.Model(x, y)
    masked = assert_round_trips(model, data(2, 6, 4), tmp_path)
    assert len(ml.get_masks(masked)) == 1 + 4 + 4 + 4


@keras.saving.register_keras_serializable("tests")
class Widths(keras.Model):
    """A Functional subclass with a config of its own."""

    def __init__(self, width, **kwargs):
        x = keras.Input((4,))
        super().__init__(x, layers.Dense(2)(layers.Dense(width, "relu")(x)), **kwargs)
        self.width = width

    def get_config(self):
        return {"width": self.width, "name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_functional_subclass_with_its_own_config(tmp_path):
    assert_round_trips(Widths(7), data(3, 4), tmp_path)


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A composite that makes its layers itself and does not serialise them."""

    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.body = keras.Sequential([layers.Dense(width, "relu"), layers.Dense(width)])
        self.branches = [layers.Dense(width), layers.Dense(width)]
        self.by_name = {"gate": layers.Dense(width, "sigmoid")}

    def build(self, shape):
        self.body.build(shape)
        for layer in (*self.branches, self.by_name["gate"]):
            layer.build(shape)

    def call(self, x):
        gate = self.by_name["gate"](x)
        return self.body(x) * gate + self.branches[0](x) + self.branches[1](x)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def test_composite_layers_are_converted_inside(tmp_path):
    layers.Dense(1)  # Automatic names of the inner layers differ when it is loaded.
    x = keras.Input((4,))
    masked = assert_round_trips(keras.Model(x, Block(4)(x)), data(3, 4), tmp_path)
    assert sorted(ml.get_masks(masked)) == [
        "block/body/dense/kernel",
        "block/body/dense_1/kernel",
        "block/branches/0/kernel",
        "block/branches/1/kernel",
        "block/by_name/gate/kernel",
    ]
    assert isinstance(masked.layers[1], Block)


@keras.saving.register_keras_serializable("tests")
class Subclassed(keras.Model):
    def __init__(self, width=5, **kwargs):
        super().__init__(**kwargs)
        self.width = width
        self.block = Block(width)
        self.head = layers.Dense(2)

    def build(self, shape):
        self.block.build(shape)
        self.head.build((None, self.width))

    def call(self, x):
        return self.head(self.block(x))

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def test_subclassed_model_with_from_config(tmp_path):
    model = Subclassed(4)
    model.build((None, 4))
    masked = assert_round_trips(model, data(3, 4), tmp_path)
    assert len(ml.get_masks(masked)) == 6


@keras.saving.register_keras_serializable("tests")
class BuiltByCall(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = layers.Dense(6, activation="relu")
        self.second = layers.Dense(2)

    def call(self, x):
        return self.second(self.first(x))


def test_subclassed_model_without_a_build_of_its_own(tmp_path):
    """Keras builds its copy by running it and never calls `build`."""
    model = BuiltByCall()
    model(data(3, 4))
    masked = assert_round_trips(model, data(3, 4), tmp_path)
    assert len(ml.get_masks(masked)) == 2


class NoConfig(keras.Model):
    def __init__(self, make):
        super().__init__()
        self.first = make()
        self.second = layers.Dense(2)

    def call(self, x):
        return self.second(self.first(x))


def test_subclassed_model_without_config_only_in_place(tmp_path):
    model = NoConfig(lambda: layers.Dense(5, "relu"))
    x = data(3, 4)
    before = numpy(model(x))
    with pytest.raises(ValueError, match="inplace=True"):
        ml.convert_to_masked(model)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in model._flatten_layers())
    masked = ml.convert_to_masked(model, inplace=True)
    assert masked is model
    assert isinstance(model, NoConfig)
    np.testing.assert_array_equal(numpy(model(x)), before)
    half_masks(model)
    effective = numpy(model(x))
    with pytest.raises(NotImplementedError, match="save_weights"):
        model.save(tmp_path / "m.keras")
    model.save_weights(tmp_path / "m.weights.h5")
    again = NoConfig(lambda: layers.Dense(5, "relu"))
    again(x)
    again = ml.convert_to_masked(again, inplace=True)
    again.load_weights(tmp_path / "m.weights.h5")
    np.testing.assert_array_equal(numpy(again(x)), effective)
    assert ml.strip_masks(model, inplace=True) is model
    assert type(model) is NoConfig
    np.testing.assert_array_equal(numpy(model(x)), effective)


@keras.saving.register_keras_serializable("tests")
class Awkward(layers.Layer):
    """Its attributes are named like those of Keras and of masked layers."""

    def __init__(self, mask_bias=-3.0, **kwargs):
        super().__init__(**kwargs)
        self.mask_bias = mask_bias
        self.masked_weights = "none"
        self._layers_of_mine = [layers.Dense(4), layers.Dense(4)]
        self._metrics_head = layers.Dense(4)

    def build(self, shape):
        for dense in (*self._layers_of_mine, self._metrics_head):
            dense.build(shape)

    def call(self, x):
        x = self._layers_of_mine[1](self._layers_of_mine[0](x))
        assert self.masked_weights == "none"
        return self._metrics_head(x) + self.mask_bias

    def get_config(self):
        return {**super().get_config(), "mask_bias": self.mask_bias}


def test_attributes_may_have_any_name(tmp_path):
    model = keras.Sequential([keras.Input((4,)), Awkward(mask_bias=-2.0)])
    masked = assert_round_trips(model, data(3, 4), tmp_path)
    assert list(ml.get_masks(masked)) == [
        "awkward/_layers_of_mine/0/kernel",
        "awkward/_layers_of_mine/1/kernel",
        "awkward/_metrics_head/kernel",
    ]


@keras.saving.register_keras_serializable("tests")
class CausalConv(layers.Conv1D):
    """Has a `kernel_mask` of its own."""

    def build(self, shape):
        super().build(shape)
        self.kernel_mask = np.zeros(tuple(self.kernel.shape), "float32")
        self.kernel_mask[:2] = 1

    def call(self, x):
        return ops.conv(x, self.kernel * self.kernel_mask, padding="same")


def test_a_layer_with_a_mask_of_its_own_stays_as_it_is(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), CausalConv(3, 3), layers.Dense(2)])
    masked = assert_round_trips(model, data(2, 6, 4), tmp_path)
    assert list(ml.get_masks(masked)) == ["dense/kernel"]
    assert ("causal_conv", "CausalConv", 39) in ml.sparsity_report(masked).unmasked


@keras.saving.register_keras_serializable("tests")
class TwoHeads(keras.Model):
    """A functional subclass with an attribute named like a layer of its graph."""

    def __init__(self, **kwargs):
        x = keras.Input((4,))
        super().__init__(x, layers.Dense(3, name="head")(x), **kwargs)
        self.head = layers.Dense(2)
        self.head.build((None, 3))

    def call(self, x):
        return self.head(super().call(x))

    def get_config(self):
        return {"name": self.name}

    @classmethod
    def from_config(cls, config):
        return cls(**config)


def test_a_layer_and_an_attribute_of_one_name_have_two_paths(tmp_path):
    if len(TwoHeads().weights) == 2:
        pytest.skip("this Keras does not track layers beside the graph of a functional model")
    masked = assert_round_trips(TwoHeads(), data(3, 4), tmp_path)
    assert list(ml.get_masks(masked)) == ["head/kernel", "head_1/kernel"]


def test_a_model_inside_one_converted_in_place_sees_its_masks():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
    inner.predict(data(3, 4), verbose=0)
    ml.convert_to_masked(model, inplace=True)
    ml.set_masks(model, {path: np.zeros_like(m) for path, m in ml.get_masks(model).items()})
    assert not inner.predict(data(3, 4), verbose=0).any()


def test_tied_weights_share_one_mask(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Tied(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.a, self.b = layers.Dense(4, use_bias=False), layers.Dense(4, use_bias=False)

        def build(self, shape):
            self.a.build(shape)
            self.b.build(shape)
            del self.b._kernel
            self.b._tracker.unlock()
            self.b._kernel = self.a._kernel
            self.b._tracker.lock()

        def call(self, x):
            return self.b(ops.tanh(self.a(x)))

    x = keras.Input((4,))
    masked = assert_round_trips(keras.Model(x, Tied()(x)), data(3, 4), tmp_path)
    tied = masked.layers[1]
    assert tied.a.kernel_mask is tied.b.kernel_mask
    assert len(ml.get_masks(masked)) == 1
    assert sum("kernel_mask" in v.path for v in masked.variables) == 1


def test_column_major_kernels_keep_their_bits():
    model = keras.Sequential([keras.Input((64,)), layers.Dense(96, use_bias=False)])
    if BACKEND == "torch":
        kernel = model.layers[0]._kernel.value
        kernel.data = kernel.data.t().contiguous().t()
    masked = ml.convert_to_masked(model)
    if BACKEND == "torch":  # The copy has a row-major kernel; the oracle is the model itself.
        masked = ml.convert_to_masked(model, inplace=True)
        assert masked.layers[0].kernel.stride() == kernel.stride()
    else:
        assert_equal_outputs(model, masked, data(7, 64))


# --- What is carried over -------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "rmsprop", "momentum"])
def test_a_partly_trained_model_continues_bit_for_bit(optimizer):
    if optimizer == "momentum":
        optimizer = keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True)
    x, y = data(32, 4), data(32, 2, seed=1)
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(16, "relu"), layers.BatchNormalization(), layers.Dense(2)]
    )
    model.compile(optimizer, "mse", metrics=["mae"])
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    masked = ml.convert_to_masked(model)
    assert masked.optimizer is not model.optimizer
    for a, b in zip(model.optimizer.variables, masked.optimizer.variables, strict=True):
        np.testing.assert_array_equal(numpy(a), numpy(b))
    histories = [m.fit(x, y, epochs=3, shuffle=False, verbose=0) for m in (model, masked)]
    assert histories[0].history == histories[1].history
    for a, b in zip(model.get_weights(), masked.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_losses_metrics_and_layers_of_ones_own_need_no_registration():
    def my_loss(y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred))

    def my_activation(x):
        return ops.tanh(x) * 2

    class MyMetric(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            super().update_state(y_pred)

    class MyDense(layers.Dense):
        pass

    class Add(layers.Layer):  # Named like a layer of Keras.
        def call(self, x):
            return x + 1

    model = keras.Sequential(
        [keras.Input((4,)), MyDense(3, my_activation), Add(), layers.Lambda(lambda x: x * 2)]
    )
    model.compile(keras.optimizers.SGD(0.1), loss=my_loss, metrics=[MyMetric()])
    x, y = data(8, 4), data(8, 3, seed=1)
    masked = ml.convert_to_masked(model)
    assert_equal_outputs(model, masked, x)
    assert isinstance(masked.layers[0], MyDense)
    assert model.evaluate(x, y, verbose=0) == masked.evaluate(x, y, verbose=0)


def test_lambdas_keep_what_they_refer_to(tmp_path):
    factor = 3.0
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Lambda(lambda x, power=2: ops.tanh(x) ** power * factor),
            layers.Lambda(lambda x: x + 1),
            layers.Dense(3),
        ]
    )
    masked = ml.convert_to_masked(model)
    assert_equal_outputs(model, masked, data(3, 4))
    assert_equal_outputs(masked, ml.strip_masks(masked), data(3, 4))
    assert model.layers[0].function is masked.layers[0].function


def test_a_class_in_use_goes_before_one_registered_under_its_name_since():
    def define(bias):
        @keras.saving.register_keras_serializable("tests")
        class Redefined(layers.Layer):
            def call(self, x):
                return x + bias

        return Redefined

    model = keras.Sequential([keras.Input((4,)), define(1)(), layers.Dense(2)])
    newer = define(2)
    assert_equal_outputs(model, ml.convert_to_masked(model), data(3, 4))
    assert keras.saving.get_custom_objects()["tests>Redefined"] is newer


def test_trainable_flags_and_dtype_policies_are_kept():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(5, dtype="mixed_bfloat16"),
            layers.BatchNormalization(),
            layers.Dense(2, dtype="float32"),
        ]
    )
    model.layers[0].trainable = False
    model.layers[1].gamma.trainable = False
    masked = ml.convert_to_masked(model)
    assert [v.trainable for v in model.weights] == [v.trainable for v in masked.weights]
    assert [m.dtype_policy.name for m in masked.layers] == [
        m.dtype_policy.name for m in model.layers
    ]
    assert_equal_outputs(model, masked, data(3, 4))


def test_preprocessing_state_is_kept(tmp_path):
    normalization = layers.Normalization()
    normalization.adapt(data(50, 4) * 3 + 1)
    model = keras.Sequential([keras.Input((4,)), normalization, layers.Dense(2)])
    assert_round_trips(model, data(3, 4), tmp_path)


def test_masked_models_can_be_converted_again():
    model = keras.Sequential([keras.Input((4,)), ml.MaskedDense(5), layers.Dense(2)])
    ml.set_masks(model, {"dense/kernel": np.eye(4, 5, dtype=bool)})
    masked = ml.convert_to_masked(model)
    assert list(ml.get_masks(masked)) == ["dense/kernel", "dense_1/kernel"]
    np.testing.assert_array_equal(ml.get_masks(masked)["dense/kernel"], np.eye(4, 5, dtype=bool))
    assert_equal_outputs(model, masked, data(3, 4))


# --- Filters --------------------------------------------------------------------------------------


def three_layers():
    return keras.Sequential(
        [keras.Input((4,)), *(layers.Dense(4, name=n) for n in ("in_proj", "middle", "out_proj"))]
    )


@keras.saving.register_keras_serializable("tests")
class MadeByHand(keras.Model):
    """Holds masked layers of its own, and is built by running it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = ml.MaskedDense(4)
        self.second = ml.MaskedDense(3, masked_weights=["kernel", "bias"])
        self.plain = layers.Dense(2)

    def call(self, x):
        return self.plain(self.second(self.first(x)))

    def get_config(self):
        return super().get_config()


def test_masks_made_by_hand_stay_beside_those_of_a_conversion(tmp_path):
    model = MadeByHand()
    model(data(1, 4))
    masked = ml.convert_to_masked(model, include="^dense")  # The name of `plain`.
    for each, count in ((model, 3), (masked, 4)):
        half_masks(each)
        each.save(tmp_path / "made.keras")
        loaded = keras.models.load_model(tmp_path / "made.keras")
        assert len(ml.get_masks(loaded)) == count
        assert_equal_outputs(each, loaded, data(3, 4))


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ({"include": "proj$"}, ["in_proj", "out_proj"]),
        ({"include": ["^in", "mid"]}, ["in_proj", "middle"]),
        ({"include": lambda layer: layer.name == "middle"}, ["middle"]),
        ({"exclude": "out"}, ["in_proj", "middle"]),
        ({"include": "proj", "exclude": ["in_"]}, ["out_proj"]),
        ({"exclude": lambda layer: layer.name != "middle"}, ["middle"]),
    ],
)
def test_filters(filters, expected, tmp_path):
    masked = ml.convert_to_masked(three_layers(), **filters)
    assert list(ml.get_masks(masked)) == [f"{name}/kernel" for name in expected]
    left = [name for name, *_ in ml.sparsity_report(masked).unmasked]
    assert sorted(left + expected) == sorted(["in_proj", "middle", "out_proj"])
    masked.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(ml.get_masks(loaded)) == list(ml.get_masks(masked))


def test_a_filter_on_a_holder_covers_what_it_holds():
    x = keras.Input((6, 4))
    y = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(x, layers.Bidirectional(layers.LSTM(2), name="rnn")(y))
    assert len(ml.get_masks(ml.convert_to_masked(model, include="attention"))) == 4
    assert len(ml.get_masks(ml.convert_to_masked(model, exclude="attention"))) == 4


def test_one_direction_only_survives_saving(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), layers.Bidirectional(layers.LSTM(2))])
    masked = ml.convert_to_masked(model, include="forward")
    half_masks(masked)
    masked.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(ml.get_masks(loaded)) == list(ml.get_masks(masked))
    assert len(ml.get_masks(loaded)) == 2
    assert_equal_outputs(masked, loaded, data(2, 6, 4))


def test_mask_bias(tmp_path):
    x = keras.Input((6, 4))
    model = keras.Model(x, layers.Dense(2)(layers.LSTM(3)(x)))
    masked = ml.convert_to_masked(model, mask_bias=True)
    assert list(ml.get_masks(masked)) == [
        "lstm/cell/kernel",
        "lstm/cell/recurrent_kernel",
        "lstm/cell/bias",
        "dense/kernel",
        "dense/bias",
    ]
    half_masks(masked)
    masked.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(ml.get_masks(loaded)) == list(ml.get_masks(masked))


# --- Layers of one's own and layers that cannot be masked -----------------------------------------


class Mine(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 3), name="table")
        self.offset = self.add_weight(shape=(3,), name="offset")

    def call(self, x):
        return ops.matmul(x, self.table) + self.offset


def test_register_makes_a_layer_of_ones_own_maskable(tmp_path):
    class Registered(Mine):
        pass

    model = keras.Sequential([keras.Input((4,)), Registered()])
    with pytest.raises(ValueError, match=r"Nothing to mask.*Registered.*register"):
        ml.convert_to_masked(model)
    assert ml.register(Registered, ["table"], biases=["offset"]) is Registered
    masked = assert_round_trips(
        model, data(3, 4), tmp_path, custom_objects={"Registered": Registered}
    )
    assert list(ml.get_masks(masked)) == ["registered/table"]
    assert len(ml.get_masks(ml.convert_to_masked(model, mask_bias=True))) == 2


def test_register_rejects_what_it_cannot_use():
    with pytest.raises(TypeError, match="subclass"):
        ml.register(dict, ["w"])
    with pytest.raises(TypeError, match="list of attribute names"):
        ml.register(Mine, "table")
    with pytest.raises(ValueError, match="at least one"):
        ml.register(Mine, [])


def test_registered_attribute_that_is_no_variable():
    class Listed(layers.Layer):
        def build(self, shape):
            self.tables = [self.add_weight(shape=(4, 3))]

        def call(self, x):
            return x @ self.tables[0]

    ml.register(Listed, ["tables"])
    with pytest.raises(TypeError, match=r"expected a `keras\.Variable`"):
        ml.convert_to_masked(keras.Sequential([keras.Input((4,)), Listed()]))


def test_layers_that_cannot_be_masked_stay_and_are_listed():
    x = keras.Input((4,))
    y = layers.SpectralNormalization(layers.Dense(4), name="spectral")(x)
    y = layers.PReLU(name="prelu")(layers.BatchNormalization(name="bn")(y))
    model = keras.Model(x, layers.Dense(2, name="head")(y))
    masked = ml.convert_to_masked(model)
    report = ml.sparsity_report(masked)
    assert [row.path for row in report] == ["head/kernel"]
    assert {path for path, *_ in report.unmasked} == {
        "spectral",
        "spectral/layer",
        "bn",
        "prelu",
    }
    assert "PReLU" in str(report)
    masked.compile("sgd", "mse")
    masked.fit(data(8, 4), data(8, 2), verbose=0)


def test_nothing_maskable():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"Nothing to mask.*BatchNormalization"):
        ml.convert_to_masked(model)
    with pytest.raises(ValueError, match="leave no maskable layer"):
        ml.convert_to_masked(three_layers(), include="nothing")


@pytest.mark.parametrize("wrong", [3, [1, 2], object()])
def test_wrong_filters(wrong):
    with pytest.raises(TypeError, match="`include` must be a regular expression"):
        ml.convert_to_masked(three_layers(), include=wrong)


def test_wrong_regular_expression():
    with pytest.raises(ValueError, match=r"`exclude` must be a regular expression: .*'\(head'"):
        ml.convert_to_masked(three_layers(), exclude="(head")


def test_wrong_models():
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.convert_to_masked(layers.Dense(3))
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.strip_masks("model.keras")
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.strip_masks(three_layers())


def test_a_config_that_does_not_describe_the_model_is_noticed():
    class Forgetful(keras.Model):
        def __init__(self, width=3, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(width)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            return self.dense(x)

        def get_config(self):
            return {}

    model = Forgetful(9)
    model.build((None, 4))
    with pytest.raises(ValueError, match="inplace=True"):
        ml.convert_to_masked(model)


# --- The idioms of plain Keras --------------------------------------------------------------------


def test_weights_are_those_of_the_plain_model(tmp_path):
    plain = three_layers()
    masked = ml.convert_to_masked(plain)
    half_masks(masked)
    masks = ml.get_masks(masked)
    initial = masked.get_weights()
    assert masked.count_params() == plain.count_params()
    masked.set_weights([w + 1 for w in plain.get_weights()])
    masked.set_weights(initial)
    plain.set_weights([w * 2 for w in plain.get_weights()])
    plain.save_weights(tmp_path / "plain.weights.h5")
    masked.load_weights(tmp_path / "plain.weights.h5")
    for a, b in zip(masked.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    for path, mask in ml.get_masks(masked).items():
        np.testing.assert_array_equal(mask, masks[path])


def test_weights_of_a_masked_model_load_with_their_masks(tmp_path):
    masked = ml.convert_to_masked(three_layers())
    half_masks(masked)
    masked.save_weights(tmp_path / "m.weights.h5")
    again = ml.convert_to_masked(three_layers())
    again.load_weights(tmp_path / "m.weights.h5")
    assert_equal_outputs(masked, again, data(3, 4))


def test_clone_model_of_a_masked_model():
    masked = ml.convert_to_masked(three_layers())
    clone = keras.models.clone_model(masked)
    assert list(ml.get_masks(clone)) == list(ml.get_masks(masked))


def test_stripped_model_is_plain_keras_with_positive_zeros():
    masked = ml.convert_to_masked(three_layers())
    masked.set_weights([-abs(w) for w in masked.get_weights()])
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    for layer in stripped.layers:
        assert type(layer) is layers.Dense
    for path, mask in ml.get_masks(masked).items():
        kernel = stripped.get_layer(path.split("/")[0]).get_weights()[0]
        assert not kernel[~mask].any()
        assert not np.signbit(kernel[~mask]).any()
    # The masked model keeps the raw values and goes on as it was.
    assert all((w[w != 0] < 0).all() for w in masked.get_weights())


def test_stripping_folds_the_rescaling_in_once():
    masked = ml.convert_to_masked(three_layers())
    half_masks(masked)
    for ref in ml.masked_refs(masked):
        ref.mask.rescale = True
    assert_equal_outputs(masked, ml.strip_masks(masked), data(3, 4))


def test_stripped_model_quantizes_and_keeps_its_zeros():
    masked = ml.convert_to_masked(
        keras.Sequential([keras.Input((8,)), layers.Dense(16, "relu"), layers.Dense(4)])
    )
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    stripped.quantize("int8")
    assert stripped.layers[0].dtype_policy.quantization_mode == "int8"
    keep = ml.get_masks(masked)["dense/kernel"]
    assert not numpy(stripped.layers[0]._kernel)[~keep].any()


def test_stripped_layers_made_by_hand_quantize_too():
    model = keras.Sequential([keras.Input((8,)), ml.MaskedDense(16), ml.MaskedDense(4)])
    half_masks(model)
    stripped = ml.strip_masks(model)
    stripped.quantize("int8")
    assert stripped.layers[1].dtype_policy.quantization_mode == "int8"


def test_regularizers_and_constraints_come_back_plain():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(3, kernel_regularizer="l2", kernel_constraint="non_neg"),
        ]
    )
    stripped = ml.strip_masks(ml.convert_to_masked(model))
    kernel = stripped.layers[0].kernel
    assert type(kernel.regularizer) is keras.regularizers.L2
    assert type(kernel.constraint) is keras.constraints.NonNeg


def test_stripping_folds_lora_in():
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(7, 4), layers.Conv1D(3, 2)]
    )
    for layer in model.layers:
        layer.enable_lora(2)
        for variable in layer.trainable_variables:
            variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    masked = ml.convert_to_masked(model)
    tokens = np.arange(6)[None]
    assert_equal_outputs(model, masked, tokens)
    half_masks(masked)
    stripped = ml.strip_masks(masked)
    assert_equal_outputs(masked, stripped, tokens)
    for name, layer in (("embeddings", stripped.layers[0]), ("kernel", stripped.layers[1])):
        keep = ml.get_masks(masked)[f"{layer.name.rsplit('_', 1)[0]}/{name}"]
        assert not numpy(getattr(layer, name))[~keep].any()


def test_what_cannot_be_stripped_is_refused():
    class Centered(layers.Dense):
        @property
        def kernel(self):
            return self._kernel - ops.mean(self._kernel, axis=0)

    class Twice(ml.MaskedDense):
        def call(self, x):
            return 2 * super().call(x)

    derived = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), Centered(3)]))
    by_hand = keras.Sequential([keras.Input((4,)), Twice(3)])
    for model, reason in ((derived, "Centered computes 'kernel'"), (by_hand, "Twice derives")):
        half_masks(model)
        before = numpy(model(data(2, 4)))
        for inplace in (False, True):
            with pytest.raises(ValueError, match=reason):
                ml.strip_masks(model, inplace=inplace)
        np.testing.assert_array_equal(numpy(model(data(2, 4))), before)


def test_a_copy_of_another_precision_computes_in_it():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4, activation="tanh")])
    inputs = keras.Input((3,))
    x = inner(layers.Dense(4, dtype="mixed_bfloat16")(inputs))
    model = ml.convert_to_masked(keras.Model(inputs, layers.BatchNormalization()(x)))
    model.compile("adam", "mse")
    with double_precision():
        copy = copy_model(model, dtype="float64")
        data = keras.ops.convert_to_tensor(np.full((2, 3), 1 / 3))
        (first, *_), outputs = copy.layers[1:], copy(data)
        assert keras.backend.standardize_dtype(outputs.dtype) == "float64"
        hidden = keras.ops.convert_to_numpy(first(data))
    expected = np.full((2, 3), 1 / 3) @ model.get_weights()[0].astype("float64")
    np.testing.assert_allclose(hidden, expected, rtol=1e-14, atol=1e-16)
    assert {v.dtype for v in copy.variables} == {"float64", "bool"}
    assert not copy.compiled
    for old, new in zip(model.get_weights(), copy.get_weights(), strict=True):
        np.testing.assert_array_equal(new, old.astype("float64"))
