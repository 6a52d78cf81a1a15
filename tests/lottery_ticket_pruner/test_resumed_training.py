"""A training restored by another callback continues as if it had never stopped."""

import keras
import numpy as np
import pytest
from keras import ops

import masked_layers as ml
from lottery_ticket_pruner import (
    DynamicSparseTraining,
    GradualPruning,
    LotteryTicketPruner,
    PrunerCallback,
    schedules,
    training,
)

BACKEND = keras.backend.backend()
BATCHES = 4  # per epoch, all equal, because Keras restarts the epoch when it resumes inside one
X = np.tile(np.random.default_rng(0).normal(size=(12, 8)).astype("float32"), (BATCHES, 1))
Y = np.tile(np.arange(12) % 2, BATCHES)


def make_model(steps_per_execution=1, masked=True):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(2)]
    )
    model = ml.convert_to_masked(model) if masked else model
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    optimizer = keras.optimizers.SGD(0.05, momentum=0.9)
    model.compile(optimizer, loss, steps_per_execution=steps_per_execution)
    model.optimizer.build(model.trainable_variables)
    return model


class Watch(keras.callbacks.Callback):
    """Records the complete state at the end of every batch, by step. May stop at one of them."""

    def __init__(self, stop_at=None):
        super().__init__()
        self.states, self.stop_at = {}, stop_at

    def on_train_batch_begin(self, batch, logs=None):
        count = int(self.model.optimizer.iterations.numpy())
        if self.stop_at is not None and count >= self.stop_at:
            raise InterruptedError

    def on_train_batch_end(self, batch, logs=None):
        if BACKEND == "jax":
            self.model.jax_state_sync()
        count = int(self.model.optimizer.iterations.numpy())
        variables = [*self.model.variables, *self.model.optimizer.variables]
        self.states[count] = [np.array(ops.convert_to_numpy(v)) for v in variables]


def fit(model, epochs, callbacks):
    model.fit(X, Y, batch_size=12, epochs=epochs, shuffle=False, verbose=0, callbacks=callbacks)


def assert_resumed_as_uninterrupted(make, places, tmp_path):
    """`make()` returns a new model and the callback that is or was restored.

    `places` are those of the backups in the list of callbacks: of the one at every epoch, and of
    the one at every third batch. Each resumed training is compiled again, so that a test has two.
    """
    model, ours = make()
    whole = Watch()
    fit(model, 4, [ours, whole])
    assert list(whole.states)[-1] == 4 * BATCHES

    def backup(place, kind):
        folder = tmp_path / f"{place}-{kind}"
        return keras.callbacks.BackupAndRestore(folder, save_freq=kind)

    model, ours = make()
    kinds = ("epoch", 3)
    ahead, behind = ([backup(place, kind) for kind in kinds] for place in ("ahead", "behind"))
    with pytest.raises(InterruptedError):
        fit(model, 3, [*ahead, ours, *behind, Watch(stop_at=7)])

    for kind, place in zip(kinds, places, strict=True):
        model, ours = make()
        restore, watch = backup(place, kind), Watch()
        order = [restore, ours] if place == "ahead" else [ours, restore]
        fit(model, 3, [*order, watch])
        assert min(watch.states) > (4 if kind == "epoch" else 1), "not resumed"
        for count, state in watch.states.items():
            for mine, expected in zip(state, whole.states[count], strict=True):
                np.testing.assert_array_equal(mine, expected, f"{place} {kind} {count}")


ORDERS = [("behind", "ahead"), ("ahead", "behind")]
RAMP = schedules.Polynomial(0.0, 0.8, begin_step=0, end_step=16, frequency=1)
CALLBACKS = {
    "regrowth": lambda pruner: GradualPruning(pruner, RAMP, regrowth=True),
    "movement": lambda pruner: GradualPruning(pruner, RAMP, "movement"),
    "SET": lambda pruner: DynamicSparseTraining(pruner, 16, "random", frequency=2, until=1),
    "RigL": lambda pruner: DynamicSparseTraining(pruner, 16, data=(X, Y), frequency=2, until=1),
}
# Every order with every kind of backup, by two callbacks each.
PLACES = {"regrowth": ORDERS[0], "movement": ORDERS[1], "SET": ORDERS[1], "RigL": ORDERS[0]}
ONCE = ("SET", "regrowth", "movement")  # differences between backends are covered by the others
MARKS = {name: [pytest.mark.once] for name in ONCE} | {"RigL": [pytest.mark.slow("tensorflow")]}
for name in ("movement", "SET"):
    MARKS[name].append(pytest.mark.slow)


