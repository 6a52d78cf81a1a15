"""Masked layers created directly: every Keras layer with a kernel, and the effect of its mask."""

import ast
import inspect
import pickle
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from common import half_masks, numpy
from masked_layers import classes
from masked_layers.layers import MASKED_CLASSES
from masked_layers.maskable import NORMALIZATIONS

SEQUENCE = (2, 6, 4)
IMAGE = (2, 6, 6, 4)
VOLUME = (2, 5, 5, 5, 2)
TOKENS = (2, 6)
FRAMES = (2, 3, 5, 5, 2)

# Keras class -> (positional and keyword arguments, shape of the input, paths of its kernels)
CASES = {
    layers.Dense: ((3,), {"activation": "relu"}, (2, 4), ["kernel"]),
    layers.EinsumDense: (
        ("abc,cd->abd",),
        {"output_shape": (None, 3), "bias_axes": "d"},
        SEQUENCE,
        ["kernel"],
    ),
    layers.Embedding: ((7, 3), {}, TOKENS, ["embeddings"]),
    layers.ReversibleEmbedding: (
        (7, 3),
        {"tie_weights": False},
        TOKENS,
        ["embeddings", "reverse_embeddings"],
    ),
    layers.Conv1D: ((3, 2), {}, SEQUENCE, ["kernel"]),
    layers.Conv2D: ((3, 2), {"strides": 2}, IMAGE, ["kernel"]),
    layers.Conv3D: ((3, 2), {}, VOLUME, ["kernel"]),
    layers.Conv1DTranspose: ((3, 2), {}, SEQUENCE, ["kernel"]),
    layers.Conv2DTranspose: ((3, 2), {}, IMAGE, ["kernel"]),
    layers.Conv3DTranspose: ((3, 2), {}, VOLUME, ["kernel"]),
    layers.DepthwiseConv1D: ((2,), {}, SEQUENCE, ["kernel"]),
    layers.DepthwiseConv2D: ((2,), {"depth_multiplier": 2}, IMAGE, ["kernel"]),
    layers.SeparableConv1D: ((3, 2), {}, SEQUENCE, ["depthwise_kernel", "pointwise_kernel"]),
    layers.SeparableConv2D: ((3, 2), {}, IMAGE, ["depthwise_kernel", "pointwise_kernel"]),
    layers.SimpleRNN: ((3,), {}, SEQUENCE, ["cell/kernel", "cell/recurrent_kernel"]),
    layers.LSTM: ((3,), {}, SEQUENCE, ["cell/kernel", "cell/recurrent_kernel"]),
    layers.GRU: ((3,), {}, SEQUENCE, ["cell/kernel", "cell/recurrent_kernel"]),
    layers.ConvLSTM1D: ((2, 2), {}, (2, 3, 5, 2), ["cell/kernel", "cell/recurrent_kernel"]),
    layers.ConvLSTM2D: ((2, 2), {}, FRAMES, ["cell/kernel", "cell/recurrent_kernel"]),
    layers.ConvLSTM3D: (
        (2, 2),
        {},
        (1, 2, 4, 4, 4, 1),
        ["cell/kernel", "cell/recurrent_kernel"],
    ),
    layers.MultiHeadAttention: (
        (2, 3),
        {},
        (SEQUENCE, SEQUENCE),
        [f"_{name}_dense/kernel" for name in ("query", "key", "value", "output")],
    ),
    layers.GroupQueryAttention: (
        (3, 4, 2),
        {},
        (SEQUENCE, SEQUENCE),
        [f"_{name}_dense/kernel" for name in ("query", "key", "value", "output")],
    ),
}
CELLS = {layers.SimpleRNNCell, layers.LSTMCell, layers.GRUCell}
WRAPPERS = {layers.TimeDistributed, layers.Bidirectional}


def inputs_for(shapes, seed=0):
    rng = np.random.default_rng(seed)
    if isinstance(shapes[0], int):
        shapes = (shapes,)
    return [
        rng.integers(0, 7, shape) if shape == TOKENS else rng.normal(size=shape).astype("float32")
        for shape in shapes
    ]


def multiply_raw_weights(model):
    """Returns the plain weights that compute the same as the masked model. The oracle."""
    for ref in ml.masked_refs(model):
        kept = numpy(ref.mask.value)
        yield ref.path, np.where(kept, numpy(ref.variable), 0)


