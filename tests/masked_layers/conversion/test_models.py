"""Conversion of every kind of model: Sequential, Functional, subclassed, nested."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import data, half_masks, numpy
from conversions import assert_equal_outputs, assert_round_trips

BACKEND = keras.backend.backend()


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


@pytest.mark.once
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


@pytest.mark.once
def test_an_unbuilt_layer_that_may_create_others_in_build_is_refused():
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


@pytest.mark.slow("jax")
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


@pytest.mark.once
def test_functional_subclass_with_its_own_config(tmp_path):
    assert_round_trips(Widths(7), data(3, 4), tmp_path)


@keras.saving.register_keras_serializable("tests")
class Block(layers.Layer):
    """A composite layer that creates its layers itself and does not serialize them."""

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


@pytest.mark.once
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


@pytest.mark.once
def test_subclassed_model_without_a_build_of_its_own(tmp_path):
    """Keras builds its copy by calling it, and never calls `build`."""
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


@pytest.mark.once
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
    """Has attributes with the names of those of Keras and of masked layers."""

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


@pytest.mark.once
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
    """Has its own `kernel_mask`."""

    def build(self, shape):
        super().build(shape)
        self.kernel_mask = np.zeros(tuple(self.kernel.shape), "float32")
        self.kernel_mask[:2] = 1

    def call(self, x):
        return ops.conv(x, self.kernel * self.kernel_mask, padding="same")


@pytest.mark.once
def test_a_layer_with_its_own_mask_is_not_changed(tmp_path):
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


@pytest.mark.once
def test_a_layer_and_an_attribute_of_one_name_have_two_paths(tmp_path):
    if len(TwoHeads().weights) == 2:
        pytest.skip("this Keras does not track layers beside the graph of a functional model")
    masked = assert_round_trips(TwoHeads(), data(3, 4), tmp_path)
    assert list(ml.get_masks(masked)) == ["head/kernel", "head_1/kernel"]


@pytest.mark.once
def test_a_model_inside_one_converted_in_place_sees_its_masks():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4)])
    model = keras.Sequential([keras.Input((4,)), inner, layers.Dense(2)])
    inner.predict_on_batch(data(3, 4))
    ml.convert_to_masked(model, inplace=True)
    ml.set_masks(model, {path: np.zeros_like(m) for path, m in ml.get_masks(model).items()})
    assert not inner.predict_on_batch(data(3, 4)).any()


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
