"""Quantization-aware training under masks: codes, gradients, files, exports."""

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import GradualPruning, LotteryTicketPruner, schedules, training
from masked_layers import _keras, conversion
from masked_layers.quantization import fake_quantized
from masked_layers.serving.codes import scaled

LEVELS = {"int8": 127, "int4": 7}
X = np.random.default_rng(1).standard_normal((16, 5, 5, 1)).astype("float32")
Y = np.random.default_rng(2).standard_normal((16, 3)).astype("float32")


def plain_model():
    model = keras.Sequential(
        [keras.Input((5, 5, 1)), layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(3)]
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model


def quantized(kind="int8", share=0.4, model=None):
    model = ml.convert_to_masked(model or plain_model(), quantize=kind)
    rng = np.random.default_rng(0)
    masks = {path: rng.random(mask.shape) < share for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def effective(ref):
    return keras.ops.convert_to_numpy(ref.mask.apply(ref.variable))


def codes_by_hand(raw, mask, levels):
    """Returns codes and scales, computed channel by channel."""
    codes, scales = np.zeros(raw.shape, "float32"), np.zeros(raw.shape[-1], "float32")
    for channel in range(raw.shape[-1]):
        kept = np.where(mask[..., channel], raw[..., channel], np.float32(0))
        scales[channel] = np.float32(abs(kept).max() * np.float32(1 / levels))
        if scales[channel] > 0:
            codes[..., channel] = np.round(kept / scales[channel])
    return codes, scales


@pytest.mark.parametrize("kind", LEVELS)
def test_kept_weights_are_codes_times_the_scale_of_their_channel(kind):
    model = quantized(kind)
    masks = ml.get_masks(model)
    masks["dense/kernel"][:, 1] = False  # A channel without kept weights.
    ml.set_masks(model, masks)
    for ref in ml.masked_refs(model):
        raw, found = keras.ops.convert_to_numpy(ref.variable), effective(ref)
        codes, scales = codes_by_hand(raw, masks[ref.path], LEVELS[kind])
        np.testing.assert_array_equal(found, codes * scales)
        assert np.abs(codes).max() == LEVELS[kind]
        assert not np.signbit(found[found == 0]).any()
        assert (found[~masks[ref.path]] == 0).all()
        # `Model.quantize` rounds to the same codes.
        area = (-8, 7) if kind == "int4" else (-127, 127)
        axes = tuple(range(raw.ndim - 1))
        of_keras, _ = keras.quantizers.abs_max_quantize(found, axes, value_range=area)
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(of_keras), codes)


@pytest.mark.parametrize("train", ["fit", "engine"])
def test_a_step_of_training_passes_the_gradient_of_the_rounded_weights_to_the_raw_ones(train):
    x, y = X[:, :, 0, 0], Y
    model = keras.Sequential([keras.Input((5,)), layers.Dense(3, use_bias=False)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model = quantized("int4", 0.6, model)
    (ref,) = ml.masked_refs(model)
    raw, mask = np.array(keras.ops.convert_to_numpy(ref.variable)), ref.mask.to_numpy()
    for _ in range(2):
        codes, scales = codes_by_hand(raw, mask, 7)
        gradient = x.T @ (x @ (codes * scales) - y) * 2 / y.size
        raw = (raw - 0.1 * np.where(mask, gradient, 0)).astype("float32")
    if train == "fit":
        model.fit(x, y, batch_size=16, epochs=2, verbose=0)
    else:
        training.train(model, x, y, steps=2, batch_size=16)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(ref.variable), raw, rtol=1e-5, atol=1e-6)


@pytest.mark.once("torch")
@pytest.mark.parametrize("kind", LEVELS)
def test_values_and_gradients_are_those_of_torch(kind):
    import torch

    raw = np.random.default_rng(3).standard_normal((20, 6)).astype("float32")
    ours, theirs = (torch.tensor(raw, requires_grad=True) for _ in range(2))
    levels = LEVELS[kind]
    scales = torch.tensor(np.abs(raw).max(axis=0) * np.float32(1 / levels))
    zero = torch.zeros(6, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(theirs, scales, zero, 1, -levels, levels)
    found = fake_quantized(ours, kind)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    slope = torch.tensor(np.random.default_rng(4).standard_normal(raw.shape), dtype=torch.float32)
    for value in (found, expected):
        (value * slope).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)


def test_models_with_masks_are_quantized_and_keep_masks_weights_and_optimizer():
    plain = ml.convert_to_masked(plain_model(), include="dense")
    rng = np.random.default_rng(0)
    masks = {"dense/kernel": rng.random((36, 3)) < 0.3}
    ml.set_masks(plain, masks)
    plain.fit(X, Y, batch_size=16, verbose=0)
    model = ml.convert_to_masked(plain, include="dense", quantize="int8")
    assert ml.masked_refs(plain)[0].mask.quantization is None
    (ref,) = ml.masked_refs(model)
    assert ref.mask.quantization == "int8"
    np.testing.assert_array_equal(ref.mask.to_numpy(), masks["dense/kernel"])
    for old, new in zip(plain.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(model.optimizer.iterations) == 1
    assert len(np.unique(effective(ref)[:, 0])) < 36 * 0.6


def test_copies_and_files_keep_it(tmp_path):
    model = quantized("int4", model=plain_model())
    wanted = model.predict_on_batch(X)
    model.save(tmp_path / "model.keras")
    ml.save_ticket(model, tmp_path / "ticket.safetensors")
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = ml.convert_to_masked(plain_model())
    fresh.predict_on_batch(X)  # Compiled without quantization.
    fresh.load_weights(tmp_path / "model.weights.h5")
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    for other in (
        keras.models.load_model(tmp_path / "model.keras"),
        ml.load_ticket(tmp_path / "ticket.safetensors"),
        fresh,
        clone,
    ):
        assert {ref.mask.quantization for ref in ml.masked_refs(other)} == {"int4"}
        np.testing.assert_allclose(other.predict_on_batch(X), wanted, rtol=1e-5, atol=1e-6)


def test_weights_of_a_model_without_it_do_not_turn_it_off(tmp_path):
    ml.convert_to_masked(plain_model()).save_weights(tmp_path / "model.weights.h5")
    model = quantized()
    model.load_weights(tmp_path / "model.weights.h5")
    assert {ref.mask.quantization for ref in ml.masked_refs(model)} == {"int8"}


@pytest.mark.parametrize("kind", LEVELS)
def test_stripped_models_and_codes_of_the_export_have_the_rounded_values(kind):
    model = quantized(kind)
    plain = ml.strip_masks(model)
    np.testing.assert_array_equal(plain.predict_on_batch(X), model.predict_on_batch(X))
    for ref, stripped in zip(ml.masked_refs(model), plain.get_weights()[::2], strict=True):
        raw = keras.ops.convert_to_numpy(ref.variable)
        codes, scales = codes_by_hand(raw, ref.mask.to_numpy(), LEVELS[kind])
        np.testing.assert_array_equal(stripped, codes * scales)
        coded = scaled(stripped)
        np.testing.assert_array_equal(coded.values(), stripped)
        if kind == "int8":
            np.testing.assert_array_equal(coded.codes, codes)


@pytest.mark.once
@pytest.mark.filterwarnings("ignore:Layer InputLayer does not have a `quantize`")
@pytest.mark.parametrize("kind", LEVELS)
def test_keras_quantizes_a_stripped_dense_layer_to_the_same_codes(kind):
    model = keras.Sequential([keras.Input((300,)), layers.Dense(8)])  # More than a block of int4.
    model = quantized(kind, 0.2, model)
    (ref,) = ml.masked_refs(model)
    raw = keras.ops.convert_to_numpy(ref.variable)
    codes, _ = codes_by_hand(raw, ref.mask.to_numpy(), LEVELS[kind])
    plain = ml.strip_masks(model)
    of_keras = keras.quantizers
    configs = {"int8": "Int8QuantizationConfig", "int4": "Int4QuantizationConfig"}
    options = {"block_size": None} if kind == "int4" else {}
    plain.quantize(config=getattr(of_keras, configs[kind])(**options))
    found = plain.layers[-1]._kernel
    found = of_keras.unpack_int4(found, 8, axis=-1) if kind == "int4" else found
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(found), codes)


@pytest.mark.once
@pytest.mark.parametrize("kind", LEVELS)
def test_scales_of_codes_are_found_again_for_weights_of_any_size(kind):
    """A product with 127 is rounded, so the quotient is not always the scale."""
    rng = np.random.default_rng(5)
    largest = np.exp(rng.uniform(-30, 30, 4000)).astype("float32")
    scales = largest * np.float32(1 / LEVELS[kind])
    codes = rng.integers(-LEVELS[kind], LEVELS[kind] + 1, (300, 4000)).astype("float32")
    codes[0] = LEVELS[kind]
    coded = scaled(codes * scales)
    np.testing.assert_array_equal(coded.values(), codes * scales)
    if kind == "int8":
        np.testing.assert_array_equal(coded.codes, codes)


def test_gradual_pruning_prunes_while_weights_are_rounded():
    model = ml.convert_to_masked(plain_model(), quantize="int8")
    schedule = schedules.Polynomial(0.25, 0.75, 0, 4, frequency=2)
    pruning = GradualPruning(LotteryTicketPruner(model), schedule)
    model.fit(X, Y, batch_size=4, epochs=2, verbose=0, callbacks=[pruning])
    for ref in ml.masked_refs(model):
        mask, found = ref.mask.to_numpy(), effective(ref)
        assert np.count_nonzero(mask) == round(mask.size * 0.25)
        assert (found[~mask] == 0).all()
        codes, scales = codes_by_hand(keras.ops.convert_to_numpy(ref.variable), mask, 127)
        np.testing.assert_array_equal(found, codes * scales)


def test_codes_in_mixed_precision_are_those_of_the_float32_weights():
    inputs = keras.Input((6,))
    outputs = layers.Dense(4, use_bias=False, dtype="mixed_float16")(inputs)
    model = quantized(model=keras.Model(inputs, outputs), share=0.7)
    (ref,) = ml.masked_refs(model)
    raw = keras.ops.convert_to_numpy(ref.variable)
    codes, scales = codes_by_hand(raw, ref.mask.to_numpy(), 127)
    found = keras.ops.convert_to_numpy(model(np.eye(6, dtype="float32")))
    np.testing.assert_array_equal(found, (codes * scales).astype("float16"))


def test_variables_are_read_in_their_own_dtype_in_the_scope():
    class Reading(layers.Layer):
        def build(self, shape):
            self.w = self.add_weight(shape=shape[1:])

        def call(self, x):
            before = keras.ops.convert_to_tensor(self.w).dtype
            with _keras.no_autocast():
                seen.append(keras.ops.convert_to_tensor(self.w).dtype)
            seen.extend([before, keras.ops.convert_to_tensor(self.w).dtype])
            return x

    seen = []
    Reading(dtype="mixed_float16")(np.ones((1, 2), "float32"))
    found = [keras.backend.standardize_dtype(dtype) for dtype in seen[-3:]]
    assert found == ["float32", "float16", "float16"]


def test_rescaled_weights_are_rounded_and_frozen_ones_are_not():
    model = quantized(share=0.5)
    ref = ml.masked_refs(model)[-1]
    frozen = np.full(ref.variable.shape, 0.123, "float32")
    mask, raw = ref.mask.to_numpy(), keras.ops.convert_to_numpy(ref.variable)
    ml.set_rescale(model, True)
    ref.mask.freeze(frozen)
    codes, scales = codes_by_hand(raw * np.float32(mask.size / mask.sum()), mask, 127)
    np.testing.assert_allclose(effective(ref), np.where(mask, codes * scales, frozen), rtol=1e-6)


def test_penalties_are_those_of_the_weights_before_rounding():
    dense = layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.5))
    model = quantized("int4", model=keras.Sequential([keras.Input((6,)), dense]))
    (ref,) = ml.masked_refs(model)
    kept = keras.ops.convert_to_numpy(ref.variable)[ref.mask.to_numpy()]
    model(np.zeros((1, 6), "float32"))
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(sum(model.losses)), 0.5 * np.sum(kept**2), rtol=1e-5
    )


