"""The earlier API on plain models: masks outside the model, and rescaling."""

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, PrunerCallback
from plain import classifier, largest_pruned, sparsities
from pruned import compiled


def nested_model():
    """Two inputs, a nested Sequential used twice, batch normalization and a bidirectional RNN."""
    keras.utils.set_random_seed(1)
    shared = keras.Sequential([layers.Dense(4, name="inner"), layers.BatchNormalization()])
    left, right = keras.Input((6,)), keras.Input((6,))
    joined = layers.Concatenate()([shared(left), shared(right)])
    sequence = layers.Reshape((4, 2))(joined)
    outputs = layers.Dense(2)(layers.Bidirectional(layers.LSTM(3))(sequence))
    return compiled(keras.Model([left, right], outputs))


@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_the_documented_snippet_runs_as_it_stands(convert, data):
    model = convert(classifier())
    (X, y), (x_test, y_test) = data, data

    initial_weights = model.get_weights()
    pruner = LotteryTicketPruner(model)
    model.fit(X, y)
    pruner.set_pretrained_weights(model)
    model.set_weights(initial_weights)
    pruner.calc_prune_mask(model, 0.5, "large_final")
    untrained_loss, untrained_accuracy = model.evaluate(x_test, y_test)
    model.fit(X, y, callbacks=[PrunerCallback(pruner)])
    trained_loss, trained_accuracy = model.evaluate(x_test, y_test)

    assert 0 <= untrained_accuracy <= 1
    assert 0 <= trained_accuracy <= 1
    assert trained_loss != untrained_loss
    assert sparsities(pruner, model) == {"dense/kernel": 0.5, "dense_1/kernel": 0.5}


def test_masks_of_a_masked_model_act_at_once_and_those_of_a_plain_one_when_applied(data):
    x, y = data
    plain = classifier()
    masked = ml.convert_to_masked(plain)
    losses = {}
    for model in (plain, masked):
        pruner = LotteryTicketPruner(model)
        dense = model.evaluate(x, y, verbose=0)[0]
        pruner.calc_prune_mask(model, 0.5, "large_init")
        losses[model] = [model.evaluate(x, y, verbose=0)[0]]
        pruner.apply_pruning(model)
        losses[model] += [model.evaluate(x, y, verbose=0)[0]]
        assert losses[model][1] != dense
    assert losses[plain][0] == dense
    assert losses[masked] == pytest.approx([losses[plain][1]] * 2)


@pytest.mark.once
@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_rates_are_shares_of_the_kept_weights(convert):
    model = convert(classifier())
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "smallest_weights")
    first = {key: mask for key, *_, mask in pruner.iterate_prunables(model)}
    pruner.calc_prune_mask(model, 0.2, "smallest_weights")
    second = {key: mask for key, *_, mask in pruner.iterate_prunables(model)}
    assert {key: (~mask).mean() for key, mask in second.items()} == {
        "dense/kernel": 0.6,
        "dense_1/kernel": 0.6,
    }
    assert all((second[key] <= first[key]).all() for key in first)


@pytest.mark.once
def test_reset_masks_forgets_the_cumulative_rate():
    model = classifier()
    pruner = LotteryTicketPruner(model)
    for _ in range(3):
        pruner.reset_masks()
        pruner.calc_prune_mask(model, 0.9, "large_init")
        assert sparsities(pruner, model) == pytest.approx(
            {"dense/kernel": 0.9, "dense_1/kernel": 0.9}
        )


@pytest.mark.once
@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan")])
def test_rates_of_the_earlier_api_are_exclusive(rate):
    model = classifier()
    pruner = LotteryTicketPruner(model)
    with pytest.raises(ValueError, match="exclusive"):
        pruner.calc_prune_mask(model, rate, "large_init")
    assert set(sparsities(pruner, model).values()) == {0.0}


@pytest.mark.once
def test_a_missing_record_and_an_unknown_name_are_errors():
    model = classifier()
    pruner = LotteryTicketPruner(model)
    with pytest.raises(ValueError, match="set_pretrained_weights"):
        pruner.calc_prune_mask(model, 0.5, "large_final")
    with pytest.raises(ValueError, match="magnitude_increase"):
        pruner.calc_prune_mask(model, 0.5, "largest_final")


@pytest.mark.once
def test_an_incompatible_model_is_an_error_with_the_layer_and_both_shapes():
    pruner = LotteryTicketPruner(classifier())
    other = keras.Sequential(
        [keras.Input((6,)), layers.Dense(10), layers.Dense(3, name="head"), layers.Dense(2)]
    )
    shorter = keras.Sequential([keras.Input((6,)), layers.Dense(10)])
    for call in (
        pruner.set_pretrained_weights,
        pruner.set_initial_weights,
        pruner.apply_pruning,
        pruner.apply_dwr,
        lambda model: pruner.calc_prune_mask(model, 0.5, "large_init"),
        lambda model: list(pruner.iterate_prunables(model)),
    ):
        with pytest.raises(ValueError, match=r"'head' with shape \(10, 3\).*\(10, 2\)"):
            call(other)
        with pytest.raises(ValueError, match=r"no further weight.*'dense_1' with shape \(10, 2\)"):
            call(shorter)