def test_every_masked_class_is_covered_here():
    # `test_normalization.py` covers those that mask channels and not weights.
    assert set(MASKED_CLASSES) == set(CASES) | CELLS | WRAPPERS | set(NORMALIZATIONS)
    for base, masked in MASKED_CLASSES.items():
        assert masked.__qualname__ == f"Masked{base.__name__}"
        assert getattr(ml, masked.__qualname__) is masked
        assert pickle.loads(pickle.dumps(masked)) is masked


@pytest.mark.once
@pytest.mark.parametrize("base", CASES, ids=lambda base: base.__name__)
def test_arguments_are_those_of_the_base_layer_and_the_masking_ones(base):
    plain = inspect.signature(base.__init__).parameters
    masked = inspect.signature(MASKED_CLASSES[base].__init__).parameters
    assert set(masked) - set(plain) <= {
        "masked_weights",
        "mask_bias",
        "mask_initializer",
        "mask",
        "mask_state",
        "kwargs",
    }
    for name, parameter in plain.items():
        assert masked[name].default == parameter.default
    assert inspect.signature(MASKED_CLASSES[base]).parameters["mask_initializer"].default == "ones"


@pytest.mark.parametrize(
    "base",
    [
        # In one and three dimensions they differ from those in two in nothing but their shapes.
        pytest.param(base, marks=[pytest.mark.slow("jax")] * base.__name__.endswith(("1D", "3D")))
        for base in CASES
    ],
    ids=lambda base: base.__name__,
)
def test_made_by_hand_equals_the_plain_layer_bit_for_bit(base):
    args, kwargs, shapes, paths = CASES[base]
    inputs = inputs_for(shapes)
    plain, masked = base(*args, **kwargs), MASKED_CLASSES[base](*args, **kwargs)
    plain(*inputs), masked(*inputs)
    masked.set_weights(plain.get_weights())
    assert [ref.path for ref in ml.masked_refs(masked)] == paths
    assert masked.count_params() == plain.count_params()
    np.testing.assert_array_equal(numpy(masked(*inputs)), numpy(plain(*inputs)))

    half_masks(masked)
    expected = dict(multiply_raw_weights(masked))
    for ref in ml.weight_refs(plain):
        ref.variable.assign(expected[ref.path])
    np.testing.assert_array_equal(numpy(masked(*inputs)), numpy(plain(*inputs)))
    if base is layers.ReversibleEmbedding:
        reverse = np.ones((2, 3), "float32")
        np.testing.assert_array_equal(
            numpy(masked(reverse, reverse=True)), numpy(plain(reverse, reverse=True))
        )


@pytest.mark.once
@pytest.mark.parametrize("base", CASES, ids=lambda base: base.__name__)
def test_saved_and_loaded_without_custom_objects(base, tmp_path):
    args, kwargs, shapes, _ = CASES[base]
    arrays = inputs_for(shapes)
    symbols = [keras.Input(a.shape[1:], dtype=str(a.dtype)) for a in arrays]
    layer = MASKED_CLASSES[base](*args, **kwargs, mask_bias=True)
    model = keras.Model(symbols, layer(*symbols))
    half_masks(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert type(loaded.layers[-1]) is MASKED_CLASSES[base]
    assert loaded.layers[-1].get_config() == layer.get_config()
    masks, again = ml.get_masks(model), ml.get_masks(loaded)
    assert list(masks) == list(again)
    for path, mask in masks.items():
        np.testing.assert_array_equal(mask, again[path])
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)  # Raw values, including those under the masks.
    np.testing.assert_array_equal(
        numpy(loaded(arrays, training=False)), numpy(model(arrays, training=False))
    )


@pytest.mark.once
@pytest.mark.parametrize("base", CASES, ids=lambda base: base.__name__)
def test_masks_of_chosen_weights_only(base):
    args, kwargs, shapes, paths = CASES[base]
    masked = MASKED_CLASSES[base](*args, **kwargs, masked_weights=paths[-1:])
    masked(*inputs_for(shapes))
    assert list(ml.get_masks(masked)) == paths[-1:]
    copy = MASKED_CLASSES[base].from_config(masked.get_config())
    copy(*inputs_for(shapes))
    assert list(ml.get_masks(copy)) == paths[-1:]


def test_bias_masks_on_request():
    layer = ml.MaskedDense(3, mask_bias=True, bias_initializer="ones")
    layer.build((None, 4))
    assert list(ml.get_masks(layer)) == ["kernel", "bias"]
    ml.set_masks(layer, {"bias": [True, False, True]})
    np.testing.assert_array_equal(numpy(layer(np.zeros((1, 4)))), [[1, 0, 1]])


