"""NaN and infinities in data are refused before anything is trained."""

import keras
import numpy as np
import pytest

from lottery_ticket_pruner import find_ticket, finite_data, learned, prune

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4)).astype("float32")
Y = RNG.normal(size=(40, 1)).astype("float32")


def known_only(y, predicted):
    """Leaves out targets that are NaN."""
    is_known = keras.ops.logical_not(keras.ops.isnan(y))
    return keras.ops.square(
        keras.ops.where(is_known, y, 0) - keras.ops.where(is_known, predicted, 0)
    )


def mean_of_known(y, predicted):
    """Averages over the known targets of a batch: NaN where none is known."""
    is_known = keras.ops.cast(keras.ops.logical_not(keras.ops.isnan(y)), "float32")
    return keras.ops.sum(known_only(y, predicted)) / keras.ops.sum(is_known)


def compiled(loss="mse"):
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", loss, jit_compile=False)
    return model


class OwnStep(keras.Model):
    """May leave out examples that are not finite."""

    def train_step(self, *arguments):
        raise NotImplementedError


class Eight(keras.layers.Layer):
    """Takes eight examples at a time, no others, like a stateful layer."""

    def call(self, x):
        return keras.ops.matmul(keras.ops.eye(8), x)


def of_eight(loss="mse"):
    inputs = keras.Input((4,), batch_size=8)
    model = keras.Sequential([inputs, Eight(), keras.layers.Dense(1)])
    model.compile("sgd", loss, jit_compile=False)
    return model


def with_value(array, value, *indices):
    array = array.copy()
    for index in indices:
        array[index] = value
    return array


def test_the_number_and_the_first_place_are_those_of_numpy(monkeypatch):
    monkeypatch.setattr(finite_data, "_BLOCK", 7)
    x = RNG.normal(size=(11, 3, 2))
    assert finite_data.not_finite(x) is None
    assert finite_data.not_finite(np.arange(3)) is None
    x[RNG.random(x.shape) < 0.2] = np.inf
    wrong = np.argwhere(~np.isfinite(x))
    expected = f"{len(wrong)} entries that are NaN or infinite, the first at {wrong[0].tolist()}"
    assert finite_data.not_finite(x) == expected


@pytest.mark.once
def test_searches_name_the_array_before_they_train():
    trained, model = [], compiled()
    wrong_x, wrong_y = with_value(X, np.nan, (7, 3), (9, 0)), with_value(Y, np.inf, (5, 0))
    search = {"rounds": 1, "steps": 2, "controls": (), "on_progress": trained.append}
    message = r"`x` of the training data has 2 entries .* first at \[7, 3\], and the loss .* nan"
    with pytest.raises(ValueError, match=message):
        find_ticket(model, wrong_x, Y, **search)
    message = r"`y` of the validation data has 1 entry .* first at \[5, 0\], and the loss .* inf"
    with pytest.raises(ValueError, match=message):
        find_ticket(model, X, Y, validation_data=(X, wrong_y), **search)
    with pytest.raises(ValueError, match=r"`x` of the test data has 2 entries"):
        learned.learn_supermask(model, X, Y, steps=1, test_data=(wrong_x, Y))
    data = (X, Y), (X[:20], Y[:20]), (wrong_x, Y)
    with pytest.raises(ValueError, match=r"`x` of the part 'test' of the data has 2 entries"):
        prune(model, data, max_drop=0.1, on_progress=trained.append)
    with pytest.raises(ValueError, match=r"'train' of the data, as it was split .* entry that is"):
        prune(model, ((wrong_x, Y), (X, Y)), max_drop=0.1, on_progress=trained.append)
    assert not trained


@pytest.mark.once
def test_values_that_the_loss_leaves_out_are_taken():
    finite_data.check(compiled(known_only), "data", (X, with_value(Y, np.nan, (3, 0))))
    # Alone, an example without a known target has no mean; nor have the first ones of all.
    unknown = with_value(Y, np.nan, *((row, 0) for row in range(36)))
    finite_data.check(compiled(mean_of_known), "data", (X, unknown))
    for loss in (known_only, mean_of_known):
        with pytest.raises(ValueError, match=r"`x` of the data"):
            finite_data.check(compiled(loss), "data", (with_value(X, np.nan, (3, 0)), Y))


@pytest.mark.parametrize("replace", [True, False])
def test_gradients_of_values_that_a_layer_hides_are_asked_where_it_is_trained(replace):
    class Known(keras.layers.Layer):
        """Makes 0 of NaN, like ReLU on TensorFlow."""

        def call(self, x):
            return keras.ops.where(keras.ops.isnan(x), 0.0, x)

    x = inputs = keras.Input((4,))
    if replace:
        x = Known()(x)
    x = Known()(keras.layers.Dense(3)(x))
    model = keras.Model(inputs, keras.layers.Dense(1)(x))
    model.compile("sgd", "mse", jit_compile=False)
    data = (with_value(X, np.nan, (3, 0)), Y)
    finite_data.check(model, "data", data)
    if replace:
        finite_data.check(model, "data", data, trained=True)
        finite_data.check(model, "data", data[:1], trained=True)  # No targets, so no gradients.
        return
    with pytest.raises(ValueError, match=r"first at \[3, 0\], and gradients of a batch with that"):
        finite_data.check(model, "data", data, trained=True)
    careful = OwnStep(model.inputs, model.outputs)
    careful.compile("sgd", "mse", jit_compile=False)
    finite_data.check(careful, "data", data, trained=True)


@pytest.mark.once
def test_models_of_a_fixed_batch_size_are_asked_too():
    with pytest.raises(ValueError, match=r"`x` of the data .* and the loss of that example is nan"):
        finite_data.check(of_eight(), "data", (with_value(X, np.nan, (3, 0)), Y))
    unknown = with_value(Y, np.nan, *((row, 0) for row in range(36)))
    finite_data.check(of_eight(mean_of_known), "data", (X, unknown))
