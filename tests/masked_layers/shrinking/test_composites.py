"""Composite layers, as transformer blocks: layers inside them are followed through their `call`."""

import keras
import numpy as np
import pytest
from keras import layers

from lottery_ticket_pruner import LotteryTicketPruner
from masked_layers import channel_families, convert_to_masked, shrink
from shrunk import assert_same_outputs, inputs_of, numpy, randomize

# The graph of layers is the same on every backend; other files shrink models on JAX, too.
pytestmark = [pytest.mark.usefixtures("nothing_drawn"), pytest.mark.slow("jax")]


class Block(layers.Layer):
    """A transformer block in the style of KerasHub, with an MLP that is a layer of its own."""

    def __init__(self, heads, width, **kwargs):
        super().__init__(**kwargs)
        self.heads, self.width = heads, width

    def build(self, shape):
        self.attention = layers.MultiHeadAttention(self.heads, shape[-1] // self.heads)
        self.attention.build(shape, shape)
        self.mlp = MLP(self.width, name="mlp")
        self.mlp.build(shape)

    def call(self, x, padding_mask=None, training=None):
        mask = None
        if padding_mask is not None:
            mask = keras.ops.expand_dims(padding_mask, 1)
        x = x + self.attention(x, x, attention_mask=mask, training=training)
        return x + self.mlp(x)

    def get_config(self):
        return {**super().get_config(), "heads": self.heads, "width": self.width}


class MLP(layers.Layer):
    def __init__(self, width, **kwargs):
        super().__init__(**kwargs)
        self.width = width

    def build(self, shape):
        self.wide = layers.Dense(self.width, approximate_gelu, name="wide")
        self.narrow = layers.Dense(shape[-1], name="narrow")
        self.dropout = layers.Dropout(0.5)
        self.wide.build(shape)
        self.narrow.build((*shape[:-1], self.width))

    def call(self, x, training=None):
        return self.dropout(self.narrow(self.wide(x)), training=training)

    def get_config(self):
        return {**super().get_config(), "width": self.width}


def approximate_gelu(x):
    return keras.activations.gelu(x, approximate=True)


def transformer():
    x, present = keras.Input((6, 5)), keras.Input((6,))
    y = layers.Dense(8, name="stream")(x)
    for i in range(2):
        y = Block(2, 12, name=f"block_{i}")(y, padding_mask=present > 0)
    return randomize(keras.Model([x, present], layers.Dense(3, name="out")(y[:, 0])))


def test_half_of_a_transformer_is_removed():
    model = transformer()
    masked = convert_to_masked(model)
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    assert report.not_followed == {}
    left = {line.layer: line.after / line.before for line in report}
    heads = {name for name in left if name.endswith("heads")}
    assert len(heads) == 2
    assert left == {name: 1.0 if name in (heads | {"out"}) else 0.5 for name in left}
    assert [layer.name for layer in smaller.layers] == [layer.name for layer in model.layers]
    block = smaller.get_layer("block_0")
    assert isinstance(block, keras.Model)
    kinds = [type(layer) for layer in block.layers if layer.weights]
    assert kinds == [layers.MultiHeadAttention, type(smaller)]


@pytest.mark.once
def test_following_leaves_no_trace_in_the_model():
    model = transformer()
    block = model.get_layer("block_0")
    with pytest.raises(AttributeError):
        _ = block.attention.output  # never called on its own
    channel_families(model)
    with pytest.raises(AttributeError):
        _ = block.attention.output
    assert block.output.shape == (None, 6, 8)


@pytest.mark.slow  # `test_compilation.py` checks most of it.
def test_training_of_a_smaller_transformer_goes_on_with_dropout():
    masked = convert_to_masked(transformer())
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller = shrink(masked)
    data = inputs_of(masked, batch=4)
    data[1][:] = 1
    dropped = [numpy(smaller(data, training=True)) for _ in range(2)]
    assert np.abs(dropped[0] - dropped[1]).max() > 0
    smaller.compile("sgd", "mse")
    before = [numpy(w) for w in smaller.trainable_weights]
    smaller.fit(data, np.ones((4, 3)), verbose=0)
    pairs = zip(before, smaller.trainable_weights, strict=True)
    keys = "key/bias"  # a softmax does not notice it
    assert all((old != numpy(new)).any() or new.path.endswith(keys) for old, new in pairs)


@pytest.mark.slow
def test_a_smaller_transformer_is_saved_and_loaded(tmp_path):
    masked = convert_to_masked(transformer())
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller = shrink(masked)
    smaller.save(tmp_path / "smaller.keras")
    custom = {"approximate_gelu": approximate_gelu}  # neither `Block` nor `MLP` is needed
    loaded = keras.saving.load_model(tmp_path / "smaller.keras", custom_objects=custom)
    data = inputs_of(smaller)
    np.testing.assert_array_equal(numpy(loaded(data)), numpy(smaller(data)))


@pytest.mark.once
def test_a_composite_layer_that_is_called_twice_has_the_channels_of_both_calls():
    x = keras.Input((6, 8))
    block = Block(2, 12, name="block")
    y = block(block(layers.Dense(8, name="stream")(x)))
    masked = convert_to_masked(randomize(keras.Model(x, layers.Dense(3)(y[:, 0]))))
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = shrink(masked, return_report=True)
    assert_same_outputs(masked, smaller)
    left = {line.layer.partition("/")[2]: (line.before, line.after) for line in report}
    assert left["mlp/wide"] == (12, 6)
    # The second call adds its outputs to those of the first, which it has read.
    assert left["mlp/narrow"] == (8, smaller.get_layer("stream").units) == (8, 4)


class Refused(layers.Layer):
    """A layer with a dense layer inside, and something else that no graph of layers shows."""

    def __init__(self, what, **kwargs):
        super().__init__(**kwargs)
        self.what = what
        self.dense = layers.Dense(4)
        if what == "regularized":
            self.activity_regularizer = keras.regularizers.L2(0.1)

    def build(self, shape):
        self.dense.build(shape)
        self.shift = self.add_weight(shape=(4,)) if self.what in ("weight", "unused") else None

    def call(self, x, training=None):
        y = self.dense(x)
        if self.what == "weight":
            y = y + self.shift
        if self.what == "array":
            y = y * keras.ops.arange(4.0)
        if self.what == "training" and training:
            y = y * 2.0
        if self.what == "assigns" and training:  # As `SpectralNormalization` does.
            self.dense.kernel.assign(self.dense.kernel * 2.0)
        if self.what == "values" and float(keras.ops.sum(y)) > 0:
            y = -y
        return y

    def get_config(self):
        return {**super().get_config(), "what": self.what}


@pytest.mark.once
@pytest.mark.parametrize(
    ("what", "why"),
    [
        ("weight", "its `call` reads a weight or an array in"),
        ("array", "its `call` reads a weight or an array in"),
        ("unused", "it has weights besides those of the layers that it calls"),
        ("training", "its `call` computes something else in training"),
        ("assigns", "its `call` changes a variable"),
        ("values", "its `call` cannot be followed"),
        ("regularized", "it regularizes its outputs"),
        ("float16", "it casts its inputs"),
    ],
)
def test_a_layer_that_a_graph_would_not_describe_is_left_whole(what, why):
    x = keras.Input((3,))
    y = layers.Dense(4, name="before")(x)
    block = Refused("", name="r", dtype=what) if what == "float16" else Refused(what, name="r")
    if what == "values":  # Keras would call it on symbolic tensors otherwise.
        block.compute_output_shape = lambda shape: (*shape[:-1], 4)
        block.compute_output_spec = lambda x, **kwargs: keras.KerasTensor((None, 4))
    y = layers.Dense(2, name="out")(block(y))
    model = keras.Model(x, y)
    before = model.get_weights()
    found = channel_families(model)
    assert why in found.not_followed["r"]
    assert "before" in found.whole
    pairs = zip(before, model.get_weights(), strict=True)
    assert all((old == new).all() for old, new in pairs)


def test_a_composite_layer_that_reshapes_to_sizes_of_its_inputs_is_left_whole():
    """On symbolic inputs, they are None, with which the smaller model could not be called."""

    class Folded(layers.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.dense = layers.Dense(4)

        def build(self, shape):
            self.dense.build(shape)

        def call(self, x):
            batch, steps = keras.ops.shape(x)[:2]
            return keras.ops.reshape(self.dense(x), (batch, steps, 8))

        def compute_output_shape(self, shape):
            return (*shape[:2], 8)

    x = keras.Input((None, 2, 4))
    y = layers.Dense(4)(layers.Dense(6, name="before")(x))
    model = convert_to_masked(keras.Model(x, layers.Dense(2)(Folded(name="folded")(y))))
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("smallest_weights", sparsity=0.5, structure="channels")
    smaller, report = shrink(model, return_report=True)
    assert "uses a size that is not known" in report.not_followed["folded"]
    assert smaller.get_layer("before").units < 6
    batch = np.linspace(-1, 1, 80, dtype="float32").reshape(2, 5, 2, 4)
    np.testing.assert_allclose(numpy(smaller(batch)), numpy(model(batch)), atol=1e-6)


@pytest.mark.once
def test_a_transformer_of_keras_hub_is_known_by_name():
    """KerasHub need not be installed; its position embedding reads the shape of its input."""

    class PositionEmbedding(layers.Layer):
        def __init__(self, sequence_length, **kwargs):
            super().__init__(**kwargs)
            self.sequence_length = sequence_length

        def build(self, shape):
            self.position_embeddings = self.add_weight(shape=(self.sequence_length, shape[-1]))

        def call(self, x):
            return keras.ops.broadcast_to(self.position_embeddings, keras.ops.shape(x))

        def get_config(self):
            return {**super().get_config(), "sequence_length": self.sequence_length}

    PositionEmbedding.__module__ = "keras_hub.layers"
    x = keras.Input((6,), dtype="int32", batch_size=3)
    y = layers.ReversibleEmbedding(9, 8, name="words")(x)
    y = layers.add([y, PositionEmbedding(6, name="places")(y)])
    y = Block(2, 12, name="block")(y)
    masked = convert_to_masked(randomize(keras.Model(x, layers.Dense(3)(y[:, 0]))))
    LotteryTicketPruner(masked).update_masks("random", sparsity=0.5, structure="channels")
    smaller, report = shrink(masked, return_report=True)
    assert report.not_followed == {}
    assert smaller.get_layer("words").output_dim == 4
    assert smaller.get_layer("places").position_embeddings.shape == (6, 4)
    words = np.arange(18).reshape(3, 6) % 9
    expected, got = numpy(masked(words)), numpy(smaller(words))
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


class Scaled(layers.Layer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense = layers.Dense(8, name="dense")

    def build(self, shape):
        self.dense.build(shape)

    def call(self, x, scale=1.0, other=None):
        y = self.dense(x) * scale
        return y if other is None else y + other


@pytest.mark.parametrize(
    "second",
    [
        lambda block, x: block(x, scale=3.0),
        lambda block, x: block(x, other=x),
        lambda block, x: block(x[:, :3]),
    ],
)
def test_a_composite_layer_that_is_called_in_two_ways_is_left_whole(second):
    x = keras.Input((6, 8))
    block = Scaled(name="block")
    y = second(block, block(layers.Dense(8, name="before")(x)))
    model = randomize(keras.Model(x, layers.Dense(3)(y)))
    masked = convert_to_masked(model)
    smaller, report = shrink(masked, return_report=True)
    assert report.not_followed == {"block": "called with different arguments"}
    assert_same_outputs(masked, smaller)


def test_a_composite_layer_that_is_given_a_masked_tensor_by_keyword_is_left_whole():
    x, words = keras.Input((6, 8)), keras.Input((6,), dtype="int32")
    other = layers.Embedding(5, 8, mask_zero=True)(words)
    y = Scaled(name="block")(layers.Dense(8, name="before")(x), other=other)
    found = channel_families(keras.Model([x, words], layers.Dense(3)(y)))
    assert found.not_followed["block"] == "its input carries a Keras mask"


class Frozen(layers.Layer):
    """A layer whose normalization is never in training mode."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.dense, self.norm = layers.Dense(4), layers.BatchNormalization()

    def build(self, shape):
        self.dense.build(shape)
        self.norm.build((*shape[:-1], 4))

    def call(self, x):
        return self.norm(self.dense(x), training=False)


def test_a_composite_layer_with_a_mode_of_its_own_is_left_whole():
    x = keras.Input((8,))
    model = keras.Model(x, layers.Dense(3)(Frozen(name="block")(layers.Dense(8)(x))))
    why = "a layer inside it has a mode of its own, in training or not"
    assert channel_families(model).not_followed["block"] == why


class Reversed(layers.Layer):
    """A layer whose inner layers are called in another order than they are created in."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.second = layers.Dense(8, use_bias=False, name="second")
        self.first = layers.Dense(8, use_bias=False, name="first")

    def build(self, shape):
        self.second.build(shape)
        self.first.build(shape)

    def call(self, x):
        return self.second(keras.ops.tanh(self.first(x)))


def test_the_state_of_the_optimizer_follows_its_weights():
    """In the smaller model, the layers inside are in the order of their calls."""
    x = keras.Input((8,))
    block = Reversed(name="block")
    model = randomize(keras.Model(x, layers.Dense(3, name="out")(block(x))))
    optimizer = keras.optimizers.Adam(0.01, weight_decay=0.5)
    optimizer.exclude_from_weight_decay(var_list=[block.second.kernel])
    model.compile(optimizer, "mse")
    rng = np.random.default_rng(0)
    data = rng.normal(size=(16, 8)).astype("float32"), rng.normal(size=(16, 3)).astype("float32")
    fit = {"batch_size": 4, "epochs": 2, "shuffle": False, "verbose": 0}
    model.fit(*data, **fit)
    smaller = shrink(model)
    assert [w.name for w in smaller.weights] == [w.name for w in model.weights]
    assert smaller.get_layer("block").layers[1].name == "first"
    for each in (model, smaller):
        each.fit(*data, **fit)
    np.testing.assert_allclose(numpy(smaller(data[0])), numpy(model(data[0])), atol=1e-5)
