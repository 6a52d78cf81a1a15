"""The effect of masks during training, on every path that Keras offers."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import data, half_masks, numpy

BACKEND = keras.backend.backend()
needs = {
    name: pytest.mark.skipif(name != BACKEND, reason=f"about the {name} backend")
    for name in ("tensorflow", "jax", "torch")
}


def classifier(**dense):
    return keras.Sequential(
        [
            keras.Input((6, 6, 1)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.Flatten(),
            layers.Dense(3, **dense),
        ]
    )


def largest_effective_weight_under_masks(model):
    """Returns each weight as read in the layer's own forward pass."""
    return max(
        np.abs(numpy(getattr(ref.layer, ref.name))[~numpy(ref.mask.value)]).max()
        for ref in ml.masked_refs(model)
    )


X, Y = data(64, 6, 6, 1), np.random.default_rng(1).integers(0, 3, 64)
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.01),
    ],
    ids=["AdamW", "SGD"],
)
def test_effective_weights_stay_zero_through_100_steps(make):
    model = ml.convert_to_masked(classifier(kernel_regularizer="l2"))
    half_masks(model)
    model.compile(make(), LOSS)
    before = model.get_weights()
    model.fit(np.tile(X, (25, 1, 1, 1)), np.tile(Y, 25), batch_size=16, verbose=0)
    assert int(numpy(model.optimizer.iterations)) == 100
    assert largest_effective_weight_under_masks(model) == 0.0
    assert any((a != b).any() for a, b in zip(before, model.get_weights(), strict=True))


def test_zero_after_every_batch_and_in_validation():
    model = ml.convert_to_masked(classifier())
    half_masks(model)
    model.compile("adam", LOSS)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if hasattr(self.model, "jax_state_sync"):
                self.model.jax_state_sync()
            seen.append(largest_effective_weight_under_masks(self.model))

    model.fit(X, Y, validation_data=(X, Y), epochs=2, callbacks=[Watch()], verbose=0)
    assert seen == [0.0] * 4


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_masks_of_ones_train_to_the_same_bits(jit_compile):
    if jit_compile and BACKEND == "torch":
        pytest.skip("Keras does not compile on torch without a C++ toolchain")
    plain = classifier()
    masked = ml.convert_to_masked(plain)
    histories = []
    for model in (plain, masked):
        model.compile(keras.optimizers.Adam(0.01), LOSS, jit_compile=jit_compile)
        history = model.fit(X, Y, batch_size=16, epochs=2, shuffle=False, verbose=0)
        histories.append(history.history)
    assert histories[0] == histories[1]
    for a, b in zip(plain.get_weights(), masked.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    plain = classifier()
    masked = ml.convert_to_masked(plain)
    out = numpy(ops.cast(masked(X), "float32"))
    np.testing.assert_array_equal(numpy(ops.cast(plain(X), "float32")), out)
    assert out.std() > 0
    half_masks(masked)
    masked.compile("adam", LOSS)
    masked.fit(X, Y, batch_size=16, verbose=0)
    assert largest_effective_weight_under_masks(masked) == 0.0
    stripped = ml.strip_masks(masked)
    np.testing.assert_array_equal(
        numpy(ops.cast(masked(X), "float32")), numpy(ops.cast(stripped(X), "float32"))
    )


@needs["tensorflow"]
@pytest.mark.parametrize("jit_compile", [False, True])
def test_gradients_reach_no_masked_entry_in_a_tf_function(jit_compile):
    import tensorflow as tf

    plain = classifier()
    masked = ml.convert_to_masked(plain)

    @tf.function(jit_compile=jit_compile)
    def gradients(model_is_masked):
        model = masked if model_is_masked else plain
        with tf.GradientTape() as tape:
            loss = LOSS(Y, model(X, training=False))
        return tape.gradient(loss, [v.value for v in model.trainable_variables])

    for a, b in zip(gradients(True), gradients(False), strict=True):
        np.testing.assert_array_equal(a, b)  # Masks of ones change no bit.
    traces = gradients.experimental_get_tracing_count()
    half_masks(masked)
    ours = dict(zip((id(v) for v in masked.trainable_variables), gradients(True), strict=True))
    for ref in ml.masked_refs(masked):
        gradient = np.array(ours[id(ref.variable)])
        keep = numpy(ref.mask.value)
        assert not gradient[~keep].any()
        assert gradient[keep].any()
    assert gradients.experimental_get_tracing_count() == traces


@needs["jax"]
@pytest.mark.usefixtures("optimized")
def test_gradients_reach_no_masked_entry_in_stateless_call():
    import jax

    plain = classifier()
    masked = ml.convert_to_masked(plain)

    def gradients(model):
        def loss(trainable, non_trainable):
            out, _ = model.stateless_call(trainable, non_trainable, X)
            return LOSS(Y, out)

        state = (
            [v.value for v in model.trainable_variables],
            [v.value for v in model.non_trainable_variables],
        )
        return jax.jit(jax.grad(loss))(*state)

    for a, b in zip(gradients(masked), gradients(plain), strict=True):
        np.testing.assert_array_equal(a, b)
    half_masks(masked)
    ours = dict(zip((id(v) for v in masked.trainable_variables), gradients(masked), strict=True))
    for ref in ml.masked_refs(masked):
        gradient, keep = np.array(ours[id(ref.variable)]), numpy(ref.mask.value)
        assert not gradient[~keep].any()
        assert gradient[keep].any()


@needs["torch"]
def test_gradients_reach_no_masked_entry_in_torch_autograd():
    plain = classifier()
    masked = ml.convert_to_masked(plain)

    def gradients(model):
        model.zero_grad()
        LOSS(Y, model(X)).backward()
        return {id(v): numpy(v.value.grad) for v in model.trainable_variables}

    for a, b in zip(gradients(masked).values(), gradients(plain).values(), strict=True):
        np.testing.assert_array_equal(a, b)
    half_masks(masked)
    ours = gradients(masked)
    for ref in ml.masked_refs(masked):
        gradient, keep = ours[id(ref.variable)], numpy(ref.mask.value)
        assert not gradient[~keep].any()
        assert gradient[keep].any()


@needs["torch"]
def test_torch_sees_the_masks_as_state():
    masked = ml.convert_to_masked(classifier())
    assert sum("kernel_mask" in name for name in masked.state_dict()) == 2
    assert not any(p.requires_grad for n, p in masked.named_parameters() if "kernel_mask" in n)


def test_a_mask_changed_inside_fit_takes_effect_at_the_next_batch():
    model = ml.convert_to_masked(classifier())
    model.compile(keras.optimizers.SGD(0.1), LOSS)

    class Prune(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                masks = ml.get_masks(self.model)
                self.kernels = self.model.layers[0].get_weights()[0]
                ml.set_masks(self.model, {p: np.zeros_like(m) for p, m in masks.items()})

    prune = Prune()
    model.fit(X, Y, batch_size=8, callbacks=[prune], verbose=0)
    assert not any(mask.any() for mask in ml.get_masks(model).values())
    # Nothing under the masks moved in the batches that followed.
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], prune.kernels)
    # With every kernel at zero the logits are the biases: the same for each sample.
    assert np.ptp(numpy(model(X)), axis=0).max() == 0


