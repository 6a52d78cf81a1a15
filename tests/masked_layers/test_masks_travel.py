"""Masks in everything that Keras derives from a masked model: files, clones, configs, copies."""

import copy
import json
import pickle
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import HandingOn, half_masks

# What they use of the backend is tested on JAX, too.
pytestmark = pytest.mark.slow("jax")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6, 4)).astype("float32")
Y = np.eye(3, dtype="float32")[np.arange(16) % 3]


@keras.saving.register_keras_serializable("test_masks_travel")
class MakesWhenBuilt(layers.Layer):
    """Has inner layers that are not in its config."""

    def build(self, shape):
        self.attention = layers.MultiHeadAttention(1, 2)
        self.attention.build(tuple(shape), tuple(shape))
        self.dense = layers.Dense(shape[-1])
        self.dense.build(tuple(shape))

    def call(self, x):
        return self.dense(self.attention(x, x))


@keras.saving.register_keras_serializable("test_masks_travel")
class Subclassed(keras.Model):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.body = [MakesWhenBuilt(), layers.GRU(2)]
        self.head = layers.Dense(3)

    def build(self, shape):
        self.body[0].build(shape)
        self.body[1].build(shape)
        self.head.build((None, 2))

    def call(self, x):
        for layer in self.body:
            x = layer(x)
        return self.head(x)


def pruned(model):
    """Sets a different mask on each weight, so that mixing them up is noticed."""
    ml.set_masks(
        model, {path: RNG.random(m.shape) < 0.5 for path, m in ml.get_masks(model).items()}
    )
    return model


def dense():
    model = keras.Sequential([keras.Input((6, 4)), layers.Flatten(), layers.Dense(5, "relu")])
    model.add(layers.Dense(3))
    model = pruned(ml.convert_to_masked(model))
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    return model


def composite():
    x = inputs = keras.Input((6, 4))
    x = layers.Bidirectional(layers.LSTM(2, return_sequences=True))(x)
    x = layers.TimeDistributed(layers.Dense(4))(x)
    x = layers.RNN([layers.GRUCell(3), layers.SimpleRNNCell(4)], return_sequences=True)(x)
    x = MakesWhenBuilt()(x)
    return pruned(ml.convert_to_masked(keras.Model(inputs, layers.SeparableConv1D(2, 2)(x))))


def deferred():
    model = keras.Sequential([layers.Bidirectional(layers.GRU(2)), layers.Dense(3)])
    model.build((None, 6, 4))
    return pruned(ml.convert_to_masked(model))


def subclassed():
    model = Subclassed()
    model.build((None, 6, 4))
    return pruned(ml.convert_to_masked(model))


def frozen():
    model = dense()
    first, second = ml.masked_refs(model)
    first.mask.rescale = True
    second.mask.freeze(RNG.normal(size=(5, 3)).astype("float32"))
    return model


def learned():
    model = keras.Sequential([keras.Input((6, 4)), layers.Flatten(), layers.Dense(3)])
    return ml.convert_to_masked(model, mask=ml.EdgePopupMask(sparsity=0.5, seed=1))


def with_weights_of(clone, model):
    if not clone.built:
        clone.build(X.shape)
    clone.set_weights(model.get_weights())
    return clone


def from_h5(model, folder):
    model.save(folder / "model.h5")
    return keras.models.load_model(folder / "model.h5")


def from_keras(model, folder):
    model.save(folder / "model.keras")
    return keras.models.load_model(folder / "model.keras")


WAYS = {
    "h5": from_h5,
    "keras": from_keras,
    "clone": lambda model, _: with_weights_of(keras.models.clone_model(model), model),
    "config": lambda model, _: with_weights_of(type(model).from_config(model.get_config()), model),
    "json": lambda model, _: with_weights_of(keras.models.model_from_json(model.to_json()), model),
    "deepcopy": lambda model, _: copy.deepcopy(model),
    "pickle": lambda model, _: pickle.loads(pickle.dumps(model)),
}
CASES = [
    *[(dense, way) for way in WAYS],
    *[(frozen, way) for way in ("h5", "keras", "json")],
    *[(learned, way) for way in ("h5", "clone")],
]
MADE_BY_KERAS = [
    pytest.param(composite, "h5", marks=pytest.mark.slow),
    *[(composite, way) for way in ("keras", "clone")],
    *[(deferred, way) for way in ("config", "clone")],
    *[(subclassed, way) for way in ("json", "clone", "pickle")],
]