def test_layer_without_bias_has_no_bias_mask():
    layer = ml.MaskedDense(3, mask_bias=True, use_bias=False)
    layer.build((None, 4))
    assert list(ml.get_masks(layer)) == ["kernel"]


def test_mask_initializer():
    wanted = np.array([[1, 0], [0, 1]])
    layer = ml.MaskedDense(2, mask_initializer=keras.initializers.Constant(wanted))
    layer.build((None, 2))
    np.testing.assert_array_equal(ml.get_masks(layer)["kernel"], wanted.astype(bool))


def test_unknown_masked_weight_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"no weight 'kernle'.*\['kernel', 'bias'\]"):
        ml.MaskedDense(2, masked_weights=["kernle"]).build((None, 2))


@pytest.mark.parametrize("cell", sorted(CELLS, key=lambda c: c.__name__), ids=lambda c: c.__name__)
def test_cells_by_hand_in_a_plain_rnn(cell, tmp_path):
    plain, masked = layers.RNN(cell(3)), layers.RNN(MASKED_CLASSES[cell](3))
    x = inputs_for(SEQUENCE)[0]
    plain(x), masked(x)
    masked.set_weights(plain.get_weights())
    np.testing.assert_array_equal(numpy(masked(x)), numpy(plain(x)))
    model = keras.Sequential([keras.Input(SEQUENCE[1:]), layers.RNN(MASKED_CLASSES[cell](3))])
    half_masks(model)
    model.save(tmp_path / "rnn.keras")
    loaded = keras.models.load_model(tmp_path / "rnn.keras")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


