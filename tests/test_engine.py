"""The compiled loop against Keras' own `fit` on the same batches; when it gives way to it."""

import logging
import time

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import engine, training
from lottery_ticket_pruner.augmentation import CropAndFlip

BACKEND = keras.backend.backend()
COMPILED = BACKEND in ("tensorflow", "jax")
needs_loop = pytest.mark.skipif(not COMPILED, reason="no compiled loop on this backend")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(50, 6)).astype("float32")
Y = (X[:, 0] > X[:, 1]).astype("int32")
WEIGHT = RNG.uniform(0.5, 2, 50).astype("float32")


@pytest.fixture(autouse=True)
def _nothing_said():
    engine._said.clear()


def dense():
    return keras.Sequential([keras.Input((6,)), layers.Dense(5, "relu"), layers.Dense(2)])


def with_state():
    """Dropout, statistics, a penalty, a constraint and masks, some of them trained under it."""
    model = keras.Sequential(
        [
            keras.Input((6,)),
            layers.Dense(8, "relu", kernel_regularizer="l2", kernel_constraint="max_norm"),
            layers.BatchNormalization(),
            layers.Dropout(0.3, seed=3),
            layers.Dense(2),
        ]
    )
    model = ml.convert_to_masked(model)
    rng = np.random.default_rng(1)
    masks = {path: rng.random(mask.shape) < 0.5 for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    return model


def two_inputs():
    a, b = keras.Input((6,), name="a"), keras.Input((6,), name="b")
    return keras.Model({"a": a, "b": b}, layers.Dense(2)(layers.Concatenate()([a, b])))


def recurrent():
    return keras.Sequential(
        [keras.Input((6,)), layers.Reshape((3, 2)), layers.GRU(3), layers.Dense(2)]
    )


class OwnStep(keras.Sequential):
    """A training step that trains on half the loss."""

    def compute_loss(self, *args, **kwargs):
        return 0.5 * super().compute_loss(*args, **kwargs)


def own_step():
    return OwnStep([keras.Input((6,)), layers.Dense(2)])


def schedule():
    return keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)


CASES = {
    "dense": (dense, lambda: keras.optimizers.Adam(0.01)),
    "state": (with_state, lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1)),
    "schedule": (dense, lambda: keras.optimizers.SGD(schedule(), momentum=0.9, nesterov=True)),
    "clipping": (dense, lambda: keras.optimizers.RMSprop(0.01, clipnorm=0.05)),
    "averages": (dense, lambda: keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.5)),
    "accumulation": (dense, lambda: keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)),
    "inputs": (two_inputs, lambda: keras.optimizers.SGD(0.1)),
    "recurrent": (recurrent, lambda: keras.optimizers.Adam(0.01)),
    "own": (own_step, lambda: keras.optimizers.SGD(0.1)),
}


def compiled(make, optimizer=None, **kwargs):
    if BACKEND == "tensorflow":
        # As the loop is: by XLA TensorFlow draws its random numbers in another way.
        kwargs.setdefault("jit_compile", make is with_state)
    keras.utils.set_random_seed(0)
    model = make()
    model.compile(
        optimizer or keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(from_logits=True)],
        **kwargs,
    )
    return model


def everything(model):
    variables = [*model.variables, *model.optimizer.variables]
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-6)


def by_xla(monkeypatch):
    monkeypatch.setattr(engine, "_WORTH_XLA", 0)


@pytest.mark.parametrize(
    ("case", "weighted"), [*((case, False) for case in CASES), ("state", True), ("inputs", True)]
)
def test_same_as_fit_on_the_same_batches(case, weighted, monkeypatch):
    if case == "state":
        by_xla(monkeypatch)
    make, optimizer = CASES[case]
    x = {"a": X, "b": X[::-1]} if case == "inputs" else X
    weight = WEIGHT if weighted else None
    ours, theirs = (compiled(make, optimizer()) for _ in range(2))
    history = training.fit(
        ours, x, Y, batch_size=12, epochs=2, sample_weight=weight, validation_data=(x, Y), seed=5
    )
    if COMPILED:
        assert engine.engine_of(ours).route == "loop"
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
    engine.engine_of(theirs).route = "fit"
    for model in (ours, theirs):
        training.train(model, images, Y, steps=7, batch_size=12, seed=3, augment=crop, eval_every=4)
    assert_close(everything(ours), everything(theirs))
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
    model = compiled(with_state, keras.optimizers.Adam(0.05))
    pace = {"steps": 3, "batch_size": 12}
    training.train(model, X, Y, **pace)
    masks = {path: np.roll(mask, 1) for path, mask in ml.get_masks(model).items()}
    ml.set_masks(model, masks)
    before = model.get_weights()
    training.train(model, X, Y, **pace)
    for ref in ml.masked_refs(model):
        effective = keras.ops.convert_to_numpy(getattr(ref.layer, ref.name))
        assert (effective[~masks[ref.path]] == 0).all()
    other = compiled(with_state, keras.optimizers.Adam(0.05))
    training.train(other, X, Y, **pace)
    assert_close(before, other.get_weights())
    ml.set_masks(other, masks)
    object.__delattr__(other, "_lottery_ticket_engine")  # its programs have seen the old masks
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