def test_penalty_of_masked_weights_moves_nothing_under_the_mask():
    model = ml.convert_to_masked(
        keras.Sequential(
            [keras.Input((4,)), layers.Dense(3, use_bias=False, kernel_regularizer="l2")]
        )
    )
    half_masks(model)
    raw = model.get_weights()[0]
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(data(16, 4), data(16, 3, seed=1), epochs=3, verbose=0)
    keep = ml.get_masks(model)["dense/kernel"]
    np.testing.assert_array_equal(model.get_weights()[0][~keep], raw[~keep])
    assert (model.get_weights()[0][keep] != raw[keep]).all()


@pytest.mark.parametrize("run_eagerly", [False, True])
def test_constraints_act_on_the_effective_weight_in_fit(run_eagerly):
    model = ml.convert_to_masked(
        keras.Sequential(
            [
                keras.Input((4,)),
                layers.Dense(3, use_bias=False, kernel_constraint="unit_norm"),
            ]
        )
    )
    model.set_weights([np.full((4, 3), 3.0)])
    keep = np.ones((4, 3), bool)
    keep[2:] = False
    ml.set_masks(model, {"dense/kernel": keep})
    model.compile(keras.optimizers.SGD(0.01), "mse", run_eagerly=run_eagerly)
    for _ in range(2):  # The masks may change between two calls that share a compiled function.
        model.fit(data(16, 4), data(16, 3, seed=1), epochs=2, batch_size=4, verbose=0)
        raw = model.get_weights()[0]
        np.testing.assert_allclose(np.linalg.norm(np.where(keep, raw, 0), axis=0), 1, rtol=1e-5)
        np.testing.assert_array_equal(raw[~keep], 3.0)
        keep[1] = False
        raw[1] = 3.0
        model.set_weights([np.where(keep, 3.0, raw)])
        ml.set_masks(model, {"dense/kernel": keep})


@needs["tensorflow"]
def test_exported_saved_model_is_masked(tmp_path):
    import tensorflow as tf

    model = ml.convert_to_masked(classifier())
    half_masks(model)
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    np.testing.assert_allclose(served.serve(X), numpy(model(X)), rtol=1e-5, atol=1e-6)