def test_biases_and_normalization_are_not_rounded_and_layers_built_later_are():
    model = keras.Sequential([layers.Dense(6), layers.LayerNormalization()])
    model.build((None, 4))
    model = ml.convert_to_masked(model, mask_bias=True, mask_normalization=True, quantize="int8")
    _, bias = ml.masked_refs(model)
    np.testing.assert_array_equal(effective(bias), keras.ops.convert_to_numpy(bias.variable))
    assert ml.channel_refs(model)[0].mask.quantization is None
    later = keras.Sequential([layers.Dense(3)])
    later = ml.convert_to_masked(later, quantize="int4")
    later.build((None, 8))
    assert [ref.mask.quantization for ref in ml.masked_refs(later)] == ["int4"]


@pytest.mark.once
def test_biases_with_two_axes_are_not_rounded_either():
    built = keras.Sequential([keras.Input((4, 3)), layers.GRU(2)])
    built = ml.convert_to_masked(built, mask_bias=True, quantize="int8")
    later = keras.Sequential([layers.GRU(2)])
    later = ml.convert_to_masked(later, mask_bias=True, quantize="int8")
    later.build((None, 4, 3))
    for model in (built, later):
        *kernels, bias = ml.masked_refs(model)
        assert [ref.mask.quantization for ref in kernels] == ["int8", "int8"]
        assert len(bias.variable.shape) == 2
        assert bias.mask.quantization is None


