"""Messages about targets that do not fit the loss, from every function that takes targets."""

import re

import keras
import numpy as np
import pytest

import masked_layers as ml
from lottery_ticket_pruner import schedules, targets, training
from lottery_ticket_pruner.callbacks import DynamicSparseTraining, GradualPruning
from lottery_ticket_pruner.evidence import gradients
from lottery_ticket_pruner.learned import learn_supermask
from lottery_ticket_pruner.pruner import LotteryTicketPruner
from lottery_ticket_pruner.supermasks import evaluate_grid
from lottery_ticket_pruner.tickets import find_ticket

RNG = np.random.default_rng(3)
X = RNG.normal(size=(12, 5)).astype("float32")
INDICES = np.arange(12) % 3
COLUMNS = np.eye(3, dtype="float32")[INDICES]

SPARSE, DENSE = "sparse_categorical_crossentropy", "categorical_crossentropy"
# Targets for a loss, and the expected parts of the message.
WRONG = {
    "columns for a loss of indices": (
        (SPARSE, COLUMNS),
        r"expects class indices: integers from 0 to 2 in shape \(12,\) or \(12, 1\).*"
        r"Received: float32 targets of shape \(12, 3\).*y\.argmax\(-1\)",
    ),
    "indices for a loss of columns": (
        (DENSE, INDICES),
        r"expects a column for each class: .*\(12, 3\)\. "
        r"Received: int64 targets of shape \(12,\).*to_categorical\(y, 3\)",
    ),
    "a column of indices for a loss of columns": (
        (keras.losses.CategoricalCrossentropy(from_logits=True), INDICES[:, None]),
        r"CategoricalCrossentropy, expects a column.*"
        r"Received: int64 targets of shape \(12, 1\).*to_categorical\(y, 3\)",
    ),
}
EVERY = pytest.mark.parametrize(("given", "said"), WRONG.values(), ids=WRONG)


def classifier(loss):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3, activation="softmax")])
    model.compile("sgd", loss)
    return model


def pruner_of(loss):
    return LotteryTicketPruner(ml.convert_to_masked(classifier(loss)))


def ways(loss, y):
    """Returns functions that take targets, by name."""
    pruner = pruner_of(loss)
    model = pruner.model
    data = (X, y)
    rows = {"criteria": ["smallest_weights"], "sparsities": [0.5]}
    return {
        "snip": lambda: pruner.update_masks("snip", sparsity=0.5, data=data),
        "grasp": lambda: pruner.update_masks("grasp", sparsity=0.5, data=data),
        "gradients": lambda: gradients.loss_gradients(model, X, y),
        "supermask": lambda: pruner.evaluate_supermask(X, y, verbose=0),
        "grid": lambda: evaluate_grid(pruner, X, y, **rows),
        "train": lambda: training.train(model, X, y, steps=1, batch_size=4),
        "fit": lambda: training.fit(model, X, y),
        "evaluate": lambda: training.evaluate(model, X, y),
        "validation": lambda: training.train(
            model, X, INDICES, steps=1, batch_size=4, validation_data=data
        ),
        "ticket": lambda: find_ticket(model, X, y, rounds=1, steps=1, controls=()),
        "learned": lambda: learn_supermask(classifier(loss), X, y, steps=1),
    }


@pytest.mark.once
@EVERY
def test_targets_that_the_loss_does_not_take_are_named_with_a_remedy(given, said):
    calls = ways(*given)
    if given[0] != SPARSE:
        del calls["validation"]  # the targets to train on are indices
    for name, call in calls.items():
        with pytest.raises(ValueError, match="The loss of") as caught:
            call()
        assert re.search(said, str(caught.value)), name


@EVERY
def test_callbacks_refuse_their_data_before_the_first_step(given, said):
    loss, y = given
    right = COLUMNS if y.ndim == 1 or y.shape[1] == 1 else INDICES
    pruner = pruner_of(loss)
    schedule = schedules.Constant(0.5, begin_step=5)
    for callback in (
        GradualPruning(pruner, schedule, "snip", data=(X, y)),
        DynamicSparseTraining(pruner, 100, data=(X, y), frequency=50),
    ):
        with pytest.raises(ValueError, match=said):
            pruner.model.fit(X, right, verbose=0, callbacks=[callback])
    assert int(pruner.model.optimizer.iterations) == 0


@pytest.mark.once
def test_class_indices_out_of_range_are_named():
    pruner = pruner_of(SPARSE)
    said = r"from 0 to 2 .* from 1 to 3\. Number the classes from 0"
    for call in (
        lambda: pruner.update_masks("snip", sparsity=0.5, data=(X, INDICES + 1)),
        lambda: training.evaluate(pruner.model, X, INDICES + 1),
        lambda: find_ticket(pruner.model, X, INDICES + 1, rounds=1, steps=1, controls=()),
    ):
        with pytest.raises(ValueError, match=said):
            call()


@pytest.mark.once
def test_the_output_of_wrong_targets_is_named():
    inputs = keras.Input((5,))
    outputs = {
        "first": keras.layers.Dense(1, name="first")(inputs),
        "second": keras.layers.Dense(3, name="second")(inputs),
    }
    model = keras.Model(inputs, outputs)
    model.compile("sgd", loss={"first": "mse", "second": SPARSE})
    y = {"first": X[:, 0], "second": COLUMNS}
    assert "for its output 'second', sparse" in targets.mismatch(model, X, y)
    assert targets.mismatch(model, X, y | {"second": INDICES}) is None


def own_loss(y, outputs):
    return keras.ops.mean(outputs, axis=-1)


@pytest.mark.once
@pytest.mark.parametrize(
    ("loss", "units", "y"),
    [
        (SPARSE, 3, INDICES),
        (SPARSE, 3, INDICES[:, None]),
        (keras.losses.SparseCategoricalCrossentropy(ignore_class=-1), 3, INDICES - (X[:, 0] > 9)),
        (DENSE, 3, COLUMNS),
        ("binary_crossentropy", 1, INDICES),
        ("mse", 1, X[:, 0]),
        (own_loss, 3, INDICES),
        (None, 3, INDICES),
    ],
)
def test_there_is_no_message_about_targets_that_fit_the_loss(loss, units, y):
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(units)])
    model.compile("sgd", loss)
    assert targets.mismatch(model, X, y) is None


@pytest.mark.once
def test_other_errors_are_left_alone():
    model = classifier(SPARSE)
    with pytest.raises(ZeroDivisionError), targets.explained(model, X, INDICES):
        raise ZeroDivisionError
    with pytest.raises(KeyError), targets.explained(model, iter([X]), COLUMNS):
        raise KeyError("a data set, of which nothing is known")
