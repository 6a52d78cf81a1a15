"""The compiled loop against Keras' own `fit` on the same batches; when it gives way to it."""

import logging
import re
import time
import types

import keras
import numpy as np
import pytest
from keras import layers

import masked_layers as ml
from lottery_ticket_pruner import engine, examples, programs, training
from lottery_ticket_pruner.augmentation import CropAndFlip
from masked_layers.compiled import kept_beside

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
    monkeypatch.setattr(programs, "_WORTH_XLA", 0)


def through_fit(model):
    """Why a long training goes through `fit`: a text, or True if it is faster there."""
    current = engine.engine_of(model)
    if current._why_fit is not None or not current._programs.kinds(1000):
        return current._why_fit or True
    return any(race.lost for race in current._races.values())


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
    kept_beside(other).clear()  # its programs have seen the old masks
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
    assert through_fit(model)
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
    assert bool(through_fit(model)) == (BACKEND == "jax")
    training.train(model, X, Y, steps=2, batch_size=10)
    if BACKEND == "tensorflow":
        assert engine.engine_of(model)._programs.kinds(1000) == ("graph",)
        assert engine.engine_of(compiled(dense))._programs.kinds(1000) == ("XLA", "graph")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_xla_compiles_once_for_any_number_of_steps(monkeypatch):
    by_xla(monkeypatch)
    model = compiled(dense)
    training.train(model, X, Y, steps=2, batch_size=10)

    def seconds(model, steps):
        started = time.perf_counter()
        training.train(model, X, Y, steps=steps, batch_size=10)
        return time.perf_counter() - started

    # The median: a machine that stalls now and then is no sign of compiling.
    again = np.median([seconds(model, steps) for steps in range(3, 14)])
    assert again < seconds(compiled(dense), 2) / 3


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
    assert not through_fit(ours)
    assert caplog.text == ""


@pytest.fixture
def pace(monkeypatch):
    """Gives steps the seconds that they take on the engine's clock, which stands still otherwise.

    Those of each kind of loop and those of `fit`. Returns the steps of each call of a loop.
    """
    now = 0.0

    def wait(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(engine, "time", types.SimpleNamespace(perf_counter=lambda: now))

    def give(model, fit, **loops):
        current = engine.engine_of(model)
        train, plain_fit = current._programs.train, model.fit
        step = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: wait(fit))
        counts = []

        def timed(data, batches, kind):
            train(data, batches, kind)
            counts.append(len(batches))
            wait(len(batches) * loops[kind])

        def timed_fit(*args, callbacks=(), **kwargs):
            return plain_fit(*args, callbacks=[step, *callbacks], **kwargs)

        monkeypatch.setattr(current._programs, "train", timed)
        object.__setattr__(model, "fit", timed_fit)
        return counts

    return give


@needs_loop
@pytest.mark.parametrize(("faster", "seconds"), [("loop", 0.001), ("fit", 0.02)])
def test_the_faster_route_is_taken_after_a_trial(monkeypatch, caplog, pace, faster, seconds):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine, "_PATIENCE", 0.0)
    model = compiled(dense)
    assert not through_fit(model)
    pace(model, fit=0.005, XLA=seconds, graph=seconds)
    training.train(model, X, Y, steps=20, batch_size=5, deterministic=True)
    assert "ms a step" not in caplog.text
    training.train(model, X, Y, steps=100, batch_size=5)
    assert f"{1e3 * seconds:.3f} ms a step in a compiled loop, 5.000 in `fit`" in caplog.text
    assert bool(through_fit(model)) == (faster == "fit")
    assert int(model.optimizer.iterations) == 120


@needs_loop
def test_one_long_call_goes_over_to_fit_and_its_metrics_are_those_of_all_of_it(monkeypatch, pace):
    monkeypatch.setattr(engine, "_PATIENCE", 0.1)
    ours, theirs = compiled(dense), compiled(dense)
    counts = pace(ours, fit=0.005, XLA=0.02, graph=0.02)
    history = training.fit(ours, X, Y, batch_size=1, shuffle=False)
    assert through_fit(ours)
    assert counts == [1, 1, 2, 4]
    expected = theirs.fit(X, Y, batch_size=1, shuffle=False, verbose=0)
    assert_close(everything(ours), everything(theirs))
    assert history.history == {
        name: pytest.approx(values, rel=1e-4) for name, values in expected.history.items()
    }


