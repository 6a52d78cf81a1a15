"""Learned supermasks on real digits, compared with the best untrained masks."""

import warnings

import keras
import numpy as np
import pytest
from keras import layers
from sklearn import datasets

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, learned, training
from masked_layers import randomness


@pytest.fixture(scope="module")
def digits():
    x, y = datasets.load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    x, y = (x[order] / 16).astype("float32"), y[order].astype("int32")
    return (x[:1400], y[:1400]), (x[1400:], y[1400:])


def network():
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(64, "relu", kernel_initializer="glorot_normal", name="hidden"),
            layers.Dense(10, kernel_initializer="glorot_normal", name="out"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    return model


@pytest.fixture(scope="module")
def untrained(digits):
    """Returns the best accuracy of masks of trained weights over untrained ones, with DWR."""
    model = ml.convert_to_masked(network())
    for ref in ml.masked_refs(model):
        ref.mask.rescale = True
    pruner = LotteryTicketPruner(model)
    training.train(model, *digits[0], steps=290, batch_size=50)
    pruner.set_pretrained_weights()
    accuracies = []
    for sparsity in (0.3, 0.5, 0.8):
        pruner.reset_masks()
        with warnings.catch_warnings(action="ignore"):  # Intentionally the same final weights.
            pruner.update_masks("large_final_same_sign", sparsity=sparsity)
        for kept in ("rewind", "constant_same_sign"):
            pruner.treat(kept)
            accuracies.append(training.evaluate(model, *digits[1])["accuracy"])
    return max(accuracies)


@pytest.mark.once
@pytest.mark.parametrize(
    ("mask", "weights", "steps"),
    [
        (ml.BernoulliMask(seed=0, rescale=True), "signed_constant", 290),
        pytest.param(
            *(ml.EdgePopupMask(seed=0, sparsity=0.65), "initial", 900), marks=pytest.mark.slow
        ),
    ],
)
def test_a_learned_mask_beats_untrained_ones(digits, untrained, mask, weights, steps):
    model = network()
    before = model.get_weights()
    result = learned.learn_supermask(
        model,
        *digits[0],
        steps=steps,
        batch_size=50,
        mask=mask,
        weights=weights,
        test_data=digits[1],
    )
    accuracy = result.samples["accuracy"].mean()
    assert 0.4 < untrained < 0.85
    assert accuracy > untrained + 0.05
    assert accuracy > 0.85
    for was, now in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(was, now)
    kernel = result.supermask.get_layer("hidden").get_weights()[0]
    if weights == "signed_constant":
        np.testing.assert_allclose(kernel, np.sign(before[0]) * before[0].std(), rtol=1e-4)
        assert len(result.samples["accuracy"]) == 10
        assert result.samples["accuracy"].std() > 0
    else:
        np.testing.assert_allclose(kernel, before[0] / np.sqrt(0.35), rtol=1e-5)
        assert result.samples["accuracy"].tolist() == [result.deterministic["accuracy"]]
    report = ml.sparsity_report(result.supermask)
    assert report.alive == sum(mask.sum() for mask in ml.get_masks(result.model).values())
    assert 0.3 < report.sparsity < 0.9
    assert training.evaluate(result.supermask, *digits[1]) == pytest.approx(result.deterministic)
    assert training.evaluate(result.model, *digits[1])["accuracy"] == pytest.approx(
        result.deterministic["accuracy"], abs=0.01
    )


def test_weights_of_layers_without_masks_stay_too(digits):
    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(8, name="hidden"),
            layers.BatchNormalization(),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    before = model.get_weights()
    found = learned.learn_supermask(model, *digits[0], steps=5, test_data=digits[1], samples=2)
    moved = [
        variable.name
        for variable, was in zip(found.supermask.weights, before, strict=True)
        if (keras.ops.convert_to_numpy(variable) != was).any()
    ]
    assert moved == ["moving_mean", "moving_variance"]
    assert len(found.supermask.trainable_variables) == len(model.trainable_variables)
    assert not ml.get_masks(found.model)["hidden/kernel"].all()


@pytest.mark.slow("jax")
@pytest.mark.filterwarnings("error:Skipping variable loading")
def test_a_supermask_is_trained_on_with_the_optimizer_of_the_model(digits, tmp_path):
    found = learned.learn_supermask(network(), *digits[0], steps=20)
    assert isinstance(found.model.optimizer, keras.optimizers.SGD)
    found.supermask.save(tmp_path / "supermask.keras")
    for supermask in (found.supermask, keras.saving.load_model(tmp_path / "supermask.keras")):
        assert isinstance(supermask.optimizer, keras.optimizers.Adam)
        assert float(supermask.optimizer.learning_rate) == pytest.approx(0.01)
        masks = ml.get_masks(supermask)
        before = supermask.evaluate(*digits[0], verbose=0, return_dict=True)
        supermask.fit(*digits[0], epochs=1, verbose=0)
        after = supermask.evaluate(*digits[0], verbose=0, return_dict=True)
        assert after["loss"] < before["loss"]
        for path, mask in ml.get_masks(supermask).items():
            np.testing.assert_array_equal(mask, masks[path])


def test_samples_are_whole_masks_and_repeat(digits):
    model = ml.convert_to_masked(network(), mask=ml.BernoulliMask(seed=3))
    first = learned.evaluate_sampled(model, *digits[1], samples=2, seed=5)
    second = learned.evaluate_sampled(model, *digits[1], samples=2, seed=5)
    np.testing.assert_array_equal(first["loss"], second["loss"])
    assert first["loss"][0] != first["loss"][1]
    hard = ml.harden(model, seed=randomness.integer("test samples", 5, 1))
    assert training.evaluate(hard, *digits[1])["loss"] == pytest.approx(first["loss"][1], rel=1e-6)
    with pytest.raises(ValueError, match="`samples` must be at least 1"):
        learned.evaluate_sampled(model, *digits[1], samples=0)


def test_refusals_come_before_training(digits):
    model = network()
    for wrong, message in (
        ({"weights": "final"}, "`weights` must be one of"),
        ({"mask": "binary"}, "must be a learned mask"),
        ({"mask": "popup"}, "`mask` must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            learned.learn_supermask(model, *digits[0], steps=1, **wrong)
    with pytest.raises(ValueError, match="not compiled"):
        learned.learn_supermask(keras.Sequential(), *digits[0], steps=1)