@pytest.mark.once
def test_another_model_of_the_same_architecture_is_fine():
    model, other = classifier(0), classifier(1)
    pruner = LotteryTicketPruner(model)
    pruner.set_pretrained_weights(other)
    pruner.calc_prune_mask(other, 0.5, "large_final")
    pruner.apply_pruning(other)
    assert largest_pruned(pruner, other) == 0
    assert largest_pruned(pruner, model) > 0


@pytest.mark.once
def test_methods_for_masked_models_name_the_way_there(data):
    pruner = LotteryTicketPruner(classifier())
    for call in (
        lambda: pruner.update_masks("large_init", rate=0.5),
        pruner.rewind,
        lambda: pruner.evaluate_supermask(*data),
    ):
        with pytest.raises(ValueError, match="convert_to_masked"):
            call()


@pytest.mark.once
def test_iterate_prunables_of_a_nested_model():
    model = nested_model()
    pruner = LotteryTicketPruner(model)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    pruner.set_pretrained_weights(model)
    model.set_weights([weight + 1 for weight in model.get_weights()])
    pruner.calc_prune_mask(model, 0.5, "large_final")
    rows = list(pruner.iterate_prunables(model))
    keys = [key for key, *_ in rows]
    assert len(set(keys)) == len(keys) == 6  # inner, twice (recurrent) kernel, head
    assert sum("inner/kernel" in key for key in keys) == 1
    for _, layer, index, initial, pretrained, current, mask in rows:
        assert ops.convert_to_numpy(layer.weights[index]).tolist() == current.tolist()
        np.testing.assert_allclose(pretrained, initial + 1, rtol=1e-6)
        np.testing.assert_allclose(current, initial + 2, rtol=1e-6)
        assert mask.dtype == bool
        assert mask.sum() == mask.size - mask.size // 2


@pytest.mark.once
def test_apply_pruning_of_a_nested_model_zeroes_kernels_alone():
    model = nested_model()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    before = model.get_weights()
    pruner.apply_pruning(model)
    after = model.get_weights()
    masks = {
        id(layer.weights[index]): mask
        for _, layer, index, *_, mask in pruner.iterate_prunables(model)
    }
    for variable, old, new in zip(model.weights, before, after, strict=True):
        mask = masks.get(id(variable), np.ones(old.shape, bool))
        np.testing.assert_array_equal(new, np.where(mask, old, 0))


def kernels(model):
    return [weight for weight in model.get_weights() if weight.ndim > 1]


def test_rescaling_does_not_compound():
    model = classifier()
    initial = kernels(model)
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    pruner.apply_pruning(model)
    pruned = kernels(model)
    for _ in range(5):
        pruner.apply_dwr(model)
    for scaled, weights in zip(kernels(model), pruned, strict=True):
        np.testing.assert_allclose(scaled, 2 * weights, rtol=1e-6)
    pruner.calc_prune_mask(model, 0.2, "large_init")
    pruner.apply_dwr(model)
    masks = [mask for *_, mask in pruner.iterate_prunables(model)]
    for scaled, weights, mask in zip(kernels(model), initial, masks, strict=True):
        np.testing.assert_allclose(scaled, np.where(mask, 2.5 * weights, 0), rtol=1e-6)


def test_weights_set_back_to_a_record_are_rescaled_again():
    model = classifier()
    initial = model.get_weights()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    for _ in range(2):
        model.set_weights(initial)
        pruner.apply_pruning(model)
        pruned = kernels(model)
        pruner.apply_dwr(model)
        for scaled, weights in zip(kernels(model), pruned, strict=True):
            np.testing.assert_allclose(scaled, 2 * weights, rtol=1e-6)


def test_a_layer_without_ones_has_factor_zero():
    model = ml.convert_to_masked(classifier())
    ml.set_masks(model, {path: np.zeros_like(mask) for path, mask in ml.get_masks(model).items()})
    LotteryTicketPruner(model).apply_dwr(model)
    np.testing.assert_array_equal(model.predict_on_batch(np.ones((2, 6))), 0)

    plain = classifier()
    pruner = LotteryTicketPruner(plain)
    # Masks from criteria keep at least one weight, but those from a file may not.
    pruner._write_masks(plain, {i: np.zeros_like(mask) for i, mask in pruner._masks.items()})
    pruner.apply_dwr(plain)
    pruner.apply_dwr(plain)
    assert all((kernel == 0).all() for kernel in kernels(plain))


@pytest.mark.parametrize("convert", [lambda model: model, ml.convert_to_masked])
def test_rescaling_in_the_callback_is_a_function_of_the_mask(convert, data):
    x, y = data
    model = convert(classifier(optimizer=keras.optimizers.SGD(0.0)))
    pruner = LotteryTicketPruner(model)
    initial = kernels(model)
    model.fit(x, y, verbose=0)
    model.predict_on_batch(x)
    pruner.calc_prune_mask(model, 0.75, "large_init")
    for _ in range(2):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[PrunerCallback(pruner, use_dwr=True)])
    masks = [mask for *_, mask in pruner.iterate_prunables(model)]
    first, second = (
        4 * np.where(mask, weights, 0) for mask, weights in zip(masks, initial, strict=True)
    )
    expected = np.maximum(x @ first, 0) @ second
    np.testing.assert_allclose(model.predict_on_batch(x), expected, rtol=1e-4, atol=1e-5)