def names(value):
    return value if isinstance(value, str) else value.__name__


def check_masks(other, model):
    masks, found = ml.get_masks(model), ml.get_masks(other)
    assert list(masks) == list(found)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, found[path], err_msg=path)


@pytest.mark.parametrize(("make", "way"), CASES, ids=names)
def test_masks_are_copied(make, way, tmp_path):
    model = make()
    other = WAYS[way](model, tmp_path)
    check_masks(other, model)
    expected = ops.convert_to_numpy(model(X))
    np.testing.assert_allclose(ops.convert_to_numpy(other(X)), expected, rtol=1e-5, atol=1e-6)
    assert np.abs(expected).max() > 1e-3


@pytest.mark.once
@pytest.mark.parametrize(("make", "way"), MADE_BY_KERAS, ids=names)
@pytest.mark.usefixtures("nothing_drawn")
def test_masks_of_layers_created_by_others_are_copied(make, way, tmp_path):
    model = make()
    check_masks(WAYS[way](model, tmp_path), model)


class HandingOnOptions(HandingOn):
    """Hands on options, so that Keras calls it without having built it."""

    def call(self, inputs, **kwargs):
        return self.inner(inputs, **kwargs)


@pytest.mark.once
def test_a_file_of_a_model_that_keras_cannot_build_is_refused_and_its_masks_are_not_lost(tmp_path):
    def called():
        model = HandingOnOptions()
        model(X)
        return ml.convert_to_masked(model)

    masked = called()
    half_masks(masked)
    masked.save(tmp_path / "m.keras")
    with pytest.raises(ValueError, match=r"name the arguments.* load the file into a model that"):
        keras.saving.load_model(
            tmp_path / "m.keras", custom_objects={"HandingOnOptions": HandingOnOptions}
        )
    other = called()
    other.load_weights(tmp_path / "m.keras")
    check_masks(other, masked)
    np.testing.assert_array_equal(other(X), masked(X))


@pytest.mark.once
def test_a_layer_that_was_never_built_has_nothing_to_load(tmp_path):
    model = ml.convert_to_masked(keras.Sequential([layers.Bidirectional(layers.LSTM(2))]))
    with pytest.warns(UserWarning, match="not yet been built"):
        model.save(tmp_path / "m.keras")
    loaded = keras.saving.load_model(tmp_path / "m.keras")
    loaded(np.ones((1, 3, 2), "float32"))
    assert len(ml.get_masks(loaded)) == 4


def test_a_clone_shares_no_variables_and_can_be_pruned_further():
    model = dense()
    clone = keras.models.clone_model(model)
    before = ml.get_masks(model)
    assert [tuple(w.shape) for w in clone.weights] == [tuple(w.shape) for w in model.weights]
    ml.set_masks(clone, {path: np.zeros_like(mask) for path, mask in before.items()})
    assert all(mask.any() for mask in ml.get_masks(model).values())


@pytest.mark.parametrize("save_freq", ["epoch", 1])
def test_checkpoints_hold_masks(tmp_path, save_freq):
    model, (native, weights, h5) = dense(), ("m.keras", "m.weights.h5", "m.h5")
    options = {native: {}, weights: {"save_weights_only": True}, h5: {}}
    model.fit(
        *(X, Y),
        verbose=0,
        callbacks=[
            keras.callbacks.ModelCheckpoint(tmp_path / name, save_freq=save_freq, **extra)
            for name, extra in options.items()
        ],
    )
    loaded = [keras.models.load_model(tmp_path / name) for name in (h5, native)]
    loaded.append(dense())
    loaded[-1].load_weights(tmp_path / weights)
    for other in loaded:
        np.testing.assert_allclose(other.predict_on_batch(X), model.predict_on_batch(X), 1e-5)


