"""The earlier API on plain models: masks outside the model, zeros enforced by the optimizer."""

import gc

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, PrunerCallback
from pruned import compiled

BACKEND = keras.backend.backend()


def classifier(seed=0, **compile_kwargs):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((6,)), layers.Dense(10, "relu"), layers.Dense(2)])
    return compiled(model, **compile_kwargs)


def nested_model():
    """Two inputs, a nested Sequential used twice, batch normalization and a bidirectional RNN."""
    keras.utils.set_random_seed(1)
    shared = keras.Sequential([layers.Dense(4, name="inner"), layers.BatchNormalization()])
    left, right = keras.Input((6,)), keras.Input((6,))
    joined = layers.Concatenate()([shared(left), shared(right)])
    sequence = layers.Reshape((4, 2))(joined)
    outputs = layers.Dense(2)(layers.Bidirectional(layers.LSTM(3))(sequence))
    return compiled(keras.Model([left, right], outputs))


def sparsities(pruner, model):
    return {key: 1 - mask.mean() for key, *_, mask in pruner.iterate_prunables(model)}


def largest_pruned(pruner, model):
    largest = [
        np.abs(now[~mask]).max(initial=0) for *_, now, mask in pruner.iterate_prunables(model)
    ]
    assert sum(int((~mask).sum()) for *_, mask in pruner.iterate_prunables(model)) > 0
    return max(largest)


class LargestPruned(keras.callbacks.Callback):
    """Records the largest pruned weight after each execution and each validation."""

    def __init__(self, pruner):
        super().__init__()
        self.pruner = pruner
        self.seen = []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(largest_pruned(self.pruner, self.model))

    def on_test_batch_begin(self, batch, logs=None):
        if BACKEND != "jax" or batch == 0:
            self.seen.append(largest_pruned(self.pruner, self.model))


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
def test_rates_are_of_what_remains(convert):
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


# --- The callback ---------------------------------------------------------------------------------

OPTIMIZERS = {
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "momentum": lambda: keras.optimizers.SGD(0.05, momentum=0.9),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "ema": lambda: keras.optimizers.Adam(
        0.01, use_ema=True, ema_momentum=0.5, ema_overwrite_frequency=3
    ),
    "ema_at_the_end": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_momentum=0.5),
    "loss_scale": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
}


def give_momenta(model):
    """Sets weights as left by an earlier training, including weights that are pruned later."""
    model.optimizer.build(model.trainable_variables)
    momenta = [v for v in model.optimizer.variables if v.path.endswith(("momentum", "velocity"))]
    assert len(momenta) >= len(model.trainable_variables)
    for momentum in momenta:
        momentum.assign(np.full(momentum.shape, 0.1))


@pytest.mark.parametrize(
    "name",
    # On other backends one optimizer stands for those that are alike.
    [
        pytest.param(name, marks=pytest.mark.once if name in ("adamw", "ema_at_the_end") else ())
        for name in OPTIMIZERS
    ],
)
def test_pruned_weights_are_zero_after_every_batch_and_during_validation(name, data):
    x, y = data
    model = classifier(optimizer=OPTIMIZERS[name]())
    pruner = LotteryTicketPruner(model)
    give_momenta(model)
    pruner.calc_prune_mask(model, 0.7, "smallest_weights")
    watcher = LargestPruned(pruner)
    before = model.get_weights()
    model.fit(
        x, y, batch_size=20, epochs=2, validation_data=data, verbose=0,
        callbacks=[PrunerCallback(pruner), watcher],
    )  # fmt: skip
    assert len(watcher.seen) >= 10
    assert set(watcher.seen) == {0.0}
    assert largest_pruned(pruner, model) == 0
    moved = [
        np.abs(now - then)[now != 0].max()
        for now, then in zip(model.get_weights(), before, strict=True)
    ]
    assert min(moved) > 0


@pytest.mark.skipif(BACKEND == "torch", reason="torch takes one step per execution")
@pytest.mark.parametrize("jit_compile", [False, True])
def test_pruned_weights_are_zero_for_any_steps_per_execution(jit_compile, data):
    x, y = data
    model = classifier(steps_per_execution=4, jit_compile=jit_compile)
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.7, "large_init")
    # Without the hold, a weight that leaves zero inside an execution would come back with another
    # value. With it, training four steps at once equals training them one by one.
    single = classifier(jit_compile=jit_compile)
    watcher = LargestPruned(pruner)
    for trained in (model, single):
        trained.fit(
            x, y, batch_size=10, epochs=2, shuffle=False, verbose=0,
            callbacks=[PrunerCallback(pruner), watcher],
        )  # fmt: skip
    assert set(watcher.seen) == {0.0}
    for ours, theirs in zip(model.get_weights(), single.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_a_plain_model_with_the_callback_trains_as_a_masked_model(data):
    x, y = data
    plain = classifier()
    masked = ml.convert_to_masked(plain)
    for model in (plain, masked):
        pruner = LotteryTicketPruner(model)
        pruner.calc_prune_mask(model, 0.6, "large_init")
        model.fit(x, y, shuffle=False, epochs=3, verbose=0, callbacks=[PrunerCallback(pruner)])
    stripped = ml.strip_masks(masked)
    for ours, theirs in zip(plain.get_weights(), stripped.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_an_existing_constraint_acts_on_what_is_kept(data):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6,))
    hidden = layers.Dense(10, kernel_constraint=keras.constraints.UnitNorm())
    model = compiled(keras.Model(inputs, layers.Dense(2)(hidden(inputs))))
    constraint = hidden.kernel.constraint
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    model.fit(*data, verbose=0, callbacks=[PrunerCallback(pruner)])
    assert largest_pruned(pruner, model) == 0
    kernel = ops.convert_to_numpy(hidden.kernel)
    norms = np.linalg.norm(kernel, axis=0)
    np.testing.assert_allclose(norms[norms > 0], 1, rtol=1e-5)
    assert hidden.kernel.constraint is constraint


