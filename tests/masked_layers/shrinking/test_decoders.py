"""Decoder blocks of KerasHub, which need not be installed: layers of the same form and names."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from shrunk import numpy, randomize, widths

pytestmark = pytest.mark.usefixtures("nothing_drawn")


@keras.saving.register_keras_serializable("test_decoders")
class CachedMultiHeadAttention(layers.MultiHeadAttention):
    """As in KerasHub, symbolic calls cannot pass `cache`."""

    def call(
        self,
        query,
        value,
        key=None,
        attention_mask=None,
        cache=None,
        cache_update_index=None,
        training=None,
    ):
        outputs = super().call(query, value, key, attention_mask=attention_mask, training=training)
        return outputs if cache is None else outputs + ops.mean(cache)


class TransformerDecoder(layers.Layer):
    """A block whose mask is computed from the number of steps."""

    def __init__(self, heads, width, window=None, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width, self.window = heads, width, window
        self._cross_attention_layer = None

    def build(self, sequence_shape, encoder_sequence_shape=None):
        units = sequence_shape[-1]
        self._self_attention_layer = CachedMultiHeadAttention(self.heads, units // self.heads)
        self._self_attention_layer.build(sequence_shape, sequence_shape)
        if encoder_sequence_shape is not None:
            self._cross_attention_layer = CachedMultiHeadAttention(self.heads, units // self.heads)
            self._cross_attention_layer.build(sequence_shape, encoder_sequence_shape)
        self.norm = layers.LayerNormalization(name="norm")
        self.wide = layers.Dense(self.width, "gelu", name="wide")
        self.gate = layers.Dense(self.width, "silu", name="gate")
        self.narrow = layers.Dense(units, name="narrow")
        self.norm.build(sequence_shape)
        self.wide.build(sequence_shape)
        self.gate.build(sequence_shape)
        self.narrow.build((*sequence_shape[:-1], self.width))

    def call(
        self,
        sequence,
        encoder_sequence=None,
        decoder_padding_mask=None,
        decoder_attention_mask=None,
        self_attention_cache=None,
        use_causal_mask=True,
        training=None,
    ):
        mask = self._compute_self_attention_mask(
            decoder_sequence=sequence,
            decoder_padding_mask=decoder_padding_mask,
            decoder_attention_mask=decoder_attention_mask,
            use_causal_mask=use_causal_mask,
            self_attention_cache=self_attention_cache,
        )
        given = {"cache": self_attention_cache, "cache_update_index": None, "training": training}
        x = sequence + self._self_attention_layer(sequence, sequence, attention_mask=mask, **given)
        if self._cross_attention_layer is not None:
            x = x + self._cross_attention_layer(query=x, value=encoder_sequence, **given)
        y = self.norm(x)
        return x + self.narrow(self.wide(y) * self.gate(y))

    def _compute_self_attention_mask(
        self,
        decoder_sequence,
        decoder_padding_mask,
        decoder_attention_mask,
        use_causal_mask,
        self_attention_cache,
    ):
        mask = decoder_attention_mask
        if decoder_padding_mask is not None:
            padding = ops.expand_dims(ops.cast(decoder_padding_mask, "int32"), 1)
            mask = padding if mask is None else ops.minimum(padding, ops.cast(mask, "int32"))
        if not use_causal_mask:
            return mask
        steps = ops.arange(ops.shape(decoder_sequence)[1], dtype="float32")
        causal = ops.expand_dims(steps[:, None] >= steps[None], 0)
        if self.window:
            causal = ops.logical_and(causal, steps[:, None] < steps[None] + self.window)
        causal = ops.cast(causal, "int32")
        return causal if mask is None else ops.minimum(mask, causal)

    def get_config(self):
        own = {"heads": self.heads, "width": self.width, "window": self.window}
        return {**super().get_config(), **own}


CachedMultiHeadAttention.__module__ = TransformerDecoder.__module__ = "keras_hub.layers"


def decoders(cross=False, steps=None, window=None, blocks=1, **kwargs):
    words = keras.Input((steps,), dtype="int32", name="words")
    inputs = {"words": words}
    stream = layers.Embedding(9, 8, name="table")(words)
    if cross:
        inputs["others"] = keras.Input((None, 5), name="others")
        kwargs["encoder_sequence"] = layers.Dense(6, name="encoded")(inputs["others"])
    for name in ("padding", "attention"):
        if kwargs.pop(name, False):
            inputs[name] = keras.Input((None,) * (1 + (name == "attention")), name=name)
            kwargs[f"decoder_{name}_mask"] = inputs[name]
    if kwargs.pop("cache", False):
        kwargs["self_attention_cache"] = inputs["cache"] = keras.Input((2, 5, 2, 4), name="cache")
    for i in range(blocks):
        stream = TransformerDecoder(2, 12, window, name=f"block_{i}")(stream, **kwargs)
    stream = layers.LayerNormalization(name="norm")(stream)
    return randomize(keras.Model(inputs, layers.Dense(3, name="out")(stream)))


def data_of(model, steps):
    rng = np.random.default_rng(steps)
    shapes = {"padding": (2, steps), "attention": (2, steps, steps)}
    data = {"words": rng.integers(0, 9, (2, steps)), "others": rng.normal(size=(2, 3, 5))}
    data |= {name: rng.random(shape) < 0.7 for name, shape in shapes.items()}
    data["padding"][:, 0] = True
    return {name: data[name].astype(x.dtype) for name, x in model.input.items()}


def halved(model):
    masked = ml.convert_to_masked(model, mask_normalization=True)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    return masked


def shrunk(masked, lengths=(5, 1, 8)):
    """Shrinks a model, and compares outputs for sequences of several lengths."""
    smaller, report = ml.shrink(masked, return_report=True)
    for steps in lengths:
        data = data_of(masked, steps)
        expected, got = numpy(masked(data)), numpy(smaller(data))
        assert np.ptp(expected) > 0
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    return smaller, report


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"padding": True, "blocks": 2}, id="padding"),
        pytest.param({"cross": True}, id="cross", marks=pytest.mark.slow),
    ],
)
def test_half_of_the_channels_of_decoders_is_removed(arguments):
    model = decoders(**arguments)
    smaller, report = shrunk(halved(model))
    assert report.not_followed == {}
    left = {line.layer: line.after / line.before for line in report}
    whole = {name for name in left if name.endswith(" heads")} | {"out"}
    assert left == {name: 1.0 if name in whole else 0.5 for name in left}
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]
    assert widths(smaller.get_layer("block_0")) == {"wide": 6, "gate": 6, "narrow": 4}


@pytest.mark.once
@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"steps": 5}, id="fixed", marks=pytest.mark.slow),
        pytest.param({"attention": True, "padding": True}, id="attention"),
        pytest.param({"use_causal_mask": False}, id="all", marks=pytest.mark.slow),
        pytest.param(
            {"use_causal_mask": False, "padding": True}, id="all-padding", marks=pytest.mark.slow
        ),
    ],
)
def test_masks_of_decoders(arguments):
    steps = arguments.get("steps")
    _, report = shrunk(halved(decoders(**arguments)), (steps,) if steps else (5, 1, 8))
    assert report.not_followed == {}


@pytest.mark.slow("jax")
def test_a_smaller_decoder_does_not_read_later_steps():
    smaller = ml.shrink(halved(decoders()))
    words = np.arange(12).reshape(2, 6) % 9
    changed = np.where(np.arange(6) < 3, words, 8 - words)
    first, second = (numpy(smaller({"words": x})) for x in (words, changed))
    np.testing.assert_allclose(first[:, :3], second[:, :3], rtol=1e-6, atol=1e-6)
    assert np.abs(first[:, 3:] - second[:, 3:]).max() > 0.1


@pytest.mark.once
def test_a_smaller_decoder_is_saved_loaded_and_trained(tmp_path):
    smaller = ml.shrink(halved(decoders(padding=True)))
    smaller.save(tmp_path / "smaller.keras")
    loaded = keras.saving.load_model(tmp_path / "smaller.keras")
    data = data_of(smaller, 6)
    np.testing.assert_array_equal(numpy(loaded(data)), numpy(smaller(data)))
    loaded.compile("sgd", "mse")
    before = loaded.evaluate(data, np.ones((2, 6, 3)), verbose=0)
    loaded.fit(data, np.ones((2, 6, 3)), verbose=0)
    assert loaded.evaluate(data, np.ones((2, 6, 3)), verbose=0) < before


@pytest.mark.once
def test_a_decoder_is_as_it_was_afterwards():
    model = decoders()
    block = model.get_layer("block_0")
    before, attention = dict(vars(block)), block._self_attention_layer
    expected = numpy(model({"words": np.ones((2, 4), "int32")}))
    ml.channel_families(model)
    assert vars(block) == before
    assert block._self_attention_layer is attention
    assert "_compute_self_attention_mask" not in vars(block)
    np.testing.assert_array_equal(numpy(model({"words": np.ones((2, 4), "int32")})), expected)


@pytest.mark.once
def test_a_decoder_with_another_mask_is_left_whole():
    found = ml.channel_families(decoders(window=2))
    assert found.not_followed["block_0"] == "its attention mask is not known"
    assert "table" in found.whole


@pytest.mark.once
def test_a_decoder_that_is_called_with_a_cache_is_left_whole():
    found = ml.channel_families(decoders(cache=True))
    assert found.not_followed["block_0"] == "called with a cache"


@pytest.mark.once
@pytest.mark.parametrize("index", [0, -1])
def test_one_of_equal_constants_is_as_good_as_another(index):
    """The number of steps is counted in one channel of a tensor of ones."""
    x = keras.Input((5, 4))
    y = layers.Dense(6, name="a")(x)
    steps = ops.cumsum(ops.ones_like(y)[:, :, index], axis=1)
    y = layers.Dense(3, name="out")(y) * ops.expand_dims(steps, 2)
    model = randomize(keras.Model(x, y))
    masked = ml.convert_to_masked(model)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = ml.shrink(masked, return_report=True)
    assert (widths(smaller), report.not_followed) == ({"a": 3, "out": 3}, {})
    data = np.random.default_rng(0).normal(size=(2, 5, 4))
    np.testing.assert_allclose(numpy(smaller(data)), numpy(masked(data)), rtol=1e-5, atol=1e-5)


@pytest.mark.once
@pytest.mark.parametrize("units", [1, 6])
def test_one_of_channels_that_vary_is_not(units):
    x = keras.Input((5, 4))
    y = layers.Dense(units, name="a")(layers.Dense(6, name="before")(x))
    z = layers.Dense(3, name="out")(x) * ops.expand_dims(y[:, :, 0], 2)
    model = randomize(keras.Model(x, z))
    assert list(ml.channel_families(model).whole) == ["a"]
    smaller, _ = ml.shrink(model, return_report=True)
    assert widths(smaller) == {"before": 6, "a": units, "out": 3}


class Wordless(layers.Dense):
    """A layer that Keras cannot create again."""

    def get_config(self):
        raise NotImplementedError


class Block(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = Wordless(4, name="wordless")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x):
        return ops.tanh(self.dense(x))


@pytest.mark.once
def test_a_block_with_a_layer_that_cannot_be_copied_is_left_whole():
    x = keras.Input((3,))
    y = layers.Dense(4, name="before")(x)
    model = randomize(keras.Model(x, layers.Dense(2, name="out")(Block(name="block")(y))))
    smaller, report = ml.shrink(model, return_report=True)
    assert report.not_followed == {"block": "'wordless' inside it has no config"}
    data = np.ones((2, 3))
    np.testing.assert_allclose(numpy(smaller(data)), numpy(model(data)), rtol=1e-6)