@pytest.mark.once
def test_another_kind_replaces_the_first_and_an_error_does_not(monkeypatch):
    def fail(*args):
        raise ValueError("read without its mask")

    def kinds(model):
        return [ref.mask.quantization for ref in ml.masked_refs(model)]

    first = ml.convert_to_masked(plain_model(), quantize="int8")
    second = ml.convert_to_masked(first, include="dense", quantize="int4")
    assert kinds(first) == ["int8", "int8"]
    assert kinds(second) == kinds(ml.convert_to_masked(second)) == ["int8", "int4"]
    monkeypatch.setattr(conversion, "check_masks", fail)
    with pytest.raises(ValueError, match="read without"):
        ml.convert_to_masked(second, quantize="int8", inplace=True)
    assert kinds(second) == ["int8", "int4"]


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_weights_of_other_dtypes_have_the_codes_of_float32(dtype):
    inputs = keras.Input((6,), dtype=dtype)
    model = keras.Model(inputs, layers.Dense(4, use_bias=False, dtype=dtype)(inputs))
    model = quantized(model=model, share=0.7)
    (ref,) = ml.masked_refs(model)
    raw = keras.ops.convert_to_numpy(keras.ops.cast(ref.variable.value, "float32"))
    codes, scales = codes_by_hand(raw, ref.mask.to_numpy(), 127)
    wanted = keras.ops.cast(codes * scales, dtype)
    found = model(keras.ops.eye(6, dtype=dtype))
    np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(x) for x in (found, wanted)))


