"""Evaluation, logs and losses of all kinds of models, compared with Keras."""

import keras
import numpy as np
import pytest
from keras import layers

from loops import (
    COMPILED,
    X,
    Y,
    assert_close,
    compiled,
    dense,
    everything,
    needs_loop,
    through_fit,
    two_inputs,
    with_own_loss,
)
from lottery_ticket_pruner import training
from lottery_ticket_pruner.training import ArrayDataset, engine

BACKEND = keras.backend.backend()

RNG = np.random.default_rng(0)


class Eager(keras.Sequential):
    """Requires NumPy in its evaluation."""

    def test_step(self, *args):
        logs = super().test_step(*args)
        for value in logs.values() if isinstance(logs, dict) else logs[0].values():
            np.asarray(value)
        return logs


def eager():
    return Eager([keras.Input((6,)), layers.Dense(2)])


@pytest.mark.parametrize("kwargs", [{"run_eagerly": True}, {"jit_compile": False}])
def test_models_that_only_evaluate_eagerly_go_through_evaluate(kwargs, caplog):
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

    order = list(training.evaluate(model, X, Y))
    monkeypatch.setattr(engine.engine_of(model)._loops, "evaluate", refuse)
    for _ in range(2):
        expected = model.evaluate(X, Y, verbose=0, return_dict=True)
        found = training.evaluate(model, X, Y)
        assert found == pytest.approx(expected, rel=1e-5)
        assert list(found) == order
    assert [record.message for record in caplog.records] == [
        "Evaluation goes through `evaluate`: NotImplementedError: no such operation."
    ]


class OwnLogs(keras.Sequential):
    """Returns something other than metrics from its steps."""

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        return {"first": keras.ops.mean(y_pred[0]), "both": keras.ops.mean(y_pred, axis=0)}


def test_results_of_a_custom_step_are_in_the_history():
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
    """Accepts only batches of ten."""

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
        ArrayDataset.of(np.zeros((4, size), "float32"), np.zeros(4)) for size in (6, 2**17)
    )
    assert current._evaluation_batch(small) == 1000
    assert current._evaluation_batch(large) == 31  # targets take some bytes too


def test_sums_of_large_data_are_those_of_evaluate():
    x = RNG.normal(size=(2100, 6)).astype("float32")
    y = (x[:, 2] > 0).astype("int32")
    model = compiled(dense)
    expected = model.evaluate(x, y, verbose=0, return_dict=True)
    assert training.evaluate(model, x, y) == pytest.approx(expected, rel=1e-5)
    before = everything(model)
    assert training.evaluate(model, x, y) == pytest.approx(expected, rel=1e-5)
    assert_close(before, everything(model))


@pytest.mark.skipif(BACKEND != "tensorflow", reason="only TensorFlow has texts")
def test_texts_are_evaluated_in_a_loop(caplog):
    lookup = layers.StringLookup(vocabulary=["a", "b"], output_mode="one_hot")
    inputs = keras.Input((), dtype="string")
    model = keras.Model(inputs, layers.Dense(1)(lookup(inputs)))
    model.compile("sgd", "mse", metrics=["mae"])
    x, y = np.array(["a", "b", "a"]), np.arange(3.0)
    found = training.evaluate(model, x, y, batch_size=2)
    expected = model.evaluate(x.astype(object), y, verbose=0, return_dict=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert "goes through" not in caplog.text


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counts the traces of TensorFlow")
def test_data_of_any_length_is_evaluated_by_one_trace():
    traces = []

    def counted(y, outputs):
        traces.append(1)
        return keras.ops.mean((y - outputs) ** 2)

    model = dense()
    model.compile("sgd", counted, metrics=["mae"])
    y = np.eye(2, dtype="float32")[Y]
    training.evaluate(model, X, y)
    assert len(traces) == 2  # One of them creates the metrics.
    for size in (20, 33):
        difference = keras.ops.convert_to_numpy(model(X[:size])) - y[:size]
        expected = {"loss": np.mean(difference**2), "mae": np.mean(np.abs(difference))}
        assert training.evaluate(model, X[:size], y[:size]) == pytest.approx(expected, rel=1e-5)
    assert len(traces) == 2


@pytest.mark.once
def test_data_of_another_type_is_tried_on_models_without_symbolic_inputs():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.last = layers.Dense(1)

        def call(self, x):
            return self.last(x)

    model = Net()
    model.compile("sgd", "mse")
    model(X)
    train = ArrayDataset.of(X, np.zeros((len(X), 1), "float32"))
    integers = np.zeros((len(X), 1), "int32")
    assert train.kinds != training.held_out(model, train, "test_data", (X, integers)).kinds
    with pytest.raises(ValueError, match="`test_data` does not fit"):
        training.held_out(model, train, "test_data", (X[:, :-1], integers))
