"""The compiled loop compared with Keras' `fit` on the same batches."""

import re

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from loops import (
    COMPILED,
    WEIGHT,
    X,
    Y,
    assert_close,
    by_xla,
    compiled,
    dense,
    everything,
    through_fit,
    two_inputs,
    with_own_loss,
    with_state,
)
from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import CropAndFlip, engine
from masked_layers.compiled import kept_beside

BACKEND = keras.backend.backend()

RNG = np.random.default_rng(0)


def recurrent():
    return keras.Sequential(
        [keras.Input((6,)), layers.Reshape((3, 2)), layers.GRU(3), layers.Dense(2)]
    )


class OwnStep(keras.Sequential):
    """Returns a training step that trains on half the loss."""

    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


def own_step():
    return OwnStep([keras.Input((6,)), layers.Dense(2)])


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)


CASES = {
    "dense": (dense, lambda: keras.optimizers.Adam(0.01)),
    "state": (
        lambda: with_state(dropout=0),
        lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1),
    ),
    # XLA draws other random numbers than TensorFlow does without it, and Keras' `fit` uses it.
    "xla": (with_state, lambda: keras.optimizers.SGD(0.05, momentum=0.9, weight_decay=0.1)),
    "schedule": (dense, lambda: keras.optimizers.SGD(schedule(), momentum=0.9, nesterov=True)),
    "clipping": (dense, lambda: keras.optimizers.RMSprop(0.01, clipnorm=0.05)),
    "averages": (dense, lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)),
    "accumulation": (dense, lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "inputs": (two_inputs, lambda: keras.optimizers.SGD(0.1)),
    "recurrent": (recurrent, lambda: keras.optimizers.Adam(0.01)),
    "own": (own_step, lambda: keras.optimizers.SGD(0.1)),
}


# What Keras' own step does, whatever its optimizer or layers are; and what takes most of the time.
SLOW = ("clipping", "schedule", "inputs", "recurrent", "xla")


@pytest.mark.parametrize(
    ("case", "weighted"),
    [
        *(
            pytest.param(
                case,
                case in ("state", "xla"),
                marks=[pytest.mark.slow("tensorflow")] * (case in SLOW),
            )
            for case in CASES
        ),
        ("inputs", True),
    ],
)
def test_same_as_fit_on_the_same_batches(case, weighted, monkeypatch):
    if case == "xla":
        by_xla(monkeypatch)
    make, optimizer = CASES[case]
    x = {"a": X, "b": X[::-1]} if case == "inputs" else X
    weight = WEIGHT if weighted else None
    ours, theirs = (compiled(make, optimizer()) for _ in range(2))
    history = training.fit(
        ours, x, Y, batch_size=12, epochs=2, sample_weight=weight, validation_data=(x, Y), seed=5
    )
    if COMPILED:
        assert not through_fit(ours)
    orders = [np.random.default_rng((5, epoch)).permutation(50) for epoch in range(2)]
    logs = [
        fit_on(theirs, x, weight, order, finalize=epoch == 1) for epoch, order in enumerate(orders)
    ]
    assert_close(everything(ours), everything(theirs))
    for name, values in history.history.items():
        assert values == pytest.approx([log[name] for log in logs], rel=1e-3), name
    assert set(history.history) == set(logs[0])


def fit_on(model, x, weight, order, finalize):
    chosen = keras.tree.map_structure(lambda array: array[order], x)
    weight = None if weight is None else weight[order]
    if not finalize:
        model.optimizer.finalize_variable_values = lambda variables: None
    found = model.fit(
        chosen, Y[order], sample_weight=weight, batch_size=12, shuffle=False, verbose=0,
        validation_data=(x, Y),
    )  # fmt: skip
    if not finalize:
        del model.optimizer.finalize_variable_values
    return {name: values[0] for name, values in found.history.items()}