@pytest.mark.parametrize(
    "make",
    [
        lambda: ml.MaskedTimeDistributed(layers.Dense(3)),
        lambda: layers.TimeDistributed(ml.MaskedDense(3)),
        lambda: ml.MaskedBidirectional(layers.LSTM(3)),
        lambda: layers.Bidirectional(ml.MaskedLSTM(3)),
        lambda: ml.MaskedBidirectional(layers.GRU(3), masked_weights=["forward_layer/cell/kernel"]),
    ],
)
def test_wrappers(make, tmp_path):
    model = keras.Sequential([keras.Input(SEQUENCE[1:]), make()])
    half_masks(model)
    model.save(tmp_path / "wrapped.keras")
    loaded = keras.models.load_model(tmp_path / "wrapped.keras")
    x = inputs_for(SEQUENCE)[0]
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))
    assert list(ml.get_masks(loaded)) == list(ml.get_masks(model))
    for a, b in zip(model.get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


# --- Properties of masks --------------------------------------------------------------------------


def test_pruned_entries_are_positive_zero_for_any_raw_weight():
    layer = ml.MaskedDense(5, use_bias=False)
    layer.build((None, 1))
    layer.set_weights([np.array([[-1.0, np.nan, np.inf, -0.0, 2.0]], "float32")])
    ml.set_masks(layer, {"kernel": [[False, False, False, False, True]]})
    kernel = numpy(layer.kernel)
    np.testing.assert_array_equal(kernel, [[0, 0, 0, 0, 2]])
    assert not np.signbit(kernel).any()
    np.testing.assert_array_equal(numpy(layer(np.ones((1, 1)))), [[0, 0, 0, 0, 2]])


def test_a_mask_is_state_and_not_a_weight():
    layer = ml.MaskedDense(3)
    layer.build((None, 4))
    assert [v.path.rsplit("/", 1)[1] for v in layer.weights] == ["kernel", "bias"]
    assert layer.kernel_mask.weights == []
    assert any(v is layer.kernel_mask.value for v in layer.non_trainable_variables)
    assert not any(v is layer.kernel_mask.value for v in layer.non_trainable_weights)
    assert layer.kernel_mask.value.path.endswith(f"{layer.name}/kernel_mask/value")
    value = numpy(layer.kernel_mask.value)
    assert (value.dtype, value.nbytes) == (np.dtype(bool), 12)


def test_training_a_frozen_and_thawed_layer_never_trains_its_mask():
    layer = ml.MaskedDense(3)
    layer.build((None, 4))
    layer.trainable = False
    layer.trainable = True
    assert [v.path.rsplit("/", 1)[1] for v in layer.trainable_variables] == ["kernel", "bias"]


def test_regularizer_and_constraint_act_on_the_effective_weight():
    layer = ml.MaskedDense(
        2, use_bias=False, kernel_regularizer="l2", kernel_constraint=keras.constraints.MaxNorm(1.0)
    )
    layer.build((None, 2))
    layer.set_weights([np.array([[3.0, 1.0], [4.0, 1.0]], "float32")])
    ml.set_masks(layer, {"kernel": [[True, True], [False, True]]})
    np.testing.assert_allclose(float(numpy(layer.losses[0])), 0.01 * (9 + 1 + 1), rtol=1e-6)
    variable = ml.masked_refs(layer)[0].variable
    constrained = numpy(variable.constraint(variable))
    # Column 0 has norm 3 without its pruned entry, which keeps its raw value.
    np.testing.assert_allclose(constrained, [[1.0, 0.5**0.5], [4.0, 0.5**0.5]], rtol=1e-5)


def test_rescaling_multiplies_by_size_over_ones_and_is_never_stored():
    layer = ml.MaskedDense(2, use_bias=False)
    layer.build((None, 4))
    raw = np.arange(1.0, 9.0, dtype="float32").reshape(4, 2)
    layer.set_weights([raw])
    keep = np.array([[1, 0], [0, 0], [0, 1], [0, 0]], bool)
    ml.set_masks(layer, {"kernel": keep})
    layer.kernel_mask.rescale = True
    for _ in range(3):  # Repetition changes nothing.
        np.testing.assert_array_equal(numpy(layer.kernel), np.where(keep, raw, 0) * 4)
    np.testing.assert_array_equal(layer.get_weights()[0], raw)
    ml.set_masks(layer, {"kernel": np.zeros((4, 2), bool)})
    np.testing.assert_array_equal(numpy(layer.kernel), np.zeros((4, 2)))


def test_rescaling_is_saved(tmp_path):
    model = keras.Sequential([keras.Input((4,)), ml.MaskedDense(2)])
    half_masks(model)
    model.layers[0].kernel_mask.rescale = True
    model.save(tmp_path / "m.keras")
    loaded = keras.models.load_model(tmp_path / "m.keras")
    assert loaded.layers[0].kernel_mask.rescale
    x = np.ones((1, 4), "float32")
    np.testing.assert_array_equal(numpy(loaded(x)), numpy(model(x)))


def test_quantizing_a_masked_layer_names_strip_masks():
    layer = ml.MaskedDense(3)
    layer.build((None, 4))
    model = ml.convert_to_masked(keras.Sequential([keras.Input((4,)), layers.Dense(3)]))
    for victim in (layer, model, model.layers[0]):
        with pytest.raises(ValueError, match="strip_masks"):
            victim.quantize("int8")


def test_lora_is_added_before_the_mask_and_raw_values_are_saved(tmp_path):
    model = keras.Sequential([keras.Input((4,)), ml.MaskedDense(3, use_bias=False)])
    half_masks(model)
    layer = model.layers[0]
    raw = layer.get_weights()[0]
    layer.enable_lora(2)
    layer.lora_kernel_b.assign(np.ones((2, 3), "float32"))
    merged = raw + numpy(layer.lora_kernel_a) @ np.ones((2, 3), "float32")
    keep = ml.get_masks(model)["dense/kernel"]
    np.testing.assert_allclose(numpy(layer.kernel), np.where(keep, merged, 0), rtol=1e-5)
    model.save(tmp_path / "lora.keras")
    loaded = keras.models.load_model(tmp_path / "lora.keras")
    np.testing.assert_allclose(loaded.layers[0].get_weights()[0], merged, rtol=1e-5)


def test_a_subclass_of_a_masked_layer_works_like_any_other():
    class Scaled(ml.MaskedDense):
        def call(self, inputs):
            return 2 * super().call(inputs)

    layer = Scaled(3)
    layer.build((None, 4))
    ml.set_masks(layer, {"kernel": np.zeros((4, 3), bool)})
    np.testing.assert_array_equal(numpy(layer(np.ones((1, 4)))), np.zeros((1, 3)))


@pytest.mark.once
def test_type_checkers_know_every_class():
    stub = ast.parse(Path(classes.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    bases = {
        node.name: [ast.unparse(base) for base in node.bases]
        for node in stub.body
        if isinstance(node, ast.ClassDef)
    }
    assert len(bases) == len(MASKED_CLASSES)
    for name, (masked, plain) in bases.items():
        assert masked == "MaskedLayer"
        cls = MASKED_CLASSES[getattr(layers, plain.removeprefix("layers."))]
        assert cls is getattr(ml, name)
        assert pickle.loads(pickle.dumps(cls)) is cls