@needs_loop
@pytest.mark.parametrize("train", ["train", "fit"])
def test_short_calls_ask_too(monkeypatch, pace, train):
    monkeypatch.setattr(engine, "_PATIENCE", 0.0)
    monkeypatch.setattr(engine, "_TRIAL_STEPS", 10)
    model = compiled(dense)
    pace(model, fit=0.1, XLA=0.5, graph=0.5)
    if train == "train":
        training.train(model, X, Y, steps=10, batch_size=10, eval_every=1)
    else:  # Each epoch is a batch that is not full.
        training.fit(model, X, Y, batch_size=100, epochs=10)
    assert through_fit(model)
    assert int(model.optimizer.iterations) == 10


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_loops_of_two_kinds_are_timed_apart(monkeypatch, pace):
    monkeypatch.setattr(engine, "_PATIENCE", 0.0)
    monkeypatch.setattr(programs, "_WORTH_XLA", 30)
    model = compiled(dense)
    pace(model, fit=0.005, XLA=0.001, graph=0.02)
    for deterministic in (True, False):
        for steps in (29, 30):
            training.train(model, X, Y, steps=steps, batch_size=5, deterministic=deterministic)
    lost = {kind: race.lost for (kind, _), race in engine.engine_of(model)._races.items()}
    assert lost == {"graph": True, "XLA": False}


def test_on_an_equal_pace_the_loop_is_taken():
    for fit_seconds, lost in [(1.1, False), (0.98, False), (0.9, True)]:
        race = engine._Race()
        race.note_loop(10.0, 1000)
        race.note_fit(fit_seconds, 100)
        race.settle()
        assert race.lost == lost


def test_fit_gets_no_more_than_the_data_at_a_time(monkeypatch):
    monkeypatch.setattr(engine, "_PART_BYTES", 0)
    ours, theirs = compiled(dense), compiled(dense)
    engine.engine_of(ours)._why_fit = "it is asked for"
    given, fit = [], ours.fit

    def watched(x, *args, **kwargs):
        given.append(len(x))
        return fit(x, *args, **kwargs)

    object.__setattr__(ours, "fit", watched)
    training.train(ours, X, Y, steps=9, batch_size=12)
    assert given == [48, 48, 12]
    order = training.batch_order(50, 9, 12, 0).ravel()
    history = theirs.fit(X[order], Y[order], batch_size=12, shuffle=False, verbose=0).history
    assert_close(everything(ours), everything(theirs))
    for name, value in ours.get_metrics_result().items():  # of all three parts
        assert float(value) == pytest.approx(history[name][0], rel=1e-4)


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
        assert_close(found[: len(before)], before)  # the optimizer may have its slots now
        training.train(model, X, Y, steps=3, batch_size=10)
        training.evaluate(model, X, Y)
    assert int(model.optimizer.iterations) == 6
    if COMPILED:
        current = engine.engine_of(model)
        assert (current._why_fit, current._why_evaluate, current._refused) == (None, None, set())
        assert set(re.findall("goes through.*", caplog.text)) == {
            "goes through `fit`: TerminateOnNaN acts on batches."
        }


class Eager(keras.Sequential):
    """Needs NumPy in its evaluation."""

    def test_step(self, *args):
        logs = super().test_step(*args)
        for value in logs.values() if isinstance(logs, dict) else logs[0].values():
            np.asarray(value)
        return logs


def eager():
    return Eager([keras.Input((6,)), layers.Dense(2)])


@pytest.mark.parametrize("kwargs", [{"run_eagerly": True}, {"jit_compile": False}])
def test_what_evaluates_eagerly_alone_goes_through_evaluate(kwargs, caplog):
    make = dense if BACKEND == "tensorflow" and "jit_compile" in kwargs else eager
    model = compiled(make, **kwargs)
    for _ in range(2):
        expected = model.evaluate(X, Y, verbose=0, return_dict=True)
        assert training.evaluate(model, X, Y) == pytest.approx(expected, rel=1e-5)
    if make is eager:
        assert len(caplog.records) == 1
        assert "Evaluation goes through `evaluate`: " in caplog.text


@needs_loop
def test_an_evaluation_that_cannot_be_compiled_goes_through_evaluate(monkeypatch, caplog):
    model = compiled(dense)

    def refuse(*args):
        raise NotImplementedError("no such operation")

    monkeypatch.setattr(engine.engine_of(model)._programs, "evaluate", refuse)
    for _ in range(2):
        expected = model.evaluate(X, Y, verbose=0, return_dict=True)
        assert training.evaluate(model, X, Y) == pytest.approx(expected, rel=1e-5)
    assert [record.message for record in caplog.records] == [
        "Evaluation goes through `evaluate`: NotImplementedError: no such operation."
    ]


