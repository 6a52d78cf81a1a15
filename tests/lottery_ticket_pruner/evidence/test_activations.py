"""Norms of inputs against loops over positions, and Wanda's masks against a sort per output."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner
from lottery_ticket_pruner.evidence import input_norms

RNG = np.random.default_rng(0)


def masked(inputs, outputs, share=0.0, **kwargs):
    model = ml.convert_to_masked(keras.Model(inputs, outputs), **kwargs)
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) >= share for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def effective(ref):
    return keras.ops.convert_to_numpy(getattr(ref.layer, ref.name))


def test_dense_features_over_examples_and_positions():
    inputs = keras.Input((3, 4))
    hidden = layers.Dense(5, activation="relu", name="a")(inputs)
    model = masked(inputs, layers.Dense(2, activation="tanh", name="b")(hidden), share=0.3)
    x = RNG.normal(size=(7, 3, 4)).astype("float32")
    found = input_norms(model, x, batch_size=3)
    first, second = ml.masked_refs(model)
    np.testing.assert_allclose(
        found["a/kernel"], np.repeat(np.sqrt((x**2).sum((0, 1)))[:, None], 5, axis=1), rtol=1e-5
    )
    hidden = np.maximum(x @ effective(first), 0)
    np.testing.assert_allclose(
        found["b/kernel"],
        np.repeat(np.sqrt((hidden**2).sum((0, 1)))[:, None], 2, axis=1),
        rtol=1e-5,
    )
    assert second.layer.activation is keras.activations.tanh


def test_patches_of_a_convolution():
    inputs = keras.Input((6, 7, 4))
    convolution = layers.Conv2D(6, (3, 2), strides=2, padding="same", groups=2, name="c")
    model = masked(inputs, convolution(inputs))
    x = RNG.normal(size=(3, 6, 7, 4)).astype("float32")
    # Keras pads the remainder at the end: 1 row below, 1 column to the right.
    padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
    squares = np.zeros((3, 2, 2, 6))
    for row in range(0, 6, 2):
        for column in range(0, 7, 2):
            patch = padded[:, row : row + 3, column : column + 2] ** 2
            squares[..., :3] += patch[..., :2].sum(0)[..., None]
            squares[..., 3:] += patch[..., 2:].sum(0)[..., None]
    np.testing.assert_allclose(input_norms(model, x)["c/kernel"], np.sqrt(squares), rtol=1e-5)


def test_depthwise_and_transposed_convolutions():
    inputs = keras.Input((5, 3))
    depthwise = layers.DepthwiseConv1D(2, name="d")(inputs)
    transposed = layers.Conv1DTranspose(4, 2, strides=2, name="t")(inputs)
    model = masked(inputs, [depthwise, transposed])
    x = RNG.normal(size=(3, 5, 3)).astype("float32")
    found = input_norms(model, x)
    for k in range(2):  # an entry of the kernel meets positions k to k + 3
        expected = np.sqrt((x[:, k : k + 4] ** 2).sum((0, 1)))
        np.testing.assert_allclose(found["d/kernel"][k, :, 0], expected, rtol=1e-5)
    expected = np.sqrt((x**2).sum((0, 1)))  # every entry meets every position once
    np.testing.assert_allclose(found["t/kernel"], np.broadcast_to(expected, (2, 4, 3)), rtol=1e-5)


@pytest.mark.slow("jax")
def test_input_norms_of_attention_projections_in_a_nested_model():
    inner_inputs = keras.Input((4, 6))
    attention = layers.MultiHeadAttention(2, 3, name="attention")
    inner = keras.Model(inner_inputs, attention(inner_inputs, inner_inputs), name="inner")
    inputs = keras.Input((4, 6))
    model = masked(inputs, layers.Dense(1, name="out")(inner(inputs * 2.0)))
    x = RNG.normal(size=(5, 4, 6)).astype("float32")
    found = input_norms(model, x)
    refs = {ref.path: ref for ref in ml.masked_refs(model)}
    biases = {
        name: keras.ops.convert_to_numpy(refs[path].layer.bias)
        for path in refs
        if (name := path.split("/")[-2].removeprefix("_").removesuffix("_dense"))
    }

    def project(name):
        kernel = effective(refs[f"inner/attention/_{name}_dense/kernel"])
        return np.einsum("btd,dhk->bthk", 2 * x, kernel) + biases[name]

    features = np.sqrt(((2 * x) ** 2).sum((0, 1)))
    for name in ("query", "key", "value"):
        array = found[f"inner/attention/_{name}_dense/kernel"]
        np.testing.assert_allclose(
            array, np.broadcast_to(features[:, None, None], (6, 2, 3)), rtol=1e-5
        )
    scores = np.einsum("bqhk,bthk->bhqt", project("query"), project("key")) / np.sqrt(3)
    scores = np.exp(scores - scores.max(-1, keepdims=True))
    scores /= scores.sum(-1, keepdims=True)
    mixed = np.einsum("bhqt,bthk->bqhk", scores, project("value"))
    expected = np.sqrt((mixed**2).sum((0, 1)))[..., None]
    np.testing.assert_allclose(
        found["inner/attention/_output_dense/kernel"],
        np.broadcast_to(expected, (2, 3, 6)),
        rtol=1e-4,
    )


def test_layers_used_twice_and_biases_see_all_uses():
    inputs = keras.Input((3,))
    shared = layers.Dense(3, name="shared")
    model = masked(inputs, shared(shared(inputs)), mask_bias=True)
    x = RNG.normal(size=(4, 3)).astype("float32")
    found = input_norms(model, x)
    again = x @ effective(ml.masked_refs(model)[0])
    expected = np.sqrt((x**2).sum(0) + (again**2).sum(0))
    np.testing.assert_allclose(found["shared/kernel"][:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(found["shared/bias"], np.sqrt(8), rtol=1e-6)


def test_the_model_stays_as_it_was():
    inputs = keras.Input((3,))
    x = layers.BatchNormalization()(layers.Dropout(0.5)(layers.Dense(4, activation="relu")(inputs)))
    model = masked(inputs, layers.Dense(2)(x), share=0.5)
    before = [np.array(keras.ops.convert_to_numpy(v)) for v in model.variables]
    data = RNG.normal(size=(9, 3)).astype("float32")
    outputs = keras.ops.convert_to_numpy(model(data))
    attributes = [set(vars(layer)) for layer in model.layers]
    input_norms(model, data)
    assert [set(vars(layer)) for layer in model.layers] == attributes
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(model(data)), outputs)
    for variable, old in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), old)


def test_several_inputs_and_half_precision():
    inputs = {"a": keras.Input((3,), name="a"), "b": keras.Input((2,), name="b")}
    policy = "mixed_bfloat16"
    outputs = [
        layers.Dense(2, name=f"dense_{key}", dtype=policy)(each) for key, each in inputs.items()
    ]
    model = masked(inputs, outputs)
    x = {"a": RNG.normal(size=(4, 3)), "b": 1000 * RNG.normal(size=(4, 2))}
    found = input_norms(model, x)
    for key, array in x.items():
        expected = np.sqrt((array**2).sum(0))
        np.testing.assert_allclose(found[f"dense_{key}/kernel"][:, 1], expected, rtol=2e-2)


def test_layers_whose_inputs_are_not_known_are_named():
    inputs = keras.Input((3, 4))
    x = layers.SeparableConv1D(2, 2, name="s")(layers.Dense(3, name="d")(inputs))
    x = layers.GRU(2, name="g")(x)
    model = masked(inputs, x)
    with pytest.raises(ValueError, match=r"s/depthwise_kernel \(SeparableConv1D\).*exclude") as e:
        input_norms(model, np.zeros((2, 3, 4)))
    assert "GRUCell" in str(e.value)
    assert "d/kernel" not in str(e.value)
    with pytest.raises(ValueError, match="at least one example"):
        input_norms(masked(inputs, layers.Dense(2)(inputs)), np.zeros((0, 3, 4)))
    other = keras.Input((3, 4))
    two = masked([inputs, other], layers.Dense(2)(layers.Add()([inputs, other])))
    with pytest.raises(ValueError, match="arrays of lengths"):
        input_norms(two, [np.zeros((3, 3, 4)), np.zeros((4, 3, 4))])


def test_wanda_keeps_the_best_of_every_output():
    inputs = keras.Input((3, 4))
    outputs = layers.EinsumDense("abc,cde->abde", (None, 2, 3), name="e")(inputs)
    model = masked(inputs, outputs)
    x = RNG.normal(size=(7, 3, 4)).astype("float32") * [1, 10, 0.1, 1]
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("wanda", sparsity=0.5, data=x)
    (ref,) = ml.masked_refs(model)
    scores = np.abs(keras.ops.convert_to_numpy(ref.variable))
    norms = np.sqrt((x**2).sum((0, 1)))
    mask = ml.get_masks(model)["e/kernel"]
    for i in range(2):
        for j in range(3):
            best = np.argsort(scores[:, i, j] * norms)[2:]
            assert sorted(best) == np.flatnonzero(mask[:, i, j]).tolist()
    pruner.reset_masks()
    pruner.update_masks("wanda", structure="2:4", data=(x, None))
    np.testing.assert_array_equal(ml.get_masks(model)["e/kernel"], mask)