@needs_loop
def test_what_cannot_run_falls_back_and_says_so_once(caplog):
    model = compiled(dense, run_eagerly=True)
    for _ in range(2):
        training.train(model, X, Y, steps=2, batch_size=10)
    assert int(model.optimizer.iterations) == 4
    assert [record.message for record in caplog.records] == [
        "Training goes through `fit`: the model is compiled with run_eagerly=True."
    ]


@needs_loop
def test_a_step_that_cannot_be_compiled_falls_back(caplog, monkeypatch):
    model = compiled(dense)
    current = engine.engine_of(model)

    def refuse(*args):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(current._programs, "train", refuse)
    training.train(model, X, Y, steps=3, batch_size=10)
    assert int(model.optimizer.iterations) == 3
    assert current.route == "fit"
    assert "NotImplementedError: no such operation" in caplog.text


@needs_loop
def test_convolutions_are_in_no_xla_loop_on_a_cpu():
    model = compiled(
        lambda: keras.Sequential(
            [
                keras.Input((6,)),
                layers.Reshape((6, 1)),
                layers.Conv1D(2, 3),
                layers.Flatten(),
                layers.Dense(2),
            ]
        )
    )
    assert engine.engine_of(model).route == {"jax": "fit", "tensorflow": "loop"}[BACKEND]
    training.train(model, X, Y, steps=2, batch_size=10)
    if BACKEND == "tensorflow":
        assert not engine.engine_of(model)._programs._by_xla
        assert engine.engine_of(compiled(dense))._programs._by_xla


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_xla_compiles_once_for_any_number_of_steps(monkeypatch):
    by_xla(monkeypatch)
    model = compiled(dense)
    training.train(model, X, Y, steps=2, batch_size=10)
    started = time.perf_counter()
    for steps in range(3, 13):
        training.train(model, X, Y, steps=steps, batch_size=10)
    again = time.perf_counter() - started
    other = compiled(dense)
    started = time.perf_counter()
    training.train(other, X, Y, steps=2, batch_size=10)
    assert again < 3 * (time.perf_counter() - started)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_what_xla_cannot_compile_loops_without_it(caplog, monkeypatch):
    by_xla(monkeypatch)
    import tensorflow as tf

    class InPython(layers.Layer):
        def call(self, x):
            tf.numpy_function(lambda a: a, [x], "float32")
            return x

    ours, theirs = (
        compiled(lambda: keras.Sequential([keras.Input((6,)), layers.Dense(2), InPython()]))
        for _ in range(2)
    )
    training.train(ours, X, Y, steps=3, batch_size=10)
    order = training.batch_order(50, 3, 10, 0).ravel()
    theirs.fit(X[order], Y[order], batch_size=10, shuffle=False, verbose=0)
    assert_close(everything(ours), everything(theirs))
    assert engine.engine_of(ours).route == "loop"
    assert caplog.text == ""


@needs_loop
@pytest.mark.parametrize(("slowness", "route"), [(0.0, "loop"), (0.05, "fit")])
def test_the_faster_route_is_taken_after_a_trial(monkeypatch, caplog, slowness, route):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine, "_PATIENCE", 0.0)
    model = compiled(dense)
    current = engine.engine_of(model)
    train = current._programs.train

    def slowed(data, batches, long):
        train(data, batches, long)
        time.sleep(slowness * len(batches))

    monkeypatch.setattr(current._programs, "train", slowed)
    training.train(model, X, Y, steps=20, batch_size=5, deterministic=True)
    assert not current._settled
    training.train(model, X, Y, steps=20, batch_size=5)
    assert not current._settled  # too few steps to tell
    training.train(model, X, Y, steps=100, batch_size=5)
    assert current.route == route
    assert "ms a step in a compiled loop" in caplog.text
    assert int(model.optimizer.iterations) == 140


def test_sums_of_large_data_are_those_of_evaluate():
    x = RNG.normal(size=(2100, 6)).astype("float32")
    y = (x[:, 2] > 0).astype("int32")
    model = compiled(dense)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert training.evaluate(model, x, y) == pytest.approx(expected, rel=1e-5)
    before = everything(model)
    assert training.evaluate(model, x, y) == pytest.approx(expected, rel=1e-5)
    assert_close(before, everything(model))


def test_wrong_numbers_and_uncompiled_models():
    with pytest.raises(ValueError, match="not compiled"):
        training.fit(dense(), X, Y)
    with pytest.raises(ValueError, match="batch_size=0"):
        training.fit(compiled(dense), X, Y, batch_size=0)