def test_the_hold_ends_with_the_training(data):
    model = classifier()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    model.fit(*data, verbose=0)
    dense_function = model.train_function
    model.fit(*data, verbose=0, callbacks=[PrunerCallback(pruner)])
    assert largest_pruned(pruner, model) == 0
    assert model.train_function is dense_function
    assert all(variable.constraint is None for variable in model.weights)
    model.fit(*data, verbose=0)
    assert largest_pruned(pruner, model) > 0


def training_fails(model, data, callback):
    def fail(*args):
        raise RuntimeError("stop")

    failing = keras.callbacks.LambdaCallback(on_epoch_end=fail)
    try:  # not `pytest.raises`, which would keep the callback alive
        model.fit(*data, verbose=0, callbacks=[callback, failing])
    except RuntimeError:
        return True
    return False


def test_a_training_that_fails_does_not_leave_the_hold_behind(data):
    model = classifier()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    for other in (pruner, LotteryTicketPruner(model)):  # the next one may be another pruner's
        assert training_fails(model, data, PrunerCallback(other))
    model.fit(*data, verbose=0, callbacks=[PrunerCallback(pruner)])
    assert largest_pruned(pruner, model) == 0
    gc.collect()
    model.fit(*data, verbose=0)
    assert all(variable.constraint is None for variable in model.weights)
    assert largest_pruned(pruner, model) > 0


def test_the_hold_of_a_failed_training_ends_with_its_callback(data):
    model = classifier()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    callback = PrunerCallback(pruner)
    assert training_fails(model, data, callback)
    assert any(variable.constraint is not None for variable in model.weights)
    del callback
    gc.collect()
    assert all(variable.constraint is None for variable in model.weights)
    model.fit(*data, verbose=0)
    assert largest_pruned(pruner, model) > 0


def test_masks_that_change_during_the_training_hold_from_the_next_batch(data):
    model = classifier()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.2, "large_init")
    found = []

    class PruneMore(LargestPruned):
        def on_train_batch_end(self, batch, logs=None):
            super().on_train_batch_end(batch, logs)
            if batch == 1:
                pruner.calc_prune_mask(self.model, 0.5, "large_init")
                found.append(largest_pruned(pruner, self.model))

    watcher = PruneMore(pruner)
    model.fit(
        *data, batch_size=20, epochs=2, verbose=0, callbacks=[PrunerCallback(pruner), watcher]
    )
    assert min(found) > 0
    assert set(watcher.seen) == {0.0}
    assert set(np.round(list(sparsities(pruner, model).values()), 6)) == {0.8}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a TensorFlow strategy")
def test_mirrored_weights_are_held_too(data):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = classifier()
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    watcher = LargestPruned(pruner)
    model.fit(*data, epochs=2, verbose=0, callbacks=[PrunerCallback(pruner), watcher])
    assert set(watcher.seen) == {0.0}


def test_averaged_weights_are_pruned_during_validation(data):
    model = classifier(optimizer=OPTIMIZERS["ema_at_the_end"]())
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    watcher = LargestPruned(pruner)
    model.fit(
        *data, validation_data=data, verbose=0,
        callbacks=[keras.callbacks.SwapEMAWeights(), PrunerCallback(pruner), watcher],
    )  # fmt: skip
    assert set(watcher.seen) == {0.0}


# --- Rescaling ------------------------------------------------------------------------------------


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
    np.testing.assert_array_equal(model.predict(np.ones((2, 6)), verbose=0), 0)

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
    model.predict(x, verbose=0)
    pruner.calc_prune_mask(model, 0.75, "large_init")
    for _ in range(2):
        model.fit(x, y, epochs=3, verbose=0, callbacks=[PrunerCallback(pruner, use_dwr=True)])
    masks = [mask for *_, mask in pruner.iterate_prunables(model)]
    first, second = (
        4 * np.where(mask, weights, 0) for mask, weights in zip(masks, initial, strict=True)
    )
    expected = np.maximum(x @ first, 0) @ second
    np.testing.assert_allclose(model.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-5)
