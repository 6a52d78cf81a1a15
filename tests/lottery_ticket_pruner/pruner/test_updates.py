"""The pruner on masked models: records and updates."""

import logging
import warnings

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, criteria
from pruned import assert_same, masked_model, moved, trained

# --- Records --------------------------------------------------------------------------------------


def test_records_are_read_only_copies_of_every_weight(data):
    model = masked_model()
    pruner = LotteryTicketPruner(model)
    before = model.get_weights()
    assert pruner.final_weights is None
    model.fit(*data, verbose=0)
    pruner.set_pretrained_weights()
    after = model.get_weights()
    model.fit(*data, verbose=0)
    assert_same(list(pruner.initial_weights.values()), before)
    assert_same(list(pruner.final_weights.values()), after)
    assert list(pruner.initial_weights) == [
        "hidden/kernel",
        "hidden/bias",
        "batch_normalization/gamma",
        "batch_normalization/beta",
        "batch_normalization/moving_mean",
        "batch_normalization/moving_variance",
        "head/kernel",
        "head/bias",
    ]
    with pytest.raises(TypeError):
        pruner.initial_weights["hidden/kernel"] = 0
    for array in (*pruner.initial_weights.values(), *pruner.final_weights.values()):
        with pytest.raises(ValueError, match="read-only"):
            array[...] = 0


def test_no_strategy_changes_a_record():
    model, pruner = moved()
    records = [array.copy() for array in pruner.initial_weights.values()]
    records += [array.copy() for array in pruner.final_weights.values()]
    raw = model.get_weights()
    for name in criteria.names():
        if criteria.get(name).evidence:  # see evidence/test_sources.py
            continue
        pruner.reset_masks()
        with warnings.catch_warnings(action="ignore"):
            pruner.update_masks(name, rate=0.3)
        assert ml.sparsity_report(model).alive == 42 + 14
    with pytest.raises(ValueError, match="read-only"):
        pruner.update_masks(spoil, rate=0.3)
    now = [*pruner.initial_weights.values(), *pruner.final_weights.values()]
    assert_same(now, records)
    assert_same(model.get_weights(), raw)


def spoil(group):
    group.initial[:] = 0
    return group.initial


@pytest.mark.once
def test_a_model_with_nothing_to_prune_or_without_weights_is_an_error():
    nothing = keras.Sequential([keras.Input((6,)), layers.BatchNormalization()])
    with pytest.raises(ValueError, match="no prunable weight"):
        LotteryTicketPruner(nothing)
    with pytest.raises(ValueError, match="Build it first"):
        LotteryTicketPruner(keras.Sequential([layers.Dense(2)]))


@pytest.mark.once
def test_a_layer_that_cannot_be_pruned_is_left_as_it_is():
    @keras.saving.register_keras_serializable("test_pruner")
    class Shift(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=(shape[-1], 3), name="table")

        def call(self, x):
            return x + ops.sum(self.table)

    model = keras.Sequential([keras.Input((6,)), Shift(name="shift"), layers.Dense(2)])
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    assert [key for key, *_ in pruner.iterate_prunables(model)] == ["dense/kernel"]
    assert "shift/table" in pruner.initial_weights


# --- Updates --------------------------------------------------------------------------------------


def test_update_masks_keeps_the_exact_count_of_the_largest():
    model, pruner = moved()
    raw = model.get_weights()
    report = pruner.update_masks("large_final", rate=0.2)
    assert (report.alive, report.size) == (48 + 16, 80)
    report = pruner.update_masks("large_init", sparsity=0.5)
    assert (report.alive, report.size) == (30 + 10, 80)
    assert_same(model.get_weights(), raw)

    pruner.reset_masks()
    pruner.set_pretrained_weights()
    pruner.update_masks("large_final", rate=0.5)
    for path, mask in ml.get_masks(model).items():
        final = np.abs(pruner.final_weights[path])
        assert final[mask].min() > final[~mask].max()


@pytest.mark.once
def test_rates_by_pattern_scopes_and_functions():
    model, pruner = moved()
    report = pruner.update_masks(rate={"head": 0.1, "default": 0.2})
    assert {row.path: row.alive for row in report} == {"hidden/kernel": 48, "head/kernel": 18}
    pruner.reset_masks()
    pruner.update_masks("smallest_weights_global", rate=0.4)
    masks = ml.get_masks(model)
    weights = {path: np.abs(array) for path, array in pruner.final_weights.items()}
    kept = np.concatenate([weights[path][mask] for path, mask in masks.items()])
    gone = np.concatenate([weights[path][~mask] for path, mask in masks.items()])
    assert len(gone) == 32
    assert kept.min() > gone.max()
    pruner.reset_masks()
    pruner.update_masks(lambda group: -group.initial, rate=0.5)
    for path, mask in ml.get_masks(model).items():
        initial = pruner.initial_weights[path]
        assert initial[mask].max() < initial[~mask].min()


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "large_finale", "rate": 0.2}, "large_final"),
        ({"rate": 1.0}, r"\[0, 1\)"),
        ({"rate": -0.1}, r"\[0, 1\)"),
        ({}, "exactly one"),
        ({"rate": 0.1, "sparsity": 0.1}, "exactly one"),
        ({"rate": {"default": 0.1}, "scope": "global"}, "global"),
        ({"rate": 0.1, "scope": "model"}, "scope"),
        ({"rate": 0.1, "seed": -1}, "seed"),
    ],
)
def test_wrong_arguments_are_errors_and_change_nothing(arguments, message):
    model, pruner = moved()
    with pytest.raises(ValueError, match=message):
        pruner.update_masks(**arguments)
    assert ml.sparsity_report(model).sparsity == 0