@pytest.mark.once
def test_scikit_learn_trains_the_sparse_model():
    base = pytest.importorskip("sklearn.base")
    pytest.importorskip("sklearn.pipeline")  # Keras does not import it.
    model = keras.Sequential([keras.Input((6,)), layers.Dense(3)])
    model = pruned(ml.convert_to_masked(model))
    model.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    estimator = base.clone(keras.wrappers.SKLearnClassifier(model, fit_kwargs={"verbose": 0}))
    estimator.fit(X[:, :, 0], Y.argmax(1))
    check_masks(estimator.model_, model)


def test_parts_of_a_model_share_its_masks():
    model = dense()
    part = keras.Model(model.inputs[0], model.layers[1].output)
    assert ops.convert_to_numpy(part(X)).any()
    ml.set_masks(model, {path: np.zeros_like(mask) for path, mask in ml.get_masks(model).items()})
    assert not ops.convert_to_numpy(part(X)).any()


@pytest.mark.once
def test_masks_saved_outside_the_config_are_not_repeated_in_it(tmp_path):
    model = dense()
    model.save(tmp_path / "m.keras")
    with zipfile.ZipFile(tmp_path / "m.keras") as file:
        assert b"mask_state" not in file.read("config.json")
    assert "mask_state" in model.to_json()
    new = ml.convert_to_masked(ml.strip_masks(model))
    assert "mask_state" not in new.to_json()


@pytest.mark.once
def test_config_of_one_layer():
    layer = ml.MaskedDense(3, mask_initializer="zeros", name="d")
    layer.build((None, 2))
    layer.kernel_mask.value.assign([[True, False, True], [True, True, True]])
    config = json.loads(json.dumps(layer.get_config()))
    again = ml.MaskedDense.from_config(config)
    assert again.get_config() == config  # Even before it is built.
    again.build((None, 2))
    np.testing.assert_array_equal(again.kernel_mask.to_numpy(), layer.kernel_mask.to_numpy())
    assert again.get_config() == config
    layer.kernel_mask.value.assign(np.ones((2, 3), bool))  # Not the value of the initializer.
    again = ml.MaskedDense.from_config(layer.get_config())
    again.build((None, 2))
    assert again.kernel_mask.to_numpy().all()


def damaged(change):
    layer = ml.MaskedDense(3, name="d")
    layer.build((None, 2))
    layer.kernel_mask.freeze(np.ones((2, 3), "float32"))
    config = layer.get_config()
    change(config, config["mask_state"]["kernel"])
    return config


@pytest.mark.once
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, state: config.update(units=4), r"shape \(2, 3\)"),
        (lambda config, state: state.update(bits=""), "incomplete|0"),
        (lambda config, state: state.update(bits="eJxjYAAAAAEAAQ!!"), "base64|alphabet|character"),
        (lambda config, state: state.update(bits="eJxjYAAAAAIAAQ=="), "1 values of uint8"),
        (lambda config, state: state.pop("bits"), "bits"),
        (lambda config, state: state["frozen"].update(dtype="int32"), "int32"),
        (lambda config, state: state["frozen"].update(dtype="float64"), "48 bytes. Received: 24"),
        (lambda config, state: state["frozen"].update(dtype="float16"), "12 bytes. Received: 13"),
        (lambda config, state: config["mask_state"].update(kernl=state), "kernl"),
    ],
)
def test_states_that_do_not_fit_are_refused(change, message):
    layer = ml.MaskedDense.from_config(damaged(change))
    with pytest.raises(ValueError, match=rf"`mask_state` of 'd'(?s:.*)({message})"):
        layer.build((None, 2))


@pytest.mark.once
def test_learned_masks_have_no_state_to_start_from():
    with pytest.raises(ValueError, match="binary"):
        ml.MaskedDense(3, mask="bernoulli", mask_state={"kernel": {}})