def test_loss_scaling_and_mixed_precision():
    def make():
        keras.config.set_dtype_policy("mixed_float16")
        return dense()

    ours, theirs = (compiled(make, keras.optimizers.SGD(0.1)) for _ in range(2))
    training.fit(ours, X, Y, batch_size=12, shuffle=False)
    theirs.fit(X, Y, batch_size=12, shuffle=False, verbose=0)
    for a, b in zip(everything(ours), everything(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-4)


def test_augmented_images_are_the_same_in_the_loop_and_in_fit(monkeypatch):
    by_xla(monkeypatch)
    images = RNG.normal(size=(50, 5, 4, 2)).astype("float32")
    crop = CropAndFlip(padding=2)

    def flat():
        return keras.Sequential([keras.Input((5, 4, 2)), layers.Flatten(), layers.Dense(2)])

    ours, theirs, plain = (compiled(flat) for _ in range(3))
    engine.engine_of(theirs)._why_fit = "it is asked for"
    for model in (ours, theirs):
        training.train(model, images, Y, steps=7, batch_size=12, seed=3, augment=crop, eval_every=4)
    assert_close(everything(ours), everything(theirs))
    once = compiled(flat)
    training.train(once, images, Y, steps=7, batch_size=12, seed=3, augment=crop)
    assert_close(everything(once), everything(ours))
    training.train(plain, images, Y, steps=7, batch_size=12, seed=3)
    assert not np.allclose(ours.get_weights()[0], plain.get_weights()[0], atol=1e-4)


def test_crops_and_flips_against_slicing():
    images = RNG.normal(size=(30, 5, 4, 2)).astype("float32")
    crop = CropAndFlip(padding=2)
    drawn = crop.draw(np.random.default_rng(0), 30)
    assert drawn.min(axis=0).tolist() == [0, 0, 0]
    assert drawn.max(axis=0).tolist() == [4, 4, 1]
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    expected = [
        padded[i, row : row + 5, column : column + 4][:, :: -1 if flip else 1]
        for i, (row, column, flip) in enumerate(drawn)
    ]
    found = keras.ops.convert_to_numpy(crop.apply(images, drawn))
    np.testing.assert_array_equal(found, np.stack(expected))


def test_new_masks_hold_from_the_next_call_on():
    model = compiled(with_state, keras.optimizers.SGD(0.05, momentum=0.9))
    pace = {"steps": 3, "batch_size": 12}
    training.train(model, X, Y, **pace)
    masks = {path: np.roll(mask, 1) for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    before = model.get_weights()
    training.train(model, X, Y, **pace)
    for ref in ml.masked_refs(model):
        effective = keras.ops.convert_to_numpy(getattr(ref.layer, ref.name))
        assert (effective[~masks[ref.path]] == 0).all()
    other = compiled(with_state, keras.optimizers.SGD(0.05, momentum=0.9))
    training.train(other, X, Y, **pace)
    assert_close(before, other.get_weights())
    ml.set_masks(other, masks)
    kept_beside(other).clear()  # its programs contain the old masks
    training.train(other, X, Y, **pace)
    assert_close(everything(model), everything(other))


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = epoch == 1


def test_callbacks_of_epochs(tmp_path):
    model = compiled(dense)
    early = keras.callbacks.EarlyStopping("val_loss", patience=0, restore_best_weights=True)
    checkpoint = keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.keras")
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: [0.1, 1e3, 1e3][epoch])
    history = training.fit(
        model, X, Y, epochs=3, validation_data=(X, Y), callbacks=[early, checkpoint, rates]
    )
    assert history is model.history
    assert len(history.history["loss"]) == 2  # the second epoch, at such a rate, did worse
    best = keras.models.load_model(tmp_path / "1.keras").get_weights()
    assert_close(model.get_weights(), best)
    assert len(training.fit(model, X, Y, epochs=5, callbacks=[Stop()]).epoch) == 2


def test_callbacks_of_batches_go_through_fit(caplog):
    batches = []
    count = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: batches.append(1))
    model = compiled(dense)
    for _ in range(2):
        training.fit(model, X, Y, batch_size=10, callbacks=[count])
    assert len(batches) == 10
    assert [record.message for record in caplog.records].count(
        "Training goes through `fit`: LambdaCallback acts on batches."
    ) == 1


def test_progress_is_shown(capsys):
    training.fit(compiled(dense), X, Y, epochs=2, verbose=2)
    out = capsys.readouterr().out
    assert "Epoch 1/2" in out
    assert "loss:" in out


def test_batches_are_the_same_with_callbacks_of_batches():
    nothing = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    ours, plain = (compiled(two_inputs) for _ in range(2))
    x = {"a": X, "b": X[::-1]}
    given = {"batch_size": 12, "epochs": 3, "seed": 4}
    found = training.fit(ours, x, Y, sample_weight=WEIGHT, callbacks=[nothing], **given).history
    expected = training.fit(plain, x, Y, sample_weight=WEIGHT, **given).history
    assert_close(everything(ours), everything(plain))
    assert {name: pytest.approx(values, rel=1e-3) for name, values in expected.items()} == found