def test_pruned_weights_that_are_not_finite_reach_neither_scales_nor_gradients():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2, use_bias=False)])
    model.compile(keras.optimizers.SGD(1.0), "mse")
    raw = np.array([[1, np.nan], [-np.inf, -2], [np.nan, 0.3]], "float32")
    model.set_weights([raw])
    model = ml.convert_to_masked(model, quantize="int8")
    ml.set_masks(model, {ref.path: np.isfinite(raw) for ref in ml.masked_refs(model)})
    codes, scales = codes_by_hand(raw, np.isfinite(raw), 127)
    np.testing.assert_array_equal(effective(ml.masked_refs(model)[0]), codes * scales)
    model.train_on_batch(np.ones((1, 3), "float32"), np.zeros((1, 2), "float32"))
    (after,) = model.get_weights()
    np.testing.assert_array_equal(np.isfinite(after), np.isfinite(raw))
    assert (after != raw)[np.isfinite(raw)].all()


def test_a_smaller_model_has_the_rounded_weights_and_no_masks_that_would_round_them_again():
    model = quantized(share=0.9)
    masks = ml.get_masks(model)
    masks["conv2d/kernel"][..., 1] = False
    ml.set_masks(model, masks)
    with pytest.raises(ValueError, match="Received a model with quantized weights: 'conv2d/kern"):
        ml.shrink(model, keep_masks=True)
    smaller = ml.shrink(model)
    smaller = smaller[0] if isinstance(smaller, tuple) else smaller
    found = smaller.predict_on_batch(X)
    np.testing.assert_allclose(found, model.predict_on_batch(X), rtol=1e-4, atol=1e-5)


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match=r"one of \['int8', 'int4'\].*Received: 'int2'"):
        ml.convert_to_masked(plain_model(), quantize="int2")
    with pytest.raises(ValueError, match=r"`quantize` needs binary masks.*harden"):
        ml.convert_to_masked(plain_model(), mask="edge_popup", quantize="int8")
    learned = ml.convert_to_masked(plain_model(), mask="edge_popup")
    with pytest.raises(ValueError, match=r"`quantize` needs binary masks.*harden"):
        ml.convert_to_masked(learned, quantize="int8")
    with pytest.raises(ValueError, match=r"Only binary masks quantize.*Received: .*'int8'"):
        ml.EdgePopupMask(quantization="int8")
    assert ml.convert_to_masked(ml.harden(learned), quantize="int8")
