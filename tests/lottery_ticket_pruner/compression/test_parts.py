"""Parts of the data: every form, disjoint, and always the same."""

import types

import keras
import numpy as np
import pytest

from lottery_ticket_pruner.compression import parts, parts_of
from lottery_ticket_pruner.training import ArrayDataset

pytestmark = pytest.mark.once
X = np.arange(100, dtype="float32")[:, None] * np.ones(3, "float32")
Y = np.arange(100)


def rows_of(parts):
    return [pair[1].tolist() for pair in (parts.train, parts.validation, parts.test)]


def test_what_is_missing_is_split_off_and_said():
    parts = parts_of((X, Y))
    train, validation, test = rows_of(parts)
    assert sorted(train + validation + test) == list(range(100))
    assert parts.counts() == {"train": 68, "validation": 12, "test": 20}
    assert "A fifth of the examples (20)" in parts.notes[0]
    assert "12 of the training examples" in parts.notes[1]
    assert all("If the model was trained on them" in note for note in parts.notes)
    for pair in (parts.train, parts.validation, parts.test):
        np.testing.assert_array_equal(pair[0][:, 0], pair[1])
    assert rows_of(parts_of((X, Y))) == [train, validation, test]


def test_two_and_three_parts_are_used_as_they_are():
    parts = parts_of(((X[:80], Y[:80]), (X[80:], Y[80:])))
    assert rows_of(parts)[2] == list(range(80, 100))
    assert len(parts.notes) == 1
    three = parts_of(((X[:50], Y[:50]), (X[50:70], Y[50:70]), (X[70:], Y[70:])))
    assert rows_of(three) == [list(range(50)), list(range(50, 70)), list(range(70, 100))]
    assert three.notes == ()


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return X[index * 10 : index * 10 + 10], Y[index * 10 : index * 10 + 10]


def test_data_sets_and_objects_are_read():
    expected = rows_of(parts_of((X, Y)))
    assert rows_of(parts_of(Batches())) == expected
    assert rows_of(parts_of(ArrayDataset.of(X, Y))) == expected
    assert rows_of(parts_of((Batches(), (X[:5], Y[:5]))))[2] == list(range(5))
    names = {"x_train": X, "y_train": Y, "x_validation": X[:4], "y_validation": Y[:4]}
    parts = parts_of(types.SimpleNamespace(**names, x_test=X[:2], y_test=Y[:2]))
    assert rows_of(parts) == [list(range(100)), [0, 1, 2, 3], [0, 1]]


def test_several_inputs_are_a_list():
    parts = parts_of(([X, 2 * X], Y))
    first, second = parts.test[0]
    np.testing.assert_array_equal(2 * first, second)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ((X, Y, Y), "'train' of the data to be a pair"),
        (((X, Y, Y), (X, Y)), "'train' of the data to be a pair .* tuple of 3"),
        (((X, Y), (X[:, :2], Y)), "same types and shapes in all parts"),
        ((X, Y[:50]), "'data' of the data: Expected inputs and targets with one entry"),
        (((X, Y),) * 4, "a tuple of 4"),
        ((X, None), "to be a pair"),
        (3, "to be a pair .* Received: int alone"),
        ((X[:1], Y[:1]), "too few examples"),
    ],
)
def test_other_forms_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parts_of(data)


def test_a_sample_has_examples_of_every_class_and_each_once():
    y = np.repeat(np.arange(10), 100)
    x = {"number": np.arange(1000), "class": y}
    inputs, labels = parts.sample_of((x, y), 512)
    assert len(np.unique(inputs["number"])) == 512
    np.testing.assert_array_equal(labels, y[inputs["number"]])
    assert np.bincount(labels).min() >= 51
    few, _ = parts.sample_of((x, y), 2000)
    np.testing.assert_array_equal(few["number"], np.arange(1000))
