"""The callback of the earlier API: zeros enforced inside the optimizer."""

import gc

import keras
import numpy as np
import pytest
from keras import layers, ops

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, PrunerCallback
from plain import classifier, largest_pruned, sparsities
from pruned import compiled

BACKEND = keras.backend.backend()


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


ONCE = pytest.mark.once  # On other backends one optimizer stands for those that are alike.
MARKS = {"adam": pytest.mark.slow("tensorflow"), "adamw": ONCE, "ema_at_the_end": ONCE}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=MARKS.get(name, ())) for name in OPTIMIZERS]
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


def test_an_existing_constraint_applies_to_kept_weights(data):
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
    for other in (pruner, LotteryTicketPruner(model)):  # The next one may belong to another pruner.
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
