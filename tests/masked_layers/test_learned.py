"""Learned masks: gradients by hand, training on every path, hardening, files."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from common import numpy
from masked_layers import learned

BACKEND = keras.backend.backend()


def gradient(function, variable):
    """Returns d function() / d variable, computed by the backend."""
    if BACKEND == "tensorflow":
        import tensorflow as tf

        with tf.GradientTape() as tape:
            value = function()
        return numpy(tape.gradient(value, variable.value))
    if BACKEND == "jax":
        import jax

        def stateless(value):
            with keras.StatelessScope([(variable, value)]):
                return function()

        return numpy(jax.grad(stateless)(variable.value))
    variable.value.grad = None
    function().backward()
    return numpy(variable.value.grad)


SCORES = np.array([[0.4, -1.0, 2.0], [-0.3, 0.1, -3.0]], "float32")
WEIGHT = np.array([[1.0, -2.0, 0.5], [3.0, -0.25, 4.0]], "float32")
UPSTREAM = np.array([[0.3, 0.7, -1.0], [2.0, 5.0, -0.5]], "float32")


def built(mask):
    mask.build((2, 3))
    mask.scores.assign(SCORES)
    return mask


def oracle(keep, derivative, rescale):
    """Returns dL/ds for L = sum(upstream w m r), r = 6 / sum(m), through m to the surrogate."""
    r = 6 / keep.sum() if rescale else 1.0
    by_mask = UPSTREAM * WEIGHT * r
    if rescale:
        by_mask = by_mask - 6 / keep.sum() ** 2 * (UPSTREAM * WEIGHT * keep).sum()
    return by_mask * derivative, WEIGHT * keep * r


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kind", ["bernoulli", "bernoulli sampled", "edge_popup"])
def test_the_gradient_goes_straight_through_to_the_surrogate(kind, rescale):
    if kind == "edge_popup":
        mask = built(ml.EdgePopupMask(sparsity=0.5, rescale=rescale))
        keep, derivative = np.array([[0, 1, 1], [0, 0, 1]]), np.sign(SCORES)
    else:
        evaluation = "sampled" if "sampled" in kind else "deterministic"
        mask = built(ml.BernoulliMask(rescale=rescale, evaluation=evaluation, seed=3))
        p = 1 / (1 + np.exp(-SCORES))
        keep, derivative = SCORES >= 0, p * (1 - p)

    def loss():
        return ops.sum(ops.multiply(mask.apply(WEIGHT), UPSTREAM))

    state = numpy(mask.seed_generator.state)
    if "sampled" in kind:
        keep = numpy(mask.apply(WEIGHT)) != 0
        assert 0 < keep.sum() < 6
    mask.seed_generator.state.assign(state)
    by_hand, effective = oracle(np.asarray(keep), derivative, rescale)
    np.testing.assert_allclose(gradient(loss, mask.scores), by_hand, rtol=2e-5)
    mask.seed_generator.state.assign(state)
    np.testing.assert_allclose(numpy(mask.apply(WEIGHT)), effective, rtol=1e-6)


def test_samples_have_the_probabilities_of_the_scores():
    mask = ml.BernoulliMask(evaluation="sampled", seed=1)
    mask.build((4, 5000))
    mask.scores.assign(np.repeat([[-2.0], [0.0], [1.0], [30.0]], 5000, axis=1))
    p = 1 / (1 + np.exp([2.0, 0.0, -1.0, -30.0]))
    ones = np.ones((4, 5000), "float32")
    first, second = numpy(mask.apply(ones)), numpy(mask.apply(ones))
    rng = mask.sample(np.random.default_rng(0))
    for drawn in (first, second, rng):
        np.testing.assert_allclose(drawn.mean(1), p, atol=4 * 0.5 / np.sqrt(5000))
        assert set(np.unique(drawn)) <= {0, 1}
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(mask.to_numpy()[:, 0], [False, True, True, True])


def test_edge_popup_keeps_the_exact_count_also_of_equal_scores():
    for sparsity, kept in ((0.29, 71), (0.5, 50), (0.0, 100), (0.99, 1)):
        mask = ml.EdgePopupMask(sparsity=sparsity, seed=0)
        mask.build((10, 10))
        scores = numpy(mask.scores)
        keep = mask.to_numpy()
        assert keep.sum() == kept
        assert sorted(abs(scores[keep])) == sorted(abs(scores).ravel())[100 - kept :]
        assert abs(scores).max() <= np.sqrt(6 / 10)
        mask.scores.assign(np.repeat([[1.0], [-1.0]], 5, axis=0) * np.ones((10, 10)))
        assert mask.to_numpy().ravel()[:kept].all()
        assert mask.to_numpy().sum() == kept


def test_identifiers_of_masks():
    assert isinstance(learned.get("bernoulli"), ml.BernoulliMask)
    prototype = ml.EdgePopupMask(sparsity=0.7, seed=5, rescale=True, initializer="glorot_normal")
    config = keras.saving.serialize_keras_object(prototype)
    again = learned.get(config)
    assert again.get_config() == prototype.get_config()
    assert learned.get(prototype) is prototype
    assert learned.get(ml.EdgePopupMask).sparsity == 0.5
    assert learned.get(lambda: prototype) is prototype
    for wrong in ("bernouli", 3, built(ml.BernoulliMask()), lambda: None):
        with pytest.raises(ValueError, match="`mask` must be one of"):
            learned.get(wrong)
    with pytest.raises(ValueError, match="sparsity=1"):
        ml.EdgePopupMask(sparsity=1)
    with pytest.raises(ValueError, match="evaluation='sample'"):
        ml.BernoulliMask(evaluation="sample")


X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int32")


def plain(**compile_arguments):
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(16, "relu", name="hidden", kernel_regularizer="l2"),
            layers.BatchNormalization(center=False, scale=False),
            layers.Dense(2, name="out"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(2.0, momentum=0.9), loss, **compile_arguments)
    return model


def fit(model, **kwargs):
    model.fit(X, Y, batch_size=16, shuffle=False, verbose=0, **kwargs)


@pytest.mark.parametrize(
    "kind", ["bernoulli", pytest.param("edge_popup", marks=pytest.mark.slow("jax"))]
)
def test_training_changes_scores_alone_and_hardening_keeps_outputs(kind, tmp_path):
    source = plain()
    fit(source)  # The optimizer has slots for kernels.
    kinds = {"bernoulli": ml.BernoulliMask, "edge_popup": ml.EdgePopupMask}
    model = ml.convert_to_masked(source, mask=kinds[kind](seed=4, rescale=True))
    hidden = model.get_layer("hidden")
    assert [v.name for v in model.trainable_variables] == ["scores", "scores"]
    assert model.trainable_weights == model.trainable_variables
    frozen = [numpy(v) for layer in source.layers[::2] for v in layer.weights]
    scores = numpy(hidden.kernel_mask.scores)
    if kind == "edge_popup":
        assert not np.array_equal(
            scores[:2, :2], numpy(model.get_layer("out").kernel_mask.scores)[:2]
        )
    fit(model, epochs=2)
    after = [
        numpy(v)
        for n in ("hidden", "out")
        for v in model.get_layer(n).weights
        if v.name != "scores"
    ]
    for was, now in zip(frozen, after, strict=True):
        np.testing.assert_array_equal(was, now)
    assert not np.array_equal(numpy(hidden.kernel_mask.scores), scores)

    # The same seeds give the same scores, bit for bit.
    again = ml.convert_to_masked(source, mask=kinds[kind](seed=4, rescale=True))
    fit(again, epochs=2)
    np.testing.assert_array_equal(
        numpy(again.get_layer("hidden").kernel_mask.scores), numpy(hidden.kernel_mask.scores)
    )

    outputs = model.predict_on_batch(X)
    np.testing.assert_array_equal(model.predict_on_batch(X), outputs)  # Deterministic.
    model.save(tmp_path / "learned.keras")
    loaded = keras.models.load_model(tmp_path / "learned.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(X), outputs)
    assert [v.name for v in loaded.trainable_variables] == ["scores", "scores"]

    hard = ml.harden(loaded)
    np.testing.assert_allclose(hard.predict_on_batch(X), outputs, rtol=1e-6)
    masks = ml.get_masks(hard)
    for path, mask in ml.get_masks(model).items():
        np.testing.assert_array_equal(mask, masks[path])
    assert [v.name for v in hard.trainable_variables] == ["kernel", "bias"] * 2
    assert len(hard.get_weights()) == len(source.get_weights())
    assert ml.sparsity_report(hard).alive == sum(mask.sum() for mask in masks.values())
    stripped = ml.strip_masks(hard)
    np.testing.assert_array_equal(stripped.predict_on_batch(X), hard.predict_on_batch(X))
    fit(hard)  # Kernels train again, under the masks.
    hard.save(tmp_path / "hard.keras")
    loaded = keras.models.load_model(tmp_path / "hard.keras")
    np.testing.assert_array_equal(loaded.predict_on_batch(X), hard.predict_on_batch(X))
    for file, into, message in (
        ("hard", model, "binary mask for"), ("learned", hard, "learned mask for")
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            into.load_weights(tmp_path / f"{file}.keras")


def test_bernoulli_draws_in_training_and_where_evaluation_samples():
    model = ml.convert_to_masked(plain(), mask=ml.BernoulliMask(seed=1))
    a, b = (numpy(model(X, training=True)) for _ in range(2))
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(numpy(model(X)), numpy(model(X)))
    sampled = ml.convert_to_masked(plain(), mask=ml.BernoulliMask(evaluation="sampled", seed=1))
    a, b = (sampled.predict_on_batch(X) for _ in range(2))
    assert not np.array_equal(a, b)
    one, same, other = (ml.sample_masks(model, seed) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one["hidden/kernel"], same["hidden/kernel"])
    assert not np.array_equal(one["hidden/kernel"], other["hidden/kernel"])
    hard = ml.harden(model, seed=1)
    np.testing.assert_array_equal(ml.get_masks(hard)["out/kernel"], one["out/kernel"])


def test_layers_of_layers_and_written_by_hand():
    inputs = keras.Input((5, 4))
    x = layers.MultiHeadAttention(2, 3)(inputs, inputs)
    x = layers.SimpleRNN(3)(x)
    model = ml.convert_to_masked(keras.Model(inputs, layers.Dense(2)(x)), mask="edge_popup")
    assert len(model.trainable_variables) == len(ml.get_masks(model)) == 7
    copy = keras.Model.from_config(model.get_config())
    assert [v.name for v in copy.trainable_variables] == ["scores"] * 7
    hard = ml.harden(model, inplace=True)
    assert hard is model
    assert "scores" not in {v.name for v in model.variables}
    assert "mask" not in model.layers[-1].get_config()

    by_hand = keras.Sequential(
        [keras.Input((6,)), ml.MaskedDense(4, mask=ml.BernoulliMask(seed=2)), ml.MaskedDense(2)]
    )
    assert [v.name for v in by_hand.trainable_variables] == ["scores", "kernel", "bias"]
    with pytest.raises(ValueError, match="is a recurrent cell"):
        ml.convert_to_masked(keras.Model(inputs, layers.SimpleRNN(3)(inputs)), mask="bernoulli")
    with pytest.raises(ValueError, match="is a recurrent cell"):
        ml.MaskedSimpleRNN(3, mask="bernoulli").build((None, 5, 4))


def test_operations_that_learned_masks_refuse():
    from lottery_ticket_pruner import LotteryTicketPruner

    model = ml.convert_to_masked(plain(), mask="bernoulli")
    masks = ml.get_masks(model)
    for refused in (
        lambda: ml.set_masks(model, masks),
        lambda: ml.strip_masks(model),
        lambda: ml.shrink(model),
        lambda: ml.masked_refs(model)[0].mask.freeze(np.zeros((6, 16))),
        lambda: LotteryTicketPruner(model).update_masks("large_init", rate=0.5),
    ):
        with pytest.raises(ValueError, match=r"masked_layers\.harden"):
            refused()
    with pytest.raises(ValueError, match="has no learned mask"):
        ml.harden(ml.convert_to_masked(plain()))
    with pytest.raises(ValueError, match="already has masks"):
        ml.convert_to_masked(ml.convert_to_masked(plain()), mask="bernoulli")


@pytest.mark.skipif(BACKEND == "torch", reason="exporting needs TensorFlow or JAX")
def test_a_hardened_mask_exports_and_a_learned_one_is_refused(tmp_path):
    pytest.importorskip("tensorflow")
    model = ml.convert_to_masked(plain(), mask=ml.EdgePopupMask(sparsity=0.8))
    with pytest.raises(ValueError, match=r"masked_layers\.harden"):
        ml.export_sparse_saved_model(model, tmp_path / "learned")
    report = ml.export_sparse_saved_model(ml.harden(model), tmp_path / "hard")
    assert {row.path: row.alive for row in report}["hidden/kernel"] == 20
