"""Training for exact steps: counts, order of examples, evaluation, agreement with Keras."""

import keras
import numpy as np
import pytest

from lottery_ticket_pruner import training

BACKEND = keras.backend.backend()


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 4)).astype("float32")
    return x, (x[:, 0] > 0).astype("int32")


def make_model(seed=0):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile(
        keras.optimizers.SGD(0.1),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    return model


def by_hand(model, x, y, order):
    """Softmax regression by gradient descent on the batches of `order`, in plain NumPy."""
    kernel, bias = (np.array(w, "float64") for w in model.get_weights())
    for indices in order:
        z = x[indices] @ kernel + bias
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(indices)), y[indices]] -= 1
        kernel -= 0.1 * x[indices].T @ p / len(indices)
        bias -= 0.1 * p.mean(0)
    return kernel, bias


@pytest.mark.parametrize(("steps", "eval_every"), [(8, 4), (10, 4), (3, None)])
def test_train_takes_the_steps_of_its_batch_order(data, steps, eval_every):
    model = make_model()
    order = training.batch_order(50, steps, 12, 7)
    expected = by_hand(model, *data, order)
    done = []
    training.train(
        model, *data, steps=steps, batch_size=12, seed=7, eval_every=eval_every,
        on_progress=done.append,
    )  # fmt: skip
    for weight, wanted in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(weight, wanted, rtol=1e-4, atol=1e-6)
    assert int(model.optimizer.iterations) == sum(done) == steps


def test_train_evaluates_on_the_validation_data_at_the_steps_asked_for(data):
    model = make_model()
    history = training.train(
        model, *data, steps=10, batch_size=12, eval_every=4, validation_data=data
    )
    assert history.steps == [4, 8, 10]
    assert history.seconds > 0
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    assert history.validation[-1] == pytest.approx(expected, rel=1e-5)
    losses = [result["loss"] for result in history.validation]
    assert len(set(losses)) == 3


def test_early_stop_is_the_first_minimum_of_the_validation_loss():
    results = [{"loss": loss} for loss in (0.5, 0.2, 0.3, 0.2)]
    assert training.History([10, 20, 30, 40], results).early_stop == 1
    assert training.History().early_stop is None
    assert early_stop([np.nan, 0.5, np.nan, 0.4, 0.4]) == 3
    assert early_stop([np.nan, np.inf]) == 1
    assert early_stop([np.nan, np.nan]) == 0


def early_stop(losses):
    return training.History(list(range(len(losses))), [{"loss": x} for x in losses]).early_stop


def test_zero_steps_change_nothing(data):
    model = make_model()
    before = model.get_weights()
    history = training.train(model, *data, steps=0, batch_size=12, validation_data=data)
    assert history.steps == []
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


def test_training_follows_a_new_compile(data):
    model = make_model()
    training.train(model, *data, steps=4, batch_size=12)
    model.compile(keras.optimizers.SGD(0.0), "sparse_categorical_crossentropy")
    before = model.get_weights()
    training.train(model, *data, steps=4, batch_size=12)
    for a, b in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    expected = model.evaluate(*data, verbose=0, return_dict=True)
    assert training.evaluate(model, *data) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="counts the traces of TensorFlow")
def test_training_again_traces_nothing_again(data):
    traces = []

    class Counted(keras.Sequential):
        def train_step(self, batch):
            traces.append(batch)
            return super().train_step(batch)

    model = Counted([keras.Input((4,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    training.train(model, *data, steps=8, batch_size=12, eval_every=4)
    first = len(traces)
    assert first >= 1
    training.train(model, *data, steps=16, batch_size=12, seed=3, eval_every=4)
    assert len(traces) == first


@pytest.mark.skipif(BACKEND == "torch", reason="trains through `fit` in any case")
def test_listening_does_not_send_custom_steps_through_fit(data, monkeypatch):
    class Own(keras.Sequential):
        def train_step(self, *args):
            return super().train_step(*args)

    heard = []
    for kind, names in ((keras.Sequential, {"loss"}), (Own, set())):
        model = kind([keras.Input((4,)), keras.layers.Dense(2)])
        model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        monkeypatch.setattr(training.engine_of(model), "_fit", None)
        training.train_by_plan(
            model,
            training.ArrayDataset.of(*data),
            training.TrainingPlan(steps=4, batch_size=12, eval_every=2),
            listeners=training.Listeners(on_training=lambda step, logs: heard.append((step, logs))),
        )
        assert [(step, set(logs)) for step, logs in heard] == [(2, names), (4, names)]
        heard.clear()


def test_batch_order_uses_every_example_equally_and_only_its_seed():
    order = training.batch_order(10, 7, 3, (1, 2))
    assert order.shape == (7, 3)
    counts = np.bincount(order.ravel(), minlength=10)
    assert counts.min() == 2
    assert counts.max() == 3
    np.testing.assert_array_equal(np.sort(order.ravel()[:10]), np.arange(10))
    np.testing.assert_array_equal(order, training.batch_order(10, 7, 3, (1, 2)))
    assert not np.array_equal(order, training.batch_order(10, 7, 3, (1, 3)))


def test_train_refuses_invalid_arguments(data):
    model = make_model()
    with pytest.raises(ValueError, match="steps=-1"):
        training.train(model, *data, steps=-1, batch_size=4)
    with pytest.raises(ValueError, match="eval_every=0"):
        training.train(model, *data, steps=1, batch_size=4, eval_every=0)
    with pytest.raises(ValueError, match="not compiled"):
        training.train(keras.Sequential([keras.layers.Dense(1)]), *data, steps=1, batch_size=4)


def test_lists_of_numbers_are_refused_in_few_words(data):
    x, y = data
    with pytest.raises(ValueError, match="convert a list") as caught:
        training.evaluate(make_model(), x, y.tolist())
    assert len(str(caught.value)) < 400