class OwnLogs(keras.Sequential):
    """Steps that return something that is no metric of the model."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"first": keras.ops.mean(y_pred[0]), "both": keras.ops.mean(y_pred, axis=0)}


def test_what_a_step_of_the_models_own_returns_is_in_the_history():
    ours, theirs = (OwnLogs([keras.Input((6,)), layers.Dense(2)]) for _ in range(2))
    theirs.set_weights(ours.get_weights())
    for model in (ours, theirs):
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    given = {"batch_size": 12, "epochs": 2, "shuffle": False, "validation_data": (X, Y)}
    found = training.fit(ours, X, Y, **given).history
    expected = theirs.fit(X, Y, verbose=0, **given).history
    assert set(found) == set(expected) == {"first", "both", "val_first", "val_both"}
    for name, values in expected.items():
        np.testing.assert_allclose(np.array(found[name]), np.array(values), rtol=1e-4, atol=1e-5)
    assert_close(everything(ours), everything(theirs))


def test_metrics_of_several_values():
    model = dense()
    model.compile("sgd", "mse", metrics=[keras.metrics.F1Score(average=None)])
    y = np.eye(2, dtype="float32")[Y]
    found = training.fit(model, X, y, validation_data=(X, y)).history
    assert found["f1_score"][0].shape == (2,)
    expected = model.evaluate(X, y, verbose=0, return_dict=True)
    np.testing.assert_allclose(found["val_f1_score"][0], expected["f1_score"], rtol=1e-4)
    assert found["val_loss"] == [pytest.approx(expected["loss"], rel=1e-4)]


def with_own_loss():
    """No targets: the loss is added on the way."""

    class Sparse(layers.Layer):
        def call(self, x):
            self.add_loss(keras.ops.mean(keras.ops.abs(x)))
            return x

    return keras.Sequential([keras.Input((6,)), layers.Dense(2), Sparse()])


def test_a_model_without_targets():
    ours, theirs = (with_own_loss() for _ in range(2))
    theirs.set_weights(ours.get_weights())
    for model in (ours, theirs):
        model.compile(keras.optimizers.SGD(0.1))
    found = training.fit(ours, X, batch_size=12, epochs=2, shuffle=False, validation_data=(X,))
    expected = theirs.fit(X, batch_size=12, epochs=2, shuffle=False, verbose=0)
    assert_close(everything(ours), everything(theirs))
    assert found.history["loss"] == pytest.approx(expected.history["loss"], rel=1e-5)
    assert training.evaluate(ours, X)["loss"] == pytest.approx(found.history["val_loss"][-1])
    training.train(ours, X, None, steps=2, batch_size=12)
    if COMPILED:
        assert not through_fit(ours)


def test_an_output_without_a_loss_and_lists_of_arrays():
    def make():
        a, b = keras.Input((6,)), keras.Input((6,))
        outputs = [layers.Dense(1)(a), layers.Dense(1)(b)]
        model = keras.Model([a, b], outputs)
        model.compile(keras.optimizers.SGD(0.1), ["mse", None])
        return model

    ours, theirs = make(), make()
    theirs.set_weights(ours.get_weights())
    data = ([X, X[::-1]], [Y.astype("float32")[:, None], None])
    given = {"batch_size": 12, "shuffle": False, "validation_data": data}
    found = training.fit(ours, *data, **given).history
    expected = theirs.fit(*data, verbose=0, **given).history
    assert_close(everything(ours), everything(theirs))
    assert {name: pytest.approx(values, rel=1e-4) for name, values in expected.items()} == found
    if COMPILED:
        assert not through_fit(ours)


@pytest.mark.parametrize(
    ("x", "y", "lengths"),
    [(X, Y[:40], "x: 50, y: 40"), ({"a": X, "b": X[:7]}, Y, "x: 50, 7"), (X[:0], Y[:0], "x: 0")],
)
def test_arrays_of_other_lengths_are_refused(x, y, lengths):
    model = compiled(two_inputs if isinstance(x, dict) else dense)
    for call in (training.fit, training.evaluate):
        with pytest.raises(ValueError, match=lengths):
            call(model, x, y)
    with pytest.raises(ValueError, match=lengths):
        training.train(model, x, y, steps=1, batch_size=5)
    with pytest.raises(ValueError, match="x: 0, y: 50"):
        training.evaluate(model, 3.0, Y)


def test_losses_that_are_sums_are_those_of_keras_batches():
    model = dense()
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(True, reduction="sum"))

    def expected(size):
        loss = model.evaluate(X, Y, batch_size=size, verbose=0, return_dict=True)["loss"]
        return pytest.approx(loss, rel=1e-5)

    given = {"batch_size": 15, "validation_data": (X, Y)}
    assert training.fit(model, X, Y, **given).history["val_loss"] == [expected(15)]
    found = training.fit(model, X, Y, **given, validation_batch_size=20)
    assert found.history["val_loss"] == [expected(20)]
    assert training.evaluate(model, X, Y, batch_size=8)["loss"] == expected(8)
    history = training.train(model, X, Y, **given, steps=1, validation_batch_size=7)
    assert history.validation == [{"loss": expected(7)}]
    for wrong in (
        lambda: training.evaluate(model, X, Y, batch_size=0),
        lambda: training.fit(model, X, Y, validation_batch_size=-1),
        lambda: training.train(model, X, Y, steps=1, batch_size=1, validation_batch_size=0),
    ):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()


class RowBias(layers.Layer):
    """Works on batches of ten only."""

    def call(self, x):
        return x + 0.1 * keras.ops.arange(10, dtype="float32")[:, None]


def test_a_model_of_one_batch_size_is_evaluated_by_it():
    model = keras.Sequential(
        [keras.Input(batch_shape=(10, 6)), RowBias(), layers.Dense(2, "softmax")]
    )
    model.compile("sgd", "sparse_categorical_crossentropy")
    history = training.train(model, X, Y, steps=3, batch_size=10, validation_data=(X, Y))
    expected = model.evaluate(X, Y, batch_size=10, verbose=0, return_dict=True)
    assert history.validation == [pytest.approx(expected, rel=1e-5)]


def test_evaluation_takes_fewer_of_large_examples():
    current = engine.engine_of(compiled(dense))
    small, large = (
        examples.Examples.of(np.zeros((4, size), "float32"), np.zeros(4)) for size in (6, 2**17)
    )
    assert current._evaluation_batch(small) == 1000
    assert current._evaluation_batch(large) == 31  # targets take some bytes too


class OwnFit(keras.Sequential):
    def fit(self, *args, **kwargs):
        self.fitted = True
        return super().fit(*args, **kwargs)


class Unhashable(CropAndFlip):
    __hash__ = None


def test_models_with_a_fit_of_their_own_are_trained_by_it(caplog):
    model = compiled(lambda: OwnFit([keras.Input((6,)), layers.Dense(2)]))
    training.train(model, X, Y, steps=3, batch_size=10)
    assert model.fitted
    if COMPILED:
        assert "OwnFit has a `fit` of its own" in caplog.text


@needs_loop
def test_an_augmentation_that_cannot_be_hashed_goes_through_fit(caplog):
    images = RNG.normal(size=(50, 5, 4, 2)).astype("float32")
    model = compiled(lambda: keras.Sequential([layers.Flatten(), layers.Dense(2)]))
    training.train(model, images, Y, steps=3, batch_size=10, augment=Unhashable(padding=1))
    assert int(model.optimizer.iterations) == 3
    assert "Unhashable is not hashable" in caplog.text


class OwnOptimizer(keras.Sequential):
    """Trains itself, without an optimizer of Keras."""

    def train_step(self, data):
        for variable in self.trainable_variables:
            variable.assign_sub(keras.ops.ones_like(variable))
        return {"size": keras.ops.mean(data[0])}


@pytest.mark.skipif(BACKEND == "jax", reason="Keras needs its optimizer there")
def test_a_model_without_an_optimizer_of_keras_is_trained_by_fit():
    model = OwnOptimizer([keras.Input((6,)), layers.Dense(2)])
    before = model.get_weights()
    model.compile(optimizer=None)
    training.train(model, X, Y, steps=3, batch_size=10)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_allclose(new, old - 3, rtol=1e-5)
    assert list(training.fit(model, X, Y).history) == ["size"]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="strategies of TensorFlow")
def test_models_distributed_to_a_single_device_go_through_fit(caplog):
    import tensorflow as tf

    with tf.distribute.MirroredStrategy(["/cpu:0"]).scope():
        ours, theirs = compiled(dense), compiled(dense)
    training.fit(ours, X, Y, batch_size=10, shuffle=False, validation_data=(X, Y))
    theirs.fit(X, Y, batch_size=10, shuffle=False, verbose=0)
    assert_close(everything(ours), everything(theirs))
    assert "the model is distributed by MirroredStrategy" in caplog.text


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
