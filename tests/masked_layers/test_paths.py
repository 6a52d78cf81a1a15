"""The walk over the layers of a model: all layers that Keras tracks, with stable paths."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import data, numpy
from masked_layers import _keras, paths
from masked_layers.copying import copy_model


@keras.saving.register_keras_serializable("walk")
class Encoder(layers.Layer):
    """Has the structure of keras-hub's TransformerEncoder, whose attention begins with `_self_`."""

    def build(self, shape):
        width = shape[-1]
        self._self_attention_layer = layers.MultiHeadAttention(2, width // 2, name="attention")
        self._self_attention_layer.build(shape, shape)
        self._self_attention_layer_norm = layers.LayerNormalization()
        self._self_attention_layer_norm.build(shape)
        self._feedforward = layers.Dense(width)
        self._feedforward.build(shape)

    def call(self, x):
        x = self._self_attention_layer_norm(x + self._self_attention_layer(x, x))
        return x + self._feedforward(x)


@keras.saving.register_keras_serializable("walk")
class Decoder(Encoder):
    def build(self, shape):
        super().build(shape)
        self._self_cross_attention = {"layer": layers.MultiHeadAttention(2, 4)}
        self._self_cross_attention["layer"].build(shape, shape)

    def call(self, x):
        return super().call(x) + self._self_cross_attention["layer"](x, x)


@keras.saving.register_keras_serializable("walk")
class Branches(layers.Layer):
    """Layers in a set, next to another set inside a dict."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.branches = {layers.Dense(8, use_bias=False, name=name) for name in "dcba"}
        self.more = {"automatic": {layers.Dense(8, use_bias=False) for _ in range(3)}}

    def build(self, shape):
        for layer in (*self.branches, *self.more["automatic"]):
            layer.build(shape)

    def call(self, x):
        for layer in sorted(self.branches, key=lambda layer: layer.name):
            x = layer(x)
        numbered = sorted(self.more["automatic"], key=lambda layer: (len(layer.name), layer.name))
        return x + sum(layer(x) for layer in numbered)


@keras.saving.register_keras_serializable("walk")
class Mixed(layers.Layer):
    """A layer of each kind in a set, and lists in dicts in lists."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.kinds = {layers.EinsumDense("abc,cd->abd", (None, 8)), layers.Dense(8)}
        self.nested = [{"one": [layers.Dense(8), (layers.Dense(8),)]}, layers.LayerNormalization()]
        self.again = self.nested[0]["one"][0]

    def build(self, shape):
        for layer in (*self.kinds, *self.nested[0]["one"][:1], self.nested[0]["one"][1][0]):
            layer.build(shape)
        self.nested[1].build(shape)

    def call(self, x):
        for layer in sorted(self.kinds, key=lambda layer: layer.name):
            x = layer(x)
        first, (second,) = self.nested[0]["one"]
        return self.nested[1](second(first(x))) + self.again(x)


@keras.saving.register_keras_serializable("walk")
class Replaced(layers.Layer):
    """Keras keeps tracking a layer after its attribute is replaced."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.layer = layers.Dense(8)
        self.layer = layers.Dense(8)

    def build(self, shape):
        for layer in _keras.sublayers(self):
            layer.build(shape)

    def call(self, x):
        return self.layer(x)


@keras.saving.register_keras_serializable("walk")
class Prefixed(keras.Model):
    """Names its layers after itself if it has a name, like encoders of keras-hub."""

    def __init__(self, name=None, **kwargs):
        prefix = f"{name}_" if name else ""
        x = inputs = keras.Input((5, 8), name=f"{prefix}inputs")
        inner = keras.Sequential([layers.Dense(8, name=f"{prefix}deep")], name=f"{prefix}inner")
        outputs = Encoder(name=f"{prefix}encoder")(inner(layers.Dense(8, name=f"{prefix}in")(x)))
        super().__init__(inputs, outputs, name=name, **kwargs)

    def get_config(self):
        return {"name": self.name}


def functional(*chain):
    x = inputs = keras.Input((5, 8))
    for layer in chain:
        x = layer(x)
    return keras.Model(inputs, x)


def shared():
    encoder = Encoder()
    return functional(encoder, layers.Dense(8), encoder)


ZOO = {
    "encoder": lambda: functional(Encoder()),
    "decoder": lambda: functional(Decoder(), Encoder()),
    "set": lambda: functional(Branches()),
    "mixed": lambda: functional(Mixed()),
    "shared": shared,
    "replaced": lambda: functional(Replaced()),
    "nested": lambda: functional(layers.TimeDistributed(layers.Dense(8)), shared(), Mixed()),
    "sequential": lambda: keras.Sequential([keras.Input((5, 8)), Decoder(), layers.Dense(2)]),
    "recurrent": lambda: functional(layers.Bidirectional(layers.LSTM(3)), layers.Dense(2)),
    "stacked": lambda: functional(layers.RNN([layers.GRUCell(3), layers.SimpleRNNCell(2)])),
    "prefixed": Prefixed,
}


def tracked(model):
    return {id(layer) for layer in _keras.flatten(model) if not isinstance(layer, ml.Mask)}


def kernels(model):
    """Returns the ids of all weights with at least two axes that are not biases."""
    return {id(w) for w in model.weights if len(w.shape) > 1 and w.name != "bias"}


@pytest.mark.once
@pytest.mark.parametrize("name", ZOO)
def test_the_walk_finds_every_layer_that_keras_tracks(name):
    plain = ZOO[name]()
    assert {id(layer) for _, layer in paths.walk(plain)} == tracked(plain)
    masked = ml.convert_to_masked(plain)
    assert {id(layer) for _, layer in paths.walk(masked)} == tracked(masked)
    assert {id(ref.variable) for ref in ml.masked_refs(masked)} == kernels(masked)
    names = [path for path, _ in paths.walk(plain)]
    assert len(set(names)) == len(names)
    assert names == [path for path, _ in paths.walk(ZOO[name]())]
    for path, layer in list(paths.walk(plain))[1:]:
        assert paths.resolve(plain, f"{path}/kernel")[-1][1] is layer


EVERYWHERE = ("nested", "stacked")  # paths do not depend on the backend, weights in files may
SLOW = ("shared", "mixed", "sequential")  # of what "nested" and "decoder" contain


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            n, marks=[pytest.mark.once] * (n not in EVERYWHERE) + [pytest.mark.slow] * (n in SLOW)
        )
        for n in ZOO
    ],
)
def test_masks_of_every_layer_survive_saving_and_stripping(name, tmp_path):
    x = data(2, 5, 8)
    plain = ZOO[name]()
    masked = ml.convert_to_masked(plain)
    np.testing.assert_array_equal(numpy(masked(x)), numpy(plain(x)))
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) < 0.5 for path, mask in ml.get_masks(masked).items()}
    ml.set_masks(masked, masks)
    ml.save_masks(masked, tmp_path / "masks.npz")
    masked.save(tmp_path / "masked.keras")
    loaded = keras.models.load_model(tmp_path / "masked.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(masked(x)))
    assert {**ml.get_masks(loaded)}.keys() == masks.keys()
    for path, mask in ml.get_masks(loaded).items():
        np.testing.assert_array_equal(mask, masks[path])
    ml.load_masks(loaded, tmp_path / "masks.npz")
    stripped = ml.strip_masks(loaded)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in _keras.flatten(stripped))
    np.testing.assert_array_equal(numpy(stripped(x)), numpy(masked(x)))
    assert numpy(stripped(x)).std() > 0


def test_masks_of_layers_in_sets_are_copied_and_stripped():
    x = data(2, 5, 8)
    masked = ml.convert_to_masked(ZOO["set"]())
    rng = np.random.default_rng(1)
    ml.set_masks(masked, {p: rng.random(m.shape) < 0.5 for p, m in ml.get_masks(masked).items()})
    names = [path for path, *_ in ml.get_masks(masked).items()]
    assert names[:4] == [f"branches/branches/{name}/kernel" for name in "abcd"]
    assert names[4:] == [
        f"branches/more/automatic/{name}/kernel" for name in ("dense", "dense_1", "dense_2")
    ]
    outputs = numpy(masked(x))
    np.testing.assert_array_equal(numpy(copy_model(masked)(x)), outputs)
    np.testing.assert_array_equal(numpy(ml.strip_masks(masked)(x)), outputs)


@pytest.mark.once
def test_layers_in_a_set_are_numbered_as_they_were_made():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.made = [layers.Dense(1) for _ in range(12)]  # dense_9 comes before dense_10.
            self._self_set = set(self.made)
            made, self.made = list(self.made), None
            self.check = tuple(id(layer) for layer in made)

    block = Block()
    found = {path: id(layer) for path, layer in paths.children(block)}
    expected = ["_self_set/dense", *(f"_self_set/dense_{i}" for i in range(1, 12))]
    assert found == dict(zip(expected, block.check, strict=True))


@pytest.mark.once
def test_two_layers_of_one_name_in_a_set_are_refused():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self.branches = {layers.Dense(2, name="a"), layers.Dense(2, name="a")}

    with pytest.raises(ValueError, match=r"set 'branches' have the same name.*different names"):
        paths.children(Block())


@pytest.mark.once
def test_paths_of_earlier_versions_stay_where_a_layer_is_held_twice():
    class Block(layers.Layer):
        def __init__(self):
            super().__init__()
            self._self_first = layers.Dense(2)
            self.pool = {self._self_first}
            self.projection = self._self_first

    assert [path for path, _ in paths.children(Block())] == ["projection"]


@pytest.mark.once
def test_a_layer_that_the_walk_loses_is_an_error(monkeypatch):
    model = ZOO["encoder"]()
    find = paths.children
    monkeypatch.setattr(
        paths, "children", lambda layer: [c for c in find(layer) if c[0] != "_self_attention_layer"]
    )
    with pytest.raises(ValueError, match=r"no path leads to.*'encoder.*attention.*Attention"):
        ml.convert_to_masked(model)
    assert not any(isinstance(layer, ml.MaskedLayer) for layer in _keras.flatten(model))


def test_a_file_without_the_layers_of_a_set_says_so(tmp_path):
    plain = ZOO["set"]()
    masked = ml.convert_to_masked(plain)
    plain.save_weights(tmp_path / "plain.weights.h5")
    with pytest.warns(
        UserWarning, match="Keras does not save plain layers that are stored in a set"
    ):
        masked.load_weights(tmp_path / "plain.weights.h5")
