"""Flags, names and state of the smaller model, its report, and errors."""

import keras
import numpy as np
import pytest
from keras import layers

from masked_layers import convert_to_masked, get_masks, set_masks
from masked_layers.shrinking import ShrinkReport, rules, shrink
from shrunk import (
    add_layer,
    assert_same_outputs,
    checked,
    conv_net,
    dense_net,
    randomize,
    residual_net,
    swap_halves,
    widths,
    zero,
)

pytestmark = pytest.mark.usefixtures("nothing_drawn")


def test_masked_model_is_stripped_first():
    model = conv_net(layers.ReLU(), padding="same", bias=False)
    masked = convert_to_masked(model)
    masks = get_masks(masked)
    masks["c0/kernel"][..., [1, 2]] = False
    set_masks(masked, masks)
    smaller, report = shrink(masked, return_report=True)
    assert widths(smaller) == {"c0": 2, "c1": 3, "out": 2}
    assert [type(layer) for layer in smaller.layers] == [type(layer) for layer in model.layers]
    assert_same_outputs(masked, smaller)
    assert report.weights_before == model.count_params()


def test_flags_policies_and_names_are_kept():
    x = keras.Input((5,), name="image")
    y = layers.Dense(4, "relu", name="frozen", trainable=False)(x)
    y = layers.Dense(4, "relu", name="half", dtype="mixed_bfloat16")(y)
    model = randomize(keras.Model({"image": x}, [layers.Dense(2, name="out")(y)], name="net"))
    zero(model.get_layer("frozen"), [0])
    smaller, _ = shrink(model, return_report=True)
    assert smaller.name == "net"
    assert smaller.get_layer("half").dtype_policy.name == "mixed_bfloat16"
    assert [w.path.split("/")[0] for w in smaller.trainable_weights] == ["half"] * 2 + ["out"] * 2
    assert [x.name for x in smaller.inputs] == ["image"]
    assert set(smaller.input) == {"image"}
    model.trainable = False
    assert shrink(model).trainable_weights == []


def test_inputs_are_normalized_as_before():
    norm = layers.Normalization(name="norm")
    x = keras.Input((5,))
    y = layers.Dense(4, "relu", name="a")(layers.Rescaling(2.0)(norm(x)))
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(y)))
    norm.adapt(np.random.default_rng(0).normal(3, 2, size=(20, 5)))
    zero(model.get_layer("a"), [0])
    smaller, report = checked(model)
    assert widths(smaller) == {"a": 3, "out": 2}
    assert report.not_followed == {}


def test_smaller_model_saves_and_shrinks_no_further(tmp_path):
    model = residual_net(add_layer)
    for name in ("stem", "b0", "b1"):
        zero(model.get_layer(name), [1, 2])
    smaller, _ = checked(model)
    smaller.save(tmp_path / "small.keras")
    loaded = keras.models.load_model(tmp_path / "small.keras")
    assert_same_outputs(smaller, loaded, tolerance=1e-6)
    again, report = checked(loaded)
    assert report.weights_before == report.weights_after
    assert widths(again) == widths(smaller)


def test_custom_functions_need_not_be_registered():
    x = keras.Input((5,))
    y = layers.Dense(4, swap_halves, name="a")(layers.Dense(3, "relu", name="b")(x))
    model = randomize(keras.Model(x, layers.Lambda(lambda z: z + 1)(y)))
    zero(model.get_layer("b"), [0])
    smaller, _ = checked(model)
    assert widths(smaller) == {"b": 2, "a": 4}


def test_report_converts_to_plain_data():
    model = dense_net(4, 3)
    zero(model.layers[0], [0])
    _, report = shrink(model, return_report=True)
    assert isinstance(report, ShrinkReport)
    assert report.to_dict() == {
        "rows": (
            {
                "layer": "d0",
                "kind": "Dense",
                "before": 4,
                "after": 3,
                "constant": 1,
                "unread": 0,
                "kept": {},
                "weights_before": 5 * 4 + 4,
                "weights_after": 5 * 3 + 3,
                "macs_before": 5 * 4,
                "macs_after": 5 * 3,
            },
            {
                "layer": "out",
                "kind": "Dense",
                "before": 3,
                "after": 3,
                "constant": 0,
                "unread": 0,
                "kept": {},
                "weights_before": 4 * 3 + 3,
                "weights_after": 3 * 3 + 3,
                "macs_before": 4 * 3,
                "macs_after": 3 * 3,
            },
        ),
        "not_followed": {},
        "unread": {},
        "weights_before": 39,
        "weights_after": 30,
        "macs_before": 5 * 4 + 4 * 3,
        "macs_after": 5 * 3 + 3 * 3,
    }
    assert "weights: 39 -> 30" in str(report)


class Subclassed(keras.Model):
    def call(self, inputs):
        return inputs


class OwnCall(keras.Model):
    def call(self, inputs, training=None):
        return super().call(inputs) * 2


def test_errors_say_what_to_do():
    with pytest.raises(TypeError, match=r"Expected a `keras\.Model`"):
        shrink("model.keras")
    with pytest.raises(ValueError, match="Received: 'net' of class Subclassed"):
        shrink(Subclassed(name="net"))
    with pytest.raises(ValueError, match="not built"):
        shrink(keras.Sequential([layers.Dense(2)]))
    x = keras.Input((2,))
    with pytest.raises(ValueError, match="overrides `call`"):
        shrink(OwnCall(x, layers.Dense(2)(x)))


def test_layer_that_cannot_be_copied_is_named():
    class Secret(layers.Layer):
        def __init__(self, factor):
            super().__init__(name="secret")
            self.factor = factor

        def get_config(self):
            raise NotImplementedError("ask me nothing")

        def call(self, x):
            return x * self.factor

    x = keras.Input((2,))
    with pytest.raises(ValueError, match=r"(?s)'secret' \(Secret\) cannot be copied.*nothing"):
        shrink(keras.Model(x, layers.Dense(2)(Secret(2)(x))))


def test_a_weight_that_no_rule_knows_is_an_error(monkeypatch):
    """As one that a later version of Keras adds to a layer: its copy would be untrained."""

    class Later(layers.Dense):
        def build(self, input_shape):
            super().build(input_shape)
            self.temperature = self.add_weight(name="temperature", shape=(self.units,))

    monkeypatch.setitem(rules.RULES, Later, rules.RULES[layers.Dense])
    model = randomize(keras.Sequential([keras.Input((3,)), Later(4), layers.Dense(2)]))
    zero(model.layers[0], [1])
    with pytest.raises(ValueError, match=r"weights that are not known here: .*temperature"):
        shrink(model)