@pytest.mark.once
def test_a_missing_record_is_an_error():
    model = masked_model()
    with pytest.raises(ValueError, match="set_pretrained_weights"):
        LotteryTicketPruner(model).update_masks("large_final", rate=0.2)
    assert ml.sparsity_report(model).sparsity == 0


@pytest.mark.once
def test_a_rate_of_zero_is_a_no_op():
    model, pruner = moved()
    pruner.update_masks(rate=0.5)
    masks = ml.get_masks(model)
    pruner.set_pretrained_weights()
    pruner.update_masks(rate=0)
    assert_same(list(ml.get_masks(model).values()), list(masks.values()))


def test_update_masks_warns_of_final_weights_older_than_the_last_update():
    _, pruner = moved()
    with warnings.catch_warnings(action="error", category=UserWarning):
        pruner.update_masks(rate=0.2)
        pruner.update_masks("large_init", rate=0.2)
    with pytest.warns(UserWarning, match="set_pretrained_weights"):
        pruner.update_masks(rate=0.2)
    pruner.set_pretrained_weights()
    with warnings.catch_warnings(action="error", category=UserWarning):
        pruner.update_masks(rate=0.2)


def test_seeds_decide_random_scores():
    model = masked_model()
    pruner = LotteryTicketPruner(model)

    def masks(**kwargs):
        pruner.reset_masks()
        pruner.update_masks("random", rate=0.5, **kwargs)
        return np.concatenate([mask.ravel() for mask in ml.get_masks(model).values()])

    assert (masks() == masks()).all()
    assert (masks(seed=3) == masks(seed=3)).all()
    assert (masks(seed=3) != masks(seed=4)).any()


def test_resetting_the_masks_leaves_the_raw_weights():
    model, pruner = moved()
    raw = model.get_weights()
    for _ in range(2):
        pruner.update_masks("large_init", rate=0.9)
        assert ml.sparsity_report(model).alive == 6 + 2
        pruner.reset_masks()
        assert ml.sparsity_report(model).sparsity == 0
    assert_same(model.get_weights(), raw)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    ],
)
def test_effective_weights_under_the_mask_are_zero_after_100_steps(optimizer, data):
    x, y = data
    model = masked_model(optimizer())
    pruner = LotteryTicketPruner(model)
    model.fit(x, y, batch_size=8, verbose=0)
    pruner.set_pretrained_weights()
    pruner.update_masks(rate=0.7)
    model.fit(x, y, batch_size=8, epochs=10, verbose=0)
    largest = 0.0
    for ref in ml.masked_refs(model):
        effective = ops.convert_to_numpy(getattr(ref.layer, ref.name))
        pruned = ~ops.convert_to_numpy(ref.mask.value)
        assert pruned.sum() >= 14
        largest = max(largest, np.abs(effective[pruned]).max())
    assert largest == 0.0


def test_masks_updated_inside_fit_take_effect(data):
    model, pruner = trained(data)
    x, y = data

    class PruneAtBatch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 2:
                pruner.set_pretrained_weights()
                pruner.update_masks(rate=0.5)

    model.fit(x, y, batch_size=16, verbose=0, callbacks=[PruneAtBatch()])
    assert ml.sparsity_report(model).alive == 30 + 10
    stripped = ml.strip_masks(model)
    np.testing.assert_allclose(
        model.predict_on_batch(x), stripped.predict_on_batch(x), rtol=1e-5, atol=1e-6
    )


# --- Around ---------------------------------------------------------------------------------------


@pytest.mark.once
def test_records_updates_and_rewinds_are_logged(caplog):
    with caplog.at_level(logging.INFO, "lottery_ticket_pruner"):
        _, pruner = moved()
        pruner.update_masks(rate=0.5)
        pruner.rewind()
        pruner.reset_masks()
    text = caplog.text
    for part in ("initial", "final", "large_final: 40 of 80", "Rewound 8 weights", "Reset"):
        assert part in text


def test_half_precision_weights():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,), dtype="bfloat16")
    model = keras.Model(inputs, layers.Dense(4, dtype="bfloat16", name="half")(inputs))
    model = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(model)
    initial = pruner.initial_weights["half/kernel"]
    assert initial.dtype == "float32"
    model.set_weights([0 * weight for weight in model.get_weights()])
    pruner.update_masks("large_init", rate=0.5)
    pruner.rewind()
    kernel = ml.masked_refs(model)[0].variable
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(kernel, "float32")), initial)
