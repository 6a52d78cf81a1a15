"""Normalization that leaves channels out."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from shrunk import inputs_of, numpy, randomize

pytestmark = pytest.mark.usefixtures("nothing_drawn")

MAKERS = {
    "layer": layers.LayerNormalization,
    "layer_no_beta": lambda **kwargs: layers.LayerNormalization(center=False, **kwargs),
    "rms": layers.RMSNormalization,
    "group": lambda **kwargs: layers.GroupNormalization(groups=1, **kwargs),
}
KEPT = np.array([1, 0, 1, 1, 0, 0, 1, 1], bool)
# On JAX, which compiles every operation for every one, one shows what differs between backends.
KINDS = [
    pytest.param(make, id=name, marks=[pytest.mark.slow("jax")] * (name != "layer"))
    for name, make in MAKERS.items()
]


def net(make, **kwargs):
    x = keras.Input((5, 4))
    y = make(name="norm", **kwargs)(layers.Dense(8, name="a")(x))
    return randomize(keras.Model(x, layers.Dense(3, name="b")(y)))


def masked_net(make, kept=KEPT, **kwargs):
    masked = ml.convert_to_masked(net(make, **kwargs), mask_normalization=True)
    (path,) = (ref.path for ref in ml.channel_refs(masked))
    ml.set_masks(masked, {path: kept})
    return masked


def layer_of(make, kept=KEPT, **kwargs):
    """Returns a masked layer with random weights over 8 channels."""
    return masked_net(make, kept, **kwargs).get_layer("norm")


def narrow_copy(layer):
    """Returns the plain Keras layer of the kept channels alone. The oracle."""
    config = layer.plain_class.get_config(layer)
    plain = layer.plain_class.from_config(config)
    plain.build((None, 5, int(KEPT.sum())))
    plain.set_weights([weight[KEPT] for weight in layer.get_weights()])
    return plain


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("dtype", ["float32", "mixed_float16", "bfloat16"])
def test_computes_the_plain_layer_of_the_kept_channels(make, dtype):
    layer = layer_of(make, dtype=dtype)
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 8)).astype("float32")
    got = layer(x)
    expected = narrow_copy(layer)(x[..., KEPT])
    assert got.dtype == expected.dtype
    got, expected = (numpy(keras.ops.cast(y, "float32")) for y in (got, expected))
    tolerance = {"float32": 1e-6}.get(dtype, 0.01)
    np.testing.assert_allclose(got[..., KEPT], expected, rtol=tolerance, atol=tolerance)
    assert not got[..., ~KEPT].view("uint32").any()  # Exactly +0.0.


def test_statistics_by_numpy():
    layer = layer_of(layers.LayerNormalization)
    x = np.random.default_rng(0).normal(3, 2, (2, 5, 8))
    kept = x[..., KEPT]
    mean, variance = (f(kept, axis=-1, keepdims=True) for f in (np.mean, np.var))
    gamma, beta = (weight[KEPT] for weight in layer.get_weights())
    expected = (kept - mean) / np.sqrt(variance + layer.epsilon) * gamma + beta
    np.testing.assert_allclose(numpy(layer(x))[..., KEPT], expected, rtol=1e-5, atol=1e-6)


# Keras cannot compute the others: RMSNormalization anywhere, LayerNormalization on torch.
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(layers.LayerNormalization, marks=pytest.mark.once("tensorflow", "jax")),
        MAKERS["group"],
    ],
    ids=["layer", "group"],
)
def test_channels_along_another_axis(make):
    x = np.random.default_rng(0).normal(3, 2, (2, 8, 5)).astype("float32")
    first = layers.Conv1D(8, 1, data_format="channels_first")
    model = randomize(keras.Sequential([keras.Input((8, 5)), first, make(axis=1)]))
    layer = ml.convert_to_masked(model, mask_normalization=True).layers[-1]
    ml.set_masks(layer, {"gamma": KEPT})
    plain = layer.plain_class.from_config(layer.plain_class.get_config(layer))
    plain.build((None, int(KEPT.sum()), 5))
    plain.set_weights([weight[KEPT] for weight in layer.get_weights()])
    got = numpy(layer(x))
    np.testing.assert_allclose(got[:, KEPT], numpy(plain(x[:, KEPT])), rtol=1e-5, atol=1e-5)
    assert not got[:, ~KEPT].any()


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, "float32", marks=[pytest.mark.slow("jax")] * (name != "layer"))
            for name in MAKERS
        ),
        ("layer", "mixed_float16"),
    ],
)
def test_bits_of_the_plain_model_while_all_channels_are_kept(name, dtype):
    plain = net(MAKERS[name], dtype=dtype)
    plain.compile("sgd", "mse", jit_compile=False)
    masked = ml.convert_to_masked(plain, mask_normalization=True)
    x = inputs_of(plain)
    np.testing.assert_array_equal(numpy(masked(x)), numpy(plain(x)))
    np.testing.assert_array_equal(masked.predict_on_batch(x), plain.predict_on_batch(x))
    y = np.random.default_rng(1).normal(size=(3, 5, 3))
    for model in (plain, masked):
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
    # Graph compilers may arrange the operations around the condition in another way.
    compiled = keras.backend.backend() != "torch"
    tolerance = {"float32": 1e-6}.get(dtype, 1e-3) if compiled else 0
    for a, b in zip(plain.get_weights(), masked.get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def gradients(model, x):
    """Returns the gradients of a weighted sum of the outputs, by the input and all weights."""
    ramp = np.linspace(-1, 1, 3, dtype="float32")
    variables = model.trainable_variables
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        x = tf.constant(x)
        with tf.GradientTape() as tape:
            tape.watch(x)
            loss = tf.reduce_sum(model(x) * ramp)
        found = tape.gradient(loss, [x, *variables])
        return [numpy(gradient) for gradient in found]
    if keras.backend.backend() == "jax":
        import jax

        def loss(x, values):
            outputs, _ = model.stateless_call(values, model.non_trainable_variables, x)
            return (outputs * ramp).sum()

        found = jax.grad(loss, (0, 1))(x, [v.value for v in variables])
        return [numpy(gradient) for gradient in (found[0], *found[1])]
    import torch

    x = torch.tensor(x, requires_grad=True)
    model.zero_grad()
    (model(x) * torch.tensor(ramp)).sum().backward()
    return [numpy(x.grad), *(numpy(v.value.grad) for v in variables)]


@pytest.mark.parametrize("make", KINDS)
def test_gradients_are_those_of_the_kept_channels(make):
    masked = masked_net(make)
    norm = masked.get_layer("norm")
    x = keras.Input((5, 4))
    narrow = keras.Model(
        x,
        layers.Dense(3, name="b")(narrow_copy(norm)(layers.Dense(5, name="a")(x))),
    )
    a, b = (masked.get_layer(name).get_weights() for name in "ab")
    narrow.get_layer("a").set_weights([weight[..., KEPT] for weight in a])
    narrow.get_layer("b").set_weights([b[0][KEPT], b[1]])
    data = inputs_of(masked)
    found, expected = gradients(masked, data), gradients(narrow, data)
    for got, wanted in zip(found, expected, strict=True):
        if got.shape != wanted.shape:  # Those of channels that are left out are exactly 0.
            axis = got.shape.index(8)
            assert not np.compress(~KEPT, got, axis).any()
            got = np.compress(KEPT, got, axis)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_raw_values_of_left_out_channels_are_not_read(make, value):
    masked = masked_net(make)
    data = inputs_of(masked)
    expected = [numpy(masked(data)), *gradients(masked, data)]
    for layer, names in (("a", ["bias"]), ("norm", ["gamma", "beta", "scale"])):
        for name in names:
            variable = getattr(masked.get_layer(layer), name, None)
            if isinstance(variable, keras.Variable) or name == "bias":
                array = numpy(variable)
                array[~KEPT] = value
                variable.assign(array)
    got = [numpy(masked(data)), *gradients(masked, data)]
    for a, b in zip(expected, got, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_masks_change_in_functions_that_are_already_compiled(make):
    masked = masked_net(make, np.ones(8, bool))
    data = inputs_of(masked)
    (path,) = (ref.path for ref in ml.channel_refs(masked))
    before = masked.predict_on_batch(data)
    ml.set_masks(masked, {path: KEPT})
    np.testing.assert_allclose(masked.predict_on_batch(data), numpy(masked(data)), rtol=1e-5)
    ml.set_masks(masked, {path: np.ones(8, bool)})
    np.testing.assert_array_equal(masked.predict_on_batch(data), before)


def test_no_channel_left():
    layer = layer_of(layers.LayerNormalization, np.zeros(8, bool))
    assert not numpy(layer(np.ones((2, 8), "float32"))).any()


# --- Masks as state -------------------------------------------------------------------------------


def test_only_on_request():
    masked = ml.convert_to_masked(net(layers.LayerNormalization), mask_bias=True)
    assert type(masked.get_layer("norm")) is layers.LayerNormalization
    assert ml.channel_refs(masked) == []
    again = ml.convert_to_masked(masked, mask_normalization=True)  # Adds to masks that exist.
    assert list(ml.get_masks(again)) == ["a/kernel", "a/bias", "b/kernel", "b/bias", "norm/gamma"]


@pytest.mark.once
@pytest.mark.parametrize(
    "layer",
    [
        layers.LayerNormalization(axis=(1, 2)),
        layers.LayerNormalization(scale=False),
        layers.GroupNormalization(2),
        layers.GroupNormalization(-1),
        layers.BatchNormalization(),
    ],
    ids=lambda layer: layer.name,
)
def test_normalization_that_cannot_leave_channels_out_stays_plain(layer):
    model = keras.Sequential([keras.Input((5, 4)), layers.Dense(8), layer])
    masked = ml.convert_to_masked(model, mask_normalization=True)
    assert ml.channel_refs(masked) == []
    assert type(masked.layers[-1]) is type(layer)


@pytest.mark.once
def test_a_subclass_that_may_compute_something_else_stays_plain():
    class Own(layers.LayerNormalization):
        pass

    model = keras.Sequential([keras.Input((5, 4)), layers.Dense(8), Own()])
    assert ml.channel_refs(ml.convert_to_masked(model, mask_normalization=True)) == []


def test_masks_are_not_counted_as_weights():
    masked = masked_net(layers.LayerNormalization)
    assert [ref.path for ref in ml.channel_refs(masked)] == ["norm/gamma"]
    assert [ref.path for ref in ml.masked_refs(masked)] == ["a/kernel", "b/kernel"]
    assert [ref.path for ref in ml.weight_refs(masked)] == ["a/kernel", "b/kernel"]
    report = ml.sparsity_report(masked)
    assert (report.size, report.alive) == (4 * 8 + 8 * 3, 4 * 8 + 8 * 3)
    assert report.reasons["norm"] == "masked by channel, which counts no weights"


@pytest.mark.once
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("way", ["file", "clone", "json", "config", "masks", "weights"])
def test_masks_travel(make, way, tmp_path):
    masked = masked_net(make)
    if way == "file":
        masked.save(tmp_path / "model.keras")
        again = keras.models.load_model(tmp_path / "model.keras")
    elif way == "clone":
        again = keras.models.clone_model(masked)
    elif way == "json":
        again = keras.models.model_from_json(masked.to_json())
    elif way == "config":
        again = keras.Model.from_config(masked.get_config())
    else:
        again = masked_net(make, ~KEPT)
        if way == "masks":
            ml.save_masks(masked, tmp_path / "masks.npz")
            ml.load_masks(again, tmp_path / "masks.npz")
        else:
            masked.save_weights(tmp_path / "model.weights.h5")
            again.load_weights(tmp_path / "model.weights.h5")
    again.set_weights(masked.get_weights())
    (ref,) = ml.channel_refs(again)
    np.testing.assert_array_equal(ref.mask.to_numpy(), KEPT)
    assert type(again.get_layer("norm")) is type(masked.get_layer("norm"))
    data = inputs_of(masked)
    np.testing.assert_array_equal(numpy(again(data)), numpy(masked(data)))


def test_masked_again_and_constructed_directly():
    layer = ml.MaskedLayerNormalization()
    layer.build((None, 8))
    assert list(ml.get_masks(layer)) == ["gamma"]
    ml.set_masks(layer, {"gamma": KEPT})
    copy = ml.MaskedLayerNormalization.from_config(layer.get_config())
    copy.build((None, 8))
    np.testing.assert_array_equal(ml.get_masks(copy)["gamma"], KEPT)
    without = ml.MaskedRMSNormalization(masked_weights=[])
    without.build((None, 8))
    assert ml.channel_refs(without) == []


@pytest.mark.once
def test_masks_inside_a_layer_that_contains_the_normalization(tmp_path):
    x = keras.Input((5, 4))
    y = layers.TimeDistributed(layers.LayerNormalization(), name="each")(layers.Dense(8)(x))
    masked = ml.convert_to_masked(keras.Model(x, y), mask_normalization=True)
    (ref,) = ml.channel_refs(masked)
    assert ref.path == "each/layer/gamma"
    ml.set_masks(masked, {ref.path: KEPT})
    masked.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ml.get_masks(again)[ref.path], KEPT)
    data = inputs_of(masked)
    np.testing.assert_array_equal(numpy(again(data)), numpy(masked(data)))


def test_stripping_refuses_while_channels_are_left_out(tmp_path):
    masked = masked_net(layers.LayerNormalization)
    data = inputs_of(masked)
    with pytest.raises(ValueError, match=r"'norm' leaves out 3 of 8 channels, .*shrink"):
        ml.strip_masks(masked)
    ml.set_masks(masked, {"norm/gamma": np.ones(8, bool)})
    plain = ml.strip_masks(masked)
    assert type(plain.get_layer("norm")) is layers.LayerNormalization
    np.testing.assert_array_equal(numpy(plain(data)), numpy(masked(data)))


@pytest.mark.once
def test_export_refuses_while_channels_are_left_out(tmp_path):
    masked = masked_net(layers.LayerNormalization)
    with pytest.raises(ValueError, match=r"'norm' leaves out 3 of 8 channels, .*shrink"):
        ml.export_sparse_saved_model(masked, tmp_path / "model")
    ml.set_masks(masked, {"norm/gamma": np.ones(8, bool)})
    ml.export_sparse_saved_model(masked, tmp_path / "model")


@pytest.mark.once
def test_learned_masks_are_refused():
    model = net(layers.LayerNormalization)
    with pytest.raises(ValueError, match="needs binary masks"):
        ml.convert_to_masked(model, mask="bernoulli", mask_normalization=True)


def test_regularizer_sees_the_kept_channels_only():
    layer = layer_of(lambda **k: layers.LayerNormalization(gamma_regularizer="l2", **k))
    gamma = layer.get_weights()[0]
    np.testing.assert_allclose(numpy(layer.losses[0]), 0.01 * np.sum(gamma[KEPT] ** 2), rtol=1e-5)