def test_callbacks_of_batches_see_lists_of_inputs_and_no_targets():
    a, b = keras.Input((6,)), keras.Input((6,))
    model = keras.Model([a, b], with_own_loss()(layers.Add()([a, b])))
    model.compile("sgd")
    training.fit(model, [X, X], batch_size=20, callbacks=[keras.callbacks.TerminateOnNaN()])
    assert int(model.optimizer.iterations) == 3


class EveryOther(keras.callbacks.ModelCheckpoint):
    def on_epoch_end(self, epoch, logs=None):
        if epoch % 2:
            super().on_epoch_end(epoch, logs)


class Counting(EveryOther):
    def on_train_batch_end(self, batch, logs=None):
        self.batches = getattr(self, "batches", 0) + 1


def test_checkpoints_count_as_callbacks_of_epochs_unless_they_act_on_batches(tmp_path, caplog):
    model = compiled(dense)
    other = EveryOther(tmp_path / "{epoch}.keras")
    training.fit(model, X, Y, epochs=2, callbacks=[other])
    assert [path.name for path in tmp_path.iterdir()] == ["2.keras"]
    assert "acts on batches" not in caplog.text
    counting = Counting(tmp_path / "{epoch}.keras")
    training.fit(model, X, Y, batch_size=10, callbacks=[counting])
    assert counting.batches == 5


class Extremes(keras.metrics.Metric):
    """A metric that is no mean and has two values."""

    def __init__(self):
        super().__init__(name="extremes")
        self.extremes = self.add_variable((2,), "zeros", name="extremes")

    def update_state(self, y_true, y_pred, sample_weight=None):
        found = keras.ops.stack([keras.ops.min(y_pred), keras.ops.max(y_pred)])
        self.extremes.assign(self.extremes + found)

    def result(self):
        return keras.ops.convert_to_tensor(self.extremes)


@pytest.mark.parametrize("compiles", [True, False])
def test_groups_are_evaluated_like_data_of_their_own(compiles):
    def spread(y_true, y_pred):  # Not a value for each example.
        return keras.ops.max(y_pred) - keras.ops.min(y_pred)

    model = dense()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy", spread, Extremes()], run_eagerly=not compiles)
    found = engine.engine_of(model).evaluate_groups(training.ArrayDataset.of(X, Y), 20)
    for number, result in enumerate(found):
        part = slice(20 * number, 20 * number + 20)
        expected = model.evaluate(X[part], Y[part], verbose=0, return_dict=True)
        assert result == {k: pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in expected.items()}
    assert [len(found), len(X)] == [3, 50]  # The last group is smaller.


def test_a_wrong_call_leaves_the_model_and_its_route(caplog, monkeypatch):
    by_xla(monkeypatch)
    model = compiled(dense)
    wrong = np.zeros((50, 3), "int32")
    for _ in range(2):
        before = everything(model)
        for call in (
            lambda: training.train(model, X, wrong, steps=3, batch_size=10),
            lambda: training.evaluate(model, X, wrong),
            lambda: training.fit(
                model, X, wrong, callbacks=[keras.callbacks.TerminateOnNaN()], batch_size=10
            ),
        ):
            with pytest.raises(ValueError, match="shape"):
                call()
        found = everything(model)
        assert_close(found[: len(before)], before)  # the optimizer may have created its slots
        training.train(model, X, Y, steps=3, batch_size=10)
        training.evaluate(model, X, Y)
    assert int(model.optimizer.iterations) == 6
    if COMPILED:
        current = engine.engine_of(model)
        assert (current._why_fit, current._why_evaluate, current._refused) == (None, None, set())
        assert set(re.findall("goes through.*", caplog.text)) == {
            "goes through `fit`: TerminateOnNaN acts on batches."
        }


def test_wrong_numbers_and_uncompiled_models():
    with pytest.raises(ValueError, match="not compiled"):
        training.fit(dense(), X, Y)
    with pytest.raises(ValueError, match="batch_size=0"):
        training.fit(compiled(dense), X, Y, batch_size=0)
