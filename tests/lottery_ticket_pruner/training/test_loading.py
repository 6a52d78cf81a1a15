"""Data sets in batches: they give their original arrays, or an error that says what is wrong."""

import keras
import numpy as np
import pytest
from keras import layers

from lottery_ticket_pruner import find_ticket
from lottery_ticket_pruner.training import pair_of, to_arrays

BACKEND = keras.backend.backend()
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(10, 3)).astype("float32"), np.arange(10)


class Batches(keras.utils.PyDataset):
    """Slices of arrays, with counts of started and finished epochs."""

    def __init__(self, *parts, size=4, count=3):
        super().__init__()
        self.parts, self.size, self.count = parts, size, count
        self.begun = self.ended = 0

    @property
    def num_batches(self):
        return self.count

    def __getitem__(self, number):
        batch = slice(number * self.size, (number + 1) * self.size)
        return keras.tree.map_structure(lambda part: part[batch], self.parts)

    def on_epoch_begin(self):
        self.begun += 1

    def on_epoch_end(self):
        self.ended += 1


def tensorflow_batches(*parts):
    tf = pytest.importorskip("tensorflow")
    return tf.data.Dataset.from_tensor_slices(parts).batch(4)


def torch_batches(*parts):
    data = pytest.importorskip("torch.utils.data")
    torch = pytest.importorskip("torch")
    return data.DataLoader(data.TensorDataset(*map(torch.from_numpy, parts)), batch_size=4)


def here(make):
    """Tests data sets of another backend's library on that backend, which has imported it."""
    made_by = {tensorflow_batches: "tensorflow", torch_batches: "torch"}.get(make, BACKEND)
    return pytest.param(make, marks=pytest.mark.skipif(made_by != BACKEND, reason=made_by))


@pytest.mark.parametrize("make", [here(m) for m in (Batches, tensorflow_batches, torch_batches)])
def test_batches_become_the_arrays_they_were_made_of(make):
    for read in (to_arrays(make(X, Y)), pair_of(make(X, Y))):
        for array, wanted in zip(read, (X, Y), strict=True):
            np.testing.assert_array_equal(array, wanted)
            assert array.dtype == wanted.dtype


def test_arrays_stay_as_they_are():
    x = [X, {"a": X}]
    assert to_arrays(x, Y) == (x, Y)
    assert to_arrays(x) == (x, None)
    pair = (X, Y)
    assert pair_of(pair) is pair
    assert pair_of(None) is None


def test_an_epoch_is_read_once_and_structures_are_kept():
    dataset = Batches({"a": X, "b": [X[:, 0], X * 2]}, Y)
    x, y = to_arrays(dataset)
    assert (dataset.begun, dataset.ended) == (1, 1)
    np.testing.assert_array_equal(x["a"], X)
    np.testing.assert_array_equal(x["b"][0], X[:, 0])
    np.testing.assert_array_equal(x["b"][1], X * 2)
    np.testing.assert_array_equal(y, Y)
    x, y = to_arrays(Batches(X))
    np.testing.assert_array_equal(x, X)
    assert y is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: (Batches(X, Y), Y), "Batches contains its targets.*y of type ndarray"),
        (lambda: (Batches(X, Y, count=0),), "Batches has no batches"),
        (lambda: (Batches(X, Y, count=None),), "Batches is infinite"),
        (lambda: (Batches(X, Y, Y),), r"batches of \(inputs, targets\).*a batch of 3 parts"),
        (lambda: (Batches(X, Y[:9]),), r"one entry per example.*\[\(2, 3\), \(1,\)\]"),
    ],
)
def test_data_that_cannot_be_read_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        to_arrays(*make())


@pytest.mark.skipif(BACKEND != "tensorflow", reason="imports TensorFlow")
def test_tensorflow_data_sets_without_end_batches_examples_or_targets():
    dataset = tensorflow_batches(X, Y)
    with pytest.raises(ValueError, match=r"is infinite.*Leave out `repeat\(\)`"):
        to_arrays(dataset.repeat())
    with pytest.raises(ValueError, match=r"shapes \[\(3,\), \(\)\]: batch the data set"):
        to_arrays(dataset.unbatch())
    with pytest.raises(ValueError, match="has no batches"):
        to_arrays(dataset.filter(lambda x, y: False))
    x, y = to_arrays(dataset.map(lambda x, y: x))
    np.testing.assert_array_equal(x, X)
    assert y is None


@pytest.mark.skipif(BACKEND == "jax", reason="has no data sets of its own")
def test_a_ticket_from_data_sets_is_that_from_arrays():
    def search(*data, **arguments):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,)), layers.Dense(10)])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        found = find_ticket(
            model, *data, rounds=1, steps=2, batch_size=5, controls=(), strategy="saliency",
            **arguments,
        )  # fmt: skip
        rows = [{**row, "seconds": 0} for row in found.rows]
        return found.ticket.get_weights(), rows

    make = tensorflow_batches if BACKEND == "tensorflow" else torch_batches
    (kernel, bias), rows = search(X, Y, validation_data=(X, Y), test_data=(X, Y))
    batches = search(
        make(X, Y), validation_data=make(X, Y), test_data=Batches(X, Y, size=3, count=4)
    )
    np.testing.assert_array_equal(batches[0][0], kernel)
    np.testing.assert_array_equal(batches[0][1], bias)
    assert batches[1] == rows
