"""The choice between compiled loops and `fit`: unsupported models, and comparisons of pace."""

import logging
import time

import keras
import numpy as np
import pytest
from keras import layers

from loops import (
    COMPILED,
    X,
    Y,
    assert_close,
    by_xla,
    compiled,
    dense,
    everything,
    needs_loop,
    through_fit,
)
from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import CropAndFlip, engine

BACKEND = keras.backend.backend()

RNG = np.random.default_rng(0)


@needs_loop
def test_unsupported_models_fall_back_with_one_warning(caplog):
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

    monkeypatch.setattr(current._loops, "train", refuse)
    training.train(model, X, Y, steps=3, batch_size=10)
    assert int(model.optimizer.iterations) == 3
    assert through_fit(model)
    assert "NotImplementedError: no such operation" in caplog.text


@needs_loop
@pytest.mark.parametrize("accumulate", [None, 2])
def test_a_step_that_fails_after_its_update_is_not_trained_again(accumulate, monkeypatch):
    model = dense()
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=accumulate)
    model.compile(optimizer, "sparse_categorical_crossentropy")
    current = engine.engine_of(model)
    train = current._loops.train

    def late(*args):
        train(*args)
        raise RuntimeError("failed late")

    monkeypatch.setattr(current._loops, "train", late)
    with pytest.raises(RuntimeError, match="failed late"):
        training.train(model, X, Y, steps=3, batch_size=10)
    assert int(model.optimizer._iterations) == 1
    assert not through_fit(model)


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
        assert engine.engine_of(model)._loops.kinds(1000) == ("graph",)
        assert engine.engine_of(compiled(dense))._loops.kinds(1000) == ("XLA", "graph")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_xla_compiles_once_for_any_number_of_steps(monkeypatch):
    by_xla(monkeypatch)
    model = compiled(dense)
    training.train(model, X, Y, steps=2, batch_size=10)

    def seconds(model, steps):
        started = time.process_time()  # Other load on the machine does not count.
        training.train(model, X, Y, steps=steps, batch_size=10)
        return time.process_time() - started

    again = np.median([seconds(model, steps) for steps in range(3, 14)])
    assert again < seconds(compiled(dense), 2) / 3


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_models_that_xla_cannot_compile_use_a_loop_without_it(caplog, monkeypatch):
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
    assert not [r for r in caplog.records if r.name.startswith("lottery_ticket_pruner")]


@needs_loop
@pytest.mark.parametrize(("faster", "seconds"), [("loop", 0.001), ("fit", 0.02)])
def test_the_faster_route_is_taken_after_a_trial(monkeypatch, caplog, pace, faster, seconds):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(training.settings, "patience", 0.0)
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
def test_one_long_call_switches_to_fit_and_its_metrics_cover_all_of_it(monkeypatch, pace):
    monkeypatch.setattr(training.settings, "patience", 0.1)
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
    monkeypatch.setattr(training.settings, "patience", 0.0)
    monkeypatch.setattr(training.settings, "trial_steps", 10)
    model = compiled(dense)
    pace(model, fit=0.1, XLA=0.5, graph=0.5)
    if train == "train":
        training.train(model, X, Y, steps=10, batch_size=10, eval_every=1)
    else:  # Each epoch is a single incomplete batch.
        training.fit(model, X, Y, batch_size=100, epochs=10)
    assert through_fit(model)
    assert int(model.optimizer.iterations) == 10


@pytest.mark.skipif(BACKEND != "tensorflow", reason="XLA is a choice on TensorFlow alone")
def test_loops_of_two_kinds_are_timed_apart(monkeypatch, pace):
    monkeypatch.setattr(training.settings, "patience", 0.0)
    monkeypatch.setattr(training.settings, "xla_steps", 30)
    model = compiled(dense)
    pace(model, fit=0.005, XLA=0.001, graph=0.02)
    for deterministic in (True, False):
        for steps in (29, 30):
            training.train(model, X, Y, steps=steps, batch_size=5, deterministic=deterministic)
    lost = {
        kind: comparison.fit_is_faster
        for (kind, _), comparison in engine.engine_of(model)._comparisons.items()
    }
    assert lost == {"graph": True, "XLA": False}


@pytest.mark.parametrize(
    ("seconds", "left", "due"),
    [
        (2.9, 10_000, False),
        (3.1, 310, True),
        (3.1, 290, False),
        (11.9, 290, False),
        (12.1, 1, True),
    ],
)
def test_fit_is_tried_if_enough_is_left_to_train(monkeypatch, seconds, left, due):
    monkeypatch.setattr(training.settings, "patience", 3.0)
    comparison = engine._PaceComparison()
    comparison.note_loop(seconds, round(100 * seconds))  # 10 ms a step.
    assert comparison.is_due(left) == due


@needs_loop
@pytest.mark.parametrize("train", ["train", "fit"])
def test_the_steps_that_are_left_are_counted_over_calls(monkeypatch, train):
    monkeypatch.setattr(training.settings, "patience", 0.0)
    asked = []
    monkeypatch.setattr(engine._PaceComparison, "is_due", lambda self, left: asked.append(left))
    model = compiled(dense)
    if train == "train":
        training.train(model, X, Y, steps=12, batch_size=10, eval_every=5)
    else:
        training.fit(model, X, Y, batch_size=20, epochs=4)
    assert asked[0] == 12
    assert asked[-1] in (1, 2)
    assert asked == sorted(asked, reverse=True)


def test_on_an_equal_pace_the_loop_is_taken():
    for fit_seconds, lost in [(1.1, False), (0.98, False), (0.9, True)]:
        comparison = engine._PaceComparison()
        comparison.note_loop(10.0, 1000)
        comparison.note_fit(fit_seconds, 100)
        comparison.settle()
        assert comparison.fit_is_faster == lost


def test_fit_gets_no_more_than_the_data_at_a_time(monkeypatch):
    monkeypatch.setattr(training.settings, "part_bytes", 0)
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


class OwnFit(keras.Sequential):
    def fit(self, *args, **kwargs):
        self.fitted = True
        return super().fit(*args, **kwargs)


class Unhashable(CropAndFlip):
    __hash__ = None


def test_models_with_a_custom_fit_are_trained_by_it(caplog):
    model = compiled(lambda: OwnFit([keras.Input((6,)), layers.Dense(2)]))
    training.train(model, X, Y, steps=3, batch_size=10)
    assert model.fitted
    if COMPILED:
        assert "OwnFit has a custom `fit`" in caplog.text


@needs_loop
def test_an_augmentation_that_cannot_be_hashed_goes_through_fit(caplog):
    images = RNG.normal(size=(50, 5, 4, 2)).astype("float32")
    model = compiled(lambda: keras.Sequential([layers.Flatten(), layers.Dense(2)]))
    training.train(model, images, Y, steps=3, batch_size=10, augment=Unhashable(padding=1))
    assert int(model.optimizer.iterations) == 3
    assert "Unhashable is not hashable" in caplog.text


class OwnOptimizer(keras.Sequential):
    """Trains itself, without a Keras optimizer."""

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