@pytest.mark.parametrize("name", [pytest.param(n, marks=MARKS[n]) for n in CALLBACKS])
def test_masks_continue_in_any_order_of_the_callbacks(name, tmp_path):
    def make():
        # Keras does not support steps_per_execution on torch.
        model = make_model(steps_per_execution=2 if name == "SET" and BACKEND != "torch" else 1)
        pruner = LotteryTicketPruner(model)
        if name in ("SET", "RigL"):
            pruner.update_masks("random", sparsity=0.5)
        return model, CALLBACKS[name](pruner)

    assert_resumed_as_uninterrupted(make, PLACES[name], tmp_path)


@pytest.mark.parametrize(
    "use_dwr", [pytest.param(False, marks=pytest.mark.slow), pytest.param(True, id="rescaled")]
)
def test_a_plain_model_continues_under_its_masks(use_dwr, tmp_path):
    """Even if the restored weights already contain the rescaling factor."""

    def make():
        model = make_model(masked=False)
        pruner = LotteryTicketPruner(model)
        pruner.calc_prune_mask(model, 0.3, "large_init")
        return model, PrunerCallback(pruner, use_dwr=use_dwr)

    assert_resumed_as_uninterrupted(make, ORDERS[use_dwr], tmp_path)


class Load(keras.callbacks.Callback):
    """Replaces the weights of the model when training begins."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def on_train_begin(self, logs=None):
        self.model.set_weights(self.weights)


def test_weights_that_another_callback_loads_are_pruned_before_the_first_batch():
    model = make_model(masked=False)
    pruner = LotteryTicketPruner(model)
    pruner.calc_prune_mask(model, 0.5, "large_init")
    load, seen = Load(model.get_weights()), []

    def look(batch, logs):
        if batch == 0:  # later, `fit` on JAX keeps the values outside the variables
            seen.append([np.count_nonzero(weight) for weight in model.get_weights()[::2]])

    look = keras.callbacks.LambdaCallback(on_train_batch_begin=look)
    fit(model, 1, [PrunerCallback(pruner), load, look])
    assert seen == [[64, 16]]


def test_a_saved_rewired_model_continues_after_its_last_change(tmp_path):
    model = make_model()
    pruner = LotteryTicketPruner(model)
    pruner.update_masks("random", sparsity=0.5)

    def rewiring(pruner):
        return DynamicSparseTraining(pruner, 16, "random", frequency=2, until=1)

    watch = Watch()
    ahead = keras.callbacks.ModelCheckpoint(tmp_path / "ahead-{batch}.keras", save_freq=1)
    behind = keras.callbacks.ModelCheckpoint(tmp_path / "behind-{batch}.keras", save_freq=1)
    fit(model, 1, [ahead, rewiring(pruner), behind, watch])
    for place in ("ahead", "behind"):
        loaded = keras.saving.load_model(tmp_path / f"{place}-2.keras")
        again = Watch()
        fit(loaded, 1, [rewiring(LotteryTicketPruner(loaded)), again])
        for mine, expected in zip(again.states[3], watch.states[3], strict=True):
            np.testing.assert_array_equal(mine, expected, place)


def test_accumulated_gradients_survive_a_file(tmp_path):
    def train(model, seed):
        training.train(model, X, Y, steps=3, batch_size=10, seed=seed)

    def variables(model):
        return [
            np.array(ops.convert_to_numpy(v)) for v in (*model.weights, *model.optimizer.variables)
        ]

    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=2)
    layers = [keras.Input((X.shape[1],)), keras.layers.Dense(int(Y.max()) + 1)]
    model = ml.convert_to_masked(keras.Sequential(layers))
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    train(model, 1)  # The gradient of the third step waits for the fourth.
    model.save(tmp_path / "model.keras")
    train(model, 2)
    resumed = keras.models.load_model(tmp_path / "model.keras")
    train(resumed, 2)
    for one, other in zip(variables(model), variables(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
