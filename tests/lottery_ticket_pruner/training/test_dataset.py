"""Arrays that are not numeric are refused by every function that takes data, before training."""

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import LotteryTicketPruner, find_ticket, training
from lottery_ticket_pruner.evidence import input_norms
from lottery_ticket_pruner.learned import learn_supermask
from lottery_ticket_pruner.training import ArrayDataset

BACKEND = keras.backend.backend()
X, Y = np.linspace(-1, 1, 30).reshape(10, 3), np.arange(10) % 2

WRONG = {
    "overflow": (np.where(X == 1, 1e300, X), r"into float32.*1e\+300"),
    "negative overflow": (np.where(X == 1, -1e39, X), r"into float32.*-1e\+39"),
    "objects": (np.array([[None] * 3] * 10), r"arrays of numbers.*object\(10, 3\)"),
    "numbers as objects": (X.astype(object), r"arrays of numbers.*object\(10, 3\)"),
    "dates": (np.zeros((10, 3), "datetime64[s]"), "arrays of numbers.*datetime64"),
    "nothing": (X[:0], "at least one example"),
    "fewer": (X[:7], "one entry per example"),
}


@pytest.fixture(scope="module")
def model():
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def entry_points(model, x):
    masked = ml.convert_to_masked(model)
    pruner = LotteryTicketPruner(masked)
    fine = X.astype("float32")
    options = {"steps": 1, "batch_size": 2}
    return {
        "train": lambda: training.train(model, x, Y, **options),
        "validation of train": lambda: training.train(
            model, fine, Y, **options, validation_data=(x, Y)
        ),
        "fit": lambda: training.fit(model, x, Y),
        "validation of fit": lambda: training.fit(model, fine, Y, validation_data=(x, Y)),
        "evaluate": lambda: training.evaluate(model, x, Y),
        "find_ticket": lambda: find_ticket(masked, x, Y, rounds=1, rate=0.5, **options),
        "learn_supermask": lambda: learn_supermask(model, x, Y, **options),
        "update_masks": lambda: pruner.update_masks("snip", rate=0.5, data=(x, Y)),
    }


@pytest.mark.once
@pytest.mark.parametrize("kind", WRONG)
def test_every_function_checks_its_arrays(model, kind):
    x, message = WRONG[kind]
    before = [w.copy() for w in model.get_weights()]
    for entry_point in entry_points(model, x).values():
        with pytest.raises(ValueError, match=message):
            entry_point()
    if kind != "fewer":
        with pytest.raises(ValueError, match=message):
            input_norms(model, x)
    for was, weights in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, was)


@pytest.mark.once
def test_ragged_rows_are_refused_in_few_words():
    class Ragged:
        def __array__(self, dtype=None, copy=None):
            return np.array([[1.0, 2.0], [1.0]])

    with pytest.raises(ValueError, match=r"Expected arrays as y: .*inhomogeneous") as caught:
        ArrayDataset.of(X, Ragged())
    assert len(str(caught.value)) < 400


def test_infinities_in_the_given_data_are_kept():
    """Masking layers and custom losses may rely on such values, as in `fit`."""
    x = X.copy()
    x[0] = np.inf, -np.inf, np.nan
    (given,) = ArrayDataset.of(x).host
    np.testing.assert_array_equal(given, x.astype("float32"))
    x[1, 1] = 1e39
    with pytest.raises(ValueError, match="into float32"):
        ArrayDataset.of(x)


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "float32", "float64"])
def test_numbers_of_every_type_are_taken(dtype):
    given = np.ones((4, 2)).astype(dtype)
    (taken,) = ArrayDataset.of(given).host
    assert taken.dtype == ("float32" if dtype.startswith("float") else dtype)
    np.testing.assert_array_equal(taken, given)


@pytest.mark.parametrize("texts", [np.array(["a", "b"]), np.array(["a", b"b"], object)])
def test_texts_are_for_tensorflow(texts):
    if BACKEND == "tensorflow":
        assert len(ArrayDataset.of(texts)) == 2
    else:
        with pytest.raises(ValueError, match="arrays of numbers"):
            ArrayDataset.of(texts)
