"""Conversion: what is copied, filters, custom layers and what is refused."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import data, half_masks, numpy
from conversions import assert_equal_outputs, assert_round_trips, three_layers
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner._keras import double_precision
from masked_layers.copying import copy_model

BACKEND = keras.backend.backend()


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
def test_a_custom_masked_block_loads_in_a_new_process(tmp_path):
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


# --- Copies ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("optimizer", ["adamw", "momentum"])
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


@pytest.mark.once
def test_custom_losses_metrics_and_layers_need_no_registration():
    def my_loss(y_true, y_pred):
        return ops.mean(ops.abs(y_true - y_pred))

    def my_activation(x):
        return ops.tanh(x) * 2

    class MyMetric(keras.metrics.Mean):
        def update_state(self, y_true, y_pred, sample_weight=None):
            super().update_state(y_pred)

    class MyDense(layers.Dense):
        pass

    class Add(layers.Layer):  # Has the name of a layer of Keras.
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


@pytest.mark.once
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


@pytest.mark.once
def test_a_class_in_use_takes_precedence_over_one_registered_later():
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


@keras.saving.register_keras_serializable("tests")
class MadeByHand(keras.Model):
    """Contains masked layers, and is built by calling it."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = ml.MaskedDense(4)
        self.second = ml.MaskedDense(3, masked_weights=["kernel", "bias"])
        self.plain = layers.Dense(2)

    def call(self, x):
        return self.plain(self.second(self.first(x)))

    def get_config(self):
        return super().get_config()


@pytest.mark.once
def test_explicit_masks_are_kept_next_to_those_of_a_conversion(tmp_path):
    model = MadeByHand()
    model(data(1, 4))
    masked = ml.convert_to_masked(model, include="^dense")  # The name of `plain`.
    for each, count in ((model, 3), (masked, 4)):
        half_masks(each)
        each.save(tmp_path / "made.keras")
        loaded = keras.models.load_model(tmp_path / "made.keras")
        assert len(ml.get_masks(loaded)) == count
        assert_equal_outputs(each, loaded, data(3, 4))


@pytest.mark.once
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


@pytest.mark.once
def test_a_filter_that_matches_a_container_includes_its_layers():
    x = keras.Input((6, 4))
    y = layers.MultiHeadAttention(2, 3, name="attention")(x, x)
    model = keras.Model(x, layers.Bidirectional(layers.LSTM(2), name="rnn")(y))
    assert len(ml.get_masks(ml.convert_to_masked(model, include="attention"))) == 4
    assert len(ml.get_masks(ml.convert_to_masked(model, exclude="attention"))) == 4


@pytest.mark.once
def test_one_direction_only_survives_saving(tmp_path):
    model = keras.Sequential([keras.Input((6, 4)), layers.Bidirectional(layers.LSTM(2))])
    masked = ml.convert_to_masked(model, include="forward")
    half_masks(masked)
    masked.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert list(ml.get_masks(loaded)) == list(ml.get_masks(masked))
    assert len(ml.get_masks(loaded)) == 2
    assert_equal_outputs(masked, loaded, data(2, 6, 4))


@pytest.mark.once
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


# --- Custom layers, and layers that cannot be masked ----------------------------------------------


class Mine(layers.Layer):
    def build(self, shape):
        self.table = self.add_weight(shape=(shape[-1], 3), name="table")
        self.offset = self.add_weight(shape=(3,), name="offset")

    def call(self, x):
        return ops.matmul(x, self.table) + self.offset


@pytest.mark.once
def test_register_makes_a_custom_layer_maskable(tmp_path):
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


@pytest.mark.once
def test_register_rejects_what_it_cannot_use():
    with pytest.raises(TypeError, match="subclass"):
        ml.register(dict, ["w"])
    with pytest.raises(TypeError, match="list of attribute names"):
        ml.register(Mine, "table")
    with pytest.raises(ValueError, match="at least one"):
        ml.register(Mine, [])


@pytest.mark.once
def test_registered_attribute_that_is_not_a_variable():
    class Listed(layers.Layer):
        def build(self, shape):
            self.tables = [self.add_weight(shape=(4, 3))]

        def call(self, x):
            return x @ self.tables[0]

    ml.register(Listed, ["tables"])
    with pytest.raises(TypeError, match=r"expected a `keras\.Variable`"):
        ml.convert_to_masked(keras.Sequential([keras.Input((4,)), Listed()]))


@pytest.mark.once
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


@pytest.mark.once
def test_nothing_maskable():
    model = keras.Sequential([keras.Input((4,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match=r"Nothing to mask.*BatchNormalization"):
        ml.convert_to_masked(model)
    with pytest.raises(ValueError, match="leave no maskable layer"):
        ml.convert_to_masked(three_layers(), include="nothing")
    quantized = keras.Sequential([keras.Input((4,)), layers.Dense(2)])
    quantized.quantize("int8")
    with pytest.raises(ValueError, match=r"are quantized \(int8\).*and quantize the result"):
        ml.convert_to_masked(quantized)
    with pytest.raises(ValueError, match=r"no prunable weight: its weights are quantized"):
        LotteryTicketPruner(quantized)


@pytest.mark.once
@pytest.mark.parametrize("wrong", [3, [1, 2], object()])
def test_wrong_filters(wrong):
    with pytest.raises(TypeError, match="`include` must be a regular expression"):
        ml.convert_to_masked(three_layers(), include=wrong)


@pytest.mark.once
def test_wrong_regular_expression():
    with pytest.raises(ValueError, match=r"`exclude` must be a regular expression: .*'\(head'"):
        ml.convert_to_masked(three_layers(), exclude="(head")


@pytest.mark.once
def test_wrong_models():
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.convert_to_masked(layers.Dense(3))
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        ml.strip_masks("model.keras")
    with pytest.raises(ValueError, match="convert_to_masked"):
        ml.strip_masks(three_layers())


@pytest.mark.once
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
